"""A contact sheet of the synthetic world: images, the outlines of their masks, their captions."""

import os
import textwrap
import uuid
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.shapes.options import MOST_OBJECTS
from virtex_d2.studies.shapes.world import render

_COLUMNS = 4


def draw_contact_sheet(
    path: str | os.PathLike,
    seed: int,
    size: int = 128,
    max_objects: int = MOST_OBJECTS,
    count: int = 12,
) -> None:
    """Draw the first `count` scenes of a world into a PNG, whose folder is made where absent."""
    rows = -(-count // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(4.2 * _COLUMNS, 5.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, axis in zip(range(count), axes.flat):
        scene = render(seed, index, size, max_objects)
        axis.imshow(scene.image)
        for item in scene.objects:
            axis.contour(item.mask, levels=[0.5], colors="white", linewidths=2.2)
            axis.contour(item.mask, levels=[0.5], colors="black", linewidths=0.9)
        text = "\n".join(_wrapped(f"- {caption.text}") for caption in scene.captions)
        axis.text(0, size * 1.02, text, va="top", fontsize=7.5, family="monospace")
    figure.subplots_adjust(
        left=0.01, right=0.99, top=0.99, bottom=0.42 / rows, hspace=0.45, wspace=0.06
    )
    try:
        _save(figure, Path(path))
    except OSError as error:
        raise InputError(f"{path}: cannot write the contact sheet ({error.strerror}).") from error
    finally:
        plt.close(figure)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}.png")
    try:
        figure.savefig(temporary, dpi=90)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _wrapped(text: str, width: int = 58) -> str:
    return textwrap.fill(text, width, subsequent_indent="  ")
