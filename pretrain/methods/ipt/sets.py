"""Folders of images to restore, of what they were before, and which belong together.

Layouts, by what is in a folder:

- EDSR's, also of B100 and Urban100: `HR/NAME.png`, `LR_bicubic/X2/NAMEx2.png`.
- B100 and Urban100 as their authors have them: `image_SRF_2/NAME_SRF_2_LR.png`, `..._HR.png`.
- Rain100L: `rain-001.png`, `norain-001.png`, in one folder or in `rain` and `norain`.
- any other: images are called by their names, in subfolders too.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from pretrain.methods.ipt.tasks import Task
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import files_in, image_suffix, images_in

DEGRADED, CLEAN = "degraded", "clean"


class Found(NamedTuple):
    """An image of a folder.

    Attributes:
        key: what it shares with its counterpart.
        name: its path within the folder, without suffix.
        path: of the file.
    """

    key: str
    name: str
    path: str


def list_images(place: str, kind: str, task: Task) -> list[Found]:
    """The images of one kind in a folder of any layout, or the one of a file; sorted by name.

    Args:
        place: a folder, or a file.
        kind: `DEGRADED` or `CLEAN`.
        task: for which.
    """
    if not os.path.exists(place):
        raise InputError(f"{place}: expected an image or a folder of them, found nothing there.")
    if not os.path.isdir(place):
        name = os.path.splitext(os.path.basename(place))[0]
        return [Found(name, name, place)]
    folder, key_of = _layout(place, kind, task)
    found = [(key_of(os.path.splitext(name)[0]), name) for name in images_in(folder)]
    images = [
        Found(key, os.path.splitext(name)[0], os.path.join(folder, name))
        for key, name in found
        if key is not None
    ]
    if not images:
        raise InputError(f"{folder}: expected {kind} images of task {task.name}, found none.")
    _refuse_twins(folder, images)
    return images


def pair_up(degraded: list[Found], place: str, task: Task, whole: bool = True) -> list[str]:
    """The path of each image's clean counterpart in a folder, or of the file that it is.

    Args:
        degraded: of `list_images`.
        place: a folder, or where there is one image, a file.
        task: for which.
        whole: whether the folder may hold no others: a mean over fewer images is of another set.
    """
    clean = {found.key: found.path for found in list_images(place, CLEAN, task)}
    if len(degraded) == 1 and not os.path.isdir(place):
        return list(clean.values())
    # as in EDSR's folders, given one by one
    suffix = f"x{task.scale}" if task.scale > 1 else ""
    keys = [
        found.key if found.key in clean else found.key.removesuffix(suffix) for found in degraded
    ]
    alone = [found.path for found, key in zip(degraded, keys) if key not in clean]
    if alone:
        raise InputError(
            f"{place}: has no counterpart of {len(alone)} of {len(degraded)} images, the first is "
            f"{alone[0]}. A clean image has the name of the degraded one"
            f"{f', which may end in {suffix} besides' if suffix else ''}."
        )
    left = sorted({*clean} - {*keys})
    if left and whole:
        raise InputError(
            f"{place}: {len(left)} of its {len(clean)} images have no degraded counterpart, the "
            f"first is {clean[left[0]]}. A mean over the others would be of another set: complete "
            "the degraded ones, or take these away."
        )
    return [clean[key] for key in keys]


def _layout(place: str, kind: str, task: Task) -> tuple[str, Callable[[str], str | None]]:
    """The folder in which the images are, and what makes a key of a name (None: not of it)."""

    def below(*parts: str) -> str:
        """A folder in it; "" where there is none."""
        path = os.path.join(place, *parts)
        return path if os.path.isdir(path) else ""

    clean, scale = kind == CLEAN, task.scale
    if clean and below("HR"):
        return below("HR"), lambda name: name
    if not clean and (below("HR") or below("LR_bicubic")):
        folder = below("LR_bicubic", f"X{scale}")
        if not folder:
            raise InputError(
                f"{place}: is laid out as EDSR's sets, and has no LR_bicubic/X{scale}: it has no "
                f"images of task {task.name}. --degrade makes them of the clean ones in HR."
            )
        return folder, lambda name: name.removesuffix(f"x{scale}")
    if scale > 1:
        folder, end = (
            below(f"image_SRF_{scale}") or place,
            f"_SRF_{scale}_{'HR' if clean else 'LR'}",
        )
        if any(os.path.splitext(name)[0].endswith(end) for name in _images(folder)):
            return folder, lambda name: name.removesuffix(end) if name.endswith(end) else None
    if task.rain:
        start = "norain-" if clean else "rain-"
        folder = below(start.rstrip("-")) or place
        if any(name.startswith(start) for name in _images(folder)):
            return folder, lambda name: name.removeprefix(start) if name.startswith(start) else None
    return place, lambda name: name


def _images(folder: str) -> list[str]:
    return [name for name in files_in(folder) if image_suffix(name)]


def _refuse_twins(folder: str, images: list[Found]) -> None:
    """Refuse images of one name but another suffix, which would be one result."""
    by_name = defaultdict(list)
    for found in images:
        by_name[found.key].append(found.path)
    for paths in by_name.values():
        if len(paths) > 1:
            raise InputError(
                f"{folder}: {' and '.join(map(os.path.basename, paths))} would be one image by "
                "their names. Rename one of them."
            )
