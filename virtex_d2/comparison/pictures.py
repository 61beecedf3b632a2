"""The same images with the predictions of every start beside the truth."""

from collections.abc import Sequence
from pathlib import Path

from virtex_d2.reporting.page import Picture

from .tables import Block


def draw(folder: Path, blocks: Sequence[Block]) -> list[Picture]:
    return []


def note(blocks: Sequence[Block]) -> str:
    return ""
