"""Images of the training sets among those of the evaluation."""

import os
from collections.abc import Callable, Iterator

from virtex_d2.annotations.checks.images import Decoded, by_content
from virtex_d2.annotations.table import AnnotationTable, Problem


def leaks(
    train: AnnotationTable,
    test: AnnotationTable,
    train_decoded: dict[int, Decoded],
    test_decoded: dict[int, Decoded],
) -> Iterator[Problem]:
    """Evaluation images that are training images, each named once, by the surest sign of it.

    The same file, or another file of the same pixels, is one for certain. A file name alone is not:
    many data sets count their images from 1. It is named where the pixels were not compared.
    """
    resolved = _resolver()
    of_file = _first_of(train.files, resolved)
    of_name = _first_of(train.files, os.path.basename)
    of_digest = by_content(train, train_decoded)
    for index, file in enumerate(test.files):
        if not file:
            continue
        image = test_decoded.get(index, Decoded(error="not decoded"))
        same_file, name = resolved(file), os.path.basename(file)
        if same_file in of_file:
            kind, other = "leak-file", of_file[same_file]
        elif not image.error and image.digest in of_digest:
            kind, other = "leak-content", of_digest[image.digest][0]
        elif name in of_name and (image.error or of_name[name] not in train_decoded):
            kind, other = "leak-name", of_name[name]
        else:
            continue
        why = f"in {train.name}: image {train.image_ids[other]}, {train.files[other]}"
        yield Problem(kind, f"image {test.image_ids[index]}", file, why)


def _first_of(files: list[str], key: Callable[[str], str]) -> dict[str, int]:
    first: dict[str, int] = {}
    for index, file in enumerate(files):
        if file:
            first.setdefault(key(file), index)
    return first


def _resolver() -> Callable[[str], str]:
    """Paths -> paths without links among the folders, each folder asked but once."""
    folders: dict[str, str] = {}

    def resolved(file: str) -> str:
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], name)

    return resolved
