"""Find images in folders the same way everywhere, and say what is left out."""

import logging
import os
from collections.abc import Collection, Iterator

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)


def image_suffix(name: str) -> str:
    """Which of `IMAGE_SUFFIXES` a file's name ends in, perhaps before the "?" of an address; ""
    where none."""
    for whole in (name, name.split("?")[0]):
        suffix = whole.rpartition(".")[2].lower()
        if suffix in IMAGE_SUFFIXES:
            return suffix
    return ""


def files_in(folder: str) -> list[str]:
    """Paths of all files within a folder and its subfolders, sorted, relative to it.

    Links are followed, but none to a folder that it lies in. Names that begin with a dot are left
    out, and what is in such folders.
    """

    def below(path: str, prefix: str, above: frozenset) -> Iterator[str]:
        try:
            status = os.stat(path)
            with os.scandir(path) as listed:
                entries = [entry for entry in listed if not entry.name.startswith(".")]
        except OSError as error:
            raise InputError(f"{path}: the folder cannot be read: {error.strerror}.") from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        for entry in entries:
            # entry.is_dir() would raise where a link is its own target
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield from below(entry.path, f"{prefix}{entry.name}/", above | {here})
            else:
                yield prefix + entry.name

    return sorted(below(folder, "", frozenset()))


def images_in(folder: str, beside: Collection[str] = ()) -> list[str]:
    """Those of `files_in` that are images by their suffix; others, but those with suffixes that
    belong `beside` them (such as "txt"), are counted and named in the log.
    """
    names = files_in(folder)
    images = [name for name in names if image_suffix(name)]
    others = [name for name in names if not image_suffix(name)]
    others = [name for name in others if name.rpartition(".")[2].lower() not in beside]
    are = "1 file is" if len(others) == 1 else f"{len(others)} files are"
    left_out = f"{are} left out for the suffix: {', '.join(others[:10])}"
    if not images:
        raise InputError(
            f"{folder}: it has no image: expected files that end in {', '.join(IMAGE_SUFFIXES)}, "
            f"found none in it{f'; {left_out}' if others else ''}."
        )
    if others:
        logger.warning("%s: %s", folder, left_out)
    return images
