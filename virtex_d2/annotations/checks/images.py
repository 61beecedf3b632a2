"""Image files: absent, damaged, of another size than recorded, there twice."""

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

from virtex_d2.annotations.problems import absent
from virtex_d2.annotations.table import AnnotationTable, Problem
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import read_image

_CHUNK = 32  # files that a process takes at a time


@dataclass(frozen=True)
class Decoded:
    """What a file turned out to be.

    Attributes:
        error: why it cannot be decoded; "" where it can.
        size: (width, height) in pixels, turned as its EXIF data says, as detectron2 reads it.
        digest: of its pixels, so that metadata and lossless formats make no difference.
    """

    error: str = ""
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""


def missing_images(table: AnnotationTable) -> list[int]:
    """Indices of the images whose file is not there."""
    gone = set(absent("", table.files))
    return [index for index, file in enumerate(table.files) if file and file in gone]


def decode_images(files: Sequence[str], workers: int, title: str = "") -> list[Decoded]:
    """Decode files in `workers` processes, with a line of progress on stderr."""
    bar = tqdm(
        total=len(files),
        desc=title or "images",
        unit="image",
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        leave=False,
    )
    decoded = []
    with bar:
        if workers <= 1:
            for file in files:
                decoded.append(decode(file))
                bar.update()
            return decoded
        # Forked, not spawned: each would import torch anew. Nothing has started threads yet.
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            try:
                for result in pool.map(decode, files, chunksize=_CHUNK):
                    decoded.append(result)
                    bar.update()
            except BrokenProcessPool as error:
                raise InputError(
                    f"{title}: a process that decodes images was killed after {len(decoded)} of "
                    f"{len(files)}, probably for its memory. Use fewer with --workers."
                ) from error
    return decoded


def decode(file: str) -> Decoded:
    """Read and decode one file; never raises for what is in it."""
    try:
        image = read_image(file)
    except OSError as error:
        return Decoded(error=str(error))
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, salt=b"%dx%d" % image.size)
    return Decoded("", image.size, digest.digest())


def image_problems(
    table: AnnotationTable, missing: Sequence[int], decoded: dict[int, Decoded]
) -> Iterator[Problem]:
    """What is wrong with the files.

    Args:
        table: the data set.
        missing: of `missing_images`.
        decoded: by index of the image; may be of some only.
    """
    folders = Counter(os.path.dirname(table.files[index]) for index in missing)
    gone = {folder: count for folder, count in folders.items() if not os.path.isdir(folder or ".")}
    for folder, count in gone.items():
        why = f"{folder} is not there, and so are not {count} images"
        yield Problem("image-missing", "image folder", "", why)
    for index in missing:
        if os.path.dirname(table.files[index]) not in gone:
            yield _problem("image-missing", table, index, f"{table.files[index]} is not there")
    first: dict[str, int] = {}
    for index, file in enumerate(table.files):
        other = first.setdefault(os.path.normpath(file), index) if file else index
        # One id listed twice is named as that.
        if other != index and table.image_ids[other] != table.image_ids[index]:
            why = f"it is also that of image {table.image_ids[other]}"
            yield _problem("file-repeated", table, index, why)
    for index, image in decoded.items():
        if image.error:
            yield _problem("image-damaged", table, index, image.error)
        elif not np.isnan(table.sizes[index]).any() and image.size != tuple(table.sizes[index]):
            width, height = table.sizes[index]
            why = f"it is {image.size[0]}x{image.size[1]}, recorded as {width:.0f}x{height:.0f}"
            if image.size == (height, width):
                why += "; turned by its EXIF data, or not?"
            yield _problem("image-size", table, index, why)
    yield from _repeated(table, decoded)


def by_content(table: AnnotationTable, decoded: dict[int, Decoded]) -> dict[bytes, list[int]]:
    """Indices of images by their digest; a file listed twice counts once."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    seen: set[str] = set()
    for index, image in decoded.items():
        if not image.error and table.files[index] not in seen:
            seen.add(table.files[index])
            groups[image.digest].append(index)
    return groups


def _repeated(table: AnnotationTable, decoded: dict[int, Decoded]) -> Iterator[Problem]:
    for first, *others in by_content(table, decoded).values():
        for index in others:
            why = f"the same pixels as {table.files[first]}"
            yield _problem("content-repeated", table, index, why)


def _problem(kind: str, table: AnnotationTable, index: int, why: str) -> Problem:
    return Problem(kind, f"image {table.image_ids[index]}", table.files[index], why)
