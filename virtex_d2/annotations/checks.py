"""What is wrong with a data set: its boxes, masks and images, and what it shares with another."""

import functools
import hashlib
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

from virtex_d2.annotations.masks import BORDER, mask_problems
from virtex_d2.annotations.table import KINDS, AnnotationTable, Problem
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import missing_files, read_image

_CHUNK = 32  # files that a process takes at a time


@dataclass(frozen=True)
class Decoded:
    """What a file turned out to be."""

    error: str = ""  # why it cannot be decoded; "" where it can
    # (width, height) in pixels, turned as its EXIF data says, as detectron2 reads it
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""  # of its pixels, so that metadata and lossless formats make no difference


@dataclass
class Checked:
    """A data set and what is wrong with it."""

    table: AnnotationTable  # the data set
    problems: list[Problem]  # of its annotations, its images, and leaks into it
    # by image index, what the files turned out to be; of a sample only, or of none
    decoded: dict[int, Decoded] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether there is no serious problem."""
        return not any(KINDS[problem.kind].serious for problem in self.problems)

    def by_kind(self) -> dict[str, list[Problem]]:
        """Group the problems, in the order of KINDS."""
        groups: dict[str, list[Problem]] = {kind: [] for kind in KINDS}
        for problem in self.problems:
            groups[problem.kind].append(problem)
        return {kind: problems for kind, problems in groups.items() if problems}


def check(
    table: AnnotationTable, decode: bool = True, sample: int = 0, seed: int = 0, workers: int = 1
) -> Checked:
    """Check a data set's annotations and image files.

    Args:
        decode: whether to decode images; that they are there is seen in any case.
        sample: decode so many, drawn with `seed`; 0: all.
    """
    missing = missing_files(table.files)
    decoded: dict[int, Decoded] = {}
    if decode:
        there = sorted(set(range(len(table.files))) - set(missing))
        there = [index for index in there if table.files[index]]
        if 0 < sample < len(there):
            there = sorted(random.Random(seed).sample(there, sample))
        files = [table.files[index] for index in there]
        decoded = dict(zip(there, _decode_all(files, workers, table.name)))
    problems = [
        *table.problems,
        *(
            table.problem("field-assumed", row, f"no {field}")
            for field, rows in table.assumed.items()
            for row in rows
        ),
        *box_problems(table),
        *_repeated_objects(table),
        *mask_problems(table),
        *missing_problems(table, missing),
        *_image_problems(table, decoded),
    ]
    return Checked(table, problems, decoded)


def box_problems(table: AnnotationTable) -> Iterator[Problem]:
    """Boxes that are empty or lie outside their image."""
    empty = (table.boxes[:, 2:] <= 0).any(axis=1)
    for index in np.flatnonzero(empty):
        yield table.problem("box-empty", index, table.box_of(index))
    over = table.overhang(table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:])
    for index in np.flatnonzero(~empty & (over > BORDER)):
        why = (
            f"{table.box_of(index)} reaches {over[index]:.1f} px outside the "
            f"{table.size_of(index)} image"
        )
        yield table.problem("box-outside", index, why)


def missing_problems(table: AnnotationTable, missing: Sequence[int]) -> Iterator[Problem]:
    """Images, by index, whose file is not there; of a folder that is not there, the folder."""
    folders = Counter(os.path.dirname(table.files[index]) for index in missing)
    gone = {folder: count for folder, count in folders.items() if not os.path.isdir(folder)}
    for folder, count in gone.items():
        why = f"{folder} is not there, and so are not {count} images"
        yield Problem("image-missing", "image folder", "", why)
    for index in missing:
        if os.path.dirname(table.files[index]) not in gone:
            why = f"{table.files[index]} is not there"
            yield table.image_problem("image-missing", index, why)


def leaks(train: Checked, test: Checked) -> Iterator[Problem]:
    """Evaluation images that are training images, each named once, by the surest sign of it.

    The same file, or another file of the same pixels, is one for certain. A file name alone is not:
    many data sets count their images from 1. It is named where the pixels were not compared.
    """
    real = functools.cache(os.path.realpath)  # links among the folders, each asked but once

    def resolved(file: str) -> str:
        return os.path.join(real(os.path.dirname(file)), os.path.basename(file))

    of_file = _first_of(train.table.files, resolved)
    of_name = _first_of(train.table.files, os.path.basename)
    of_digest = _by_content(train.table, train.decoded)
    for index, file in enumerate(test.table.files):
        if not file:
            continue
        image = test.decoded.get(index, Decoded(error="not decoded"))
        same_file, name = resolved(file), os.path.basename(file)
        if same_file in of_file:
            kind, other = "leak-file", of_file[same_file]
        elif not image.error and image.digest in of_digest:
            kind, other = "leak-content", of_digest[image.digest][0]
        elif name in of_name and (image.error or of_name[name] not in train.decoded):
            kind, other = "leak-name", of_name[name]
        else:
            continue
        where = f"image {train.table.image_ids[other]}, {train.table.files[other]}"
        yield test.table.image_problem(kind, index, f"in {train.table.name}: {where}")


def _repeated_objects(table: AnnotationTable) -> Iterator[Problem]:
    rows = np.flatnonzero(~np.isnan(table.boxes).any(axis=1) & (table.image_of >= 0))
    keys = np.column_stack([table.image_of[rows], table.category_of[rows], table.boxes[rows]])
    order = np.lexsort(keys.T)  # stable, so that the first of several equal ones comes first
    same = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    first = 0
    for place in np.flatnonzero(same) + 1:
        if not same[place - 2] or place == 1:
            first = order[place - 1]
        original = table.records[rows[first]]
        yield table.problem("object-repeated", rows[order[place]], f"as {original}")


def _decode_all(files: Sequence[str], workers: int, title: str) -> list[Decoded]:
    """Decode files in `workers` processes, with a line of progress on stderr."""
    decoded: list[Decoded] = []
    with ExitStack() as stack:
        results: Iterator[Decoded] = map(_decode, files)
        if workers > 1:
            # Forked, not spawned: each would import torch anew. Nothing has started threads yet.
            pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"))
            results = stack.enter_context(pool).map(_decode, files, chunksize=_CHUNK)
        every = 0.5 if sys.stderr.isatty() else 10  # seconds
        bar = tqdm(results, title or "images", len(files), False, mininterval=every, unit="image")
        try:
            decoded.extend(bar)
        except BrokenProcessPool as error:
            raise InputError(
                f"{title}: a process that decodes images was killed after {len(decoded)} of "
                f"{len(files)}, probably for its memory. Use fewer with --workers."
            ) from error
    return decoded


def _decode(file: str) -> Decoded:
    try:
        image = read_image(file)
    except OSError as error:
        return Decoded(error=str(error))
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, salt=b"%dx%d" % image.size)
    return Decoded("", image.size, digest.digest())


def _image_problems(table: AnnotationTable, decoded: dict[int, Decoded]) -> Iterator[Problem]:
    """Files there twice; of the decoded ones those that are damaged or of another size."""
    first: dict[str, int] = {}
    for index, file in enumerate(table.files):
        other = first.setdefault(os.path.normpath(file), index) if file else index
        # One id listed twice is named as that.
        if other != index and table.image_ids[other] != table.image_ids[index]:
            why = f"it is also that of image {table.image_ids[other]}"
            yield table.image_problem("file-repeated", index, why)
    for index, image in decoded.items():
        if image.error:
            yield table.image_problem("image-damaged", index, image.error)
        elif not np.isnan(table.sizes[index]).any() and image.size != tuple(table.sizes[index]):
            width, height = table.sizes[index]
            why = f"it is {image.size[0]}x{image.size[1]}, recorded as {width:.0f}x{height:.0f}"
            if image.size == (height, width):
                why += "; turned by its EXIF data, or not?"
            yield table.image_problem("image-size", index, why)
    for original, *others in _by_content(table, decoded).values():
        for index in others:
            why = f"the same pixels as {table.files[original]}"
            yield table.image_problem("content-repeated", index, why)


def _by_content(table: AnnotationTable, decoded: dict[int, Decoded]) -> dict[bytes, list[int]]:
    """Group images by their digest; a file listed twice counts once."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    seen: set[str] = set()
    for index, image in decoded.items():
        if not image.error and table.files[index] not in seen:
            seen.add(table.files[index])
            groups[image.digest].append(index)
    return groups


def _first_of(files: list[str], key: Callable[[str], str]) -> dict[str, int]:
    first: dict[str, int] = {}
    for index, file in enumerate(files):
        if file:
            first.setdefault(key(file), index)
    return first
