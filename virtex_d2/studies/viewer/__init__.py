"""Pictures of objects on images: the truth, predictions, and where the two agree.

    matching.py   objects, and predictions matched to them as COCO's evaluation does
    drawing.py    objects on an image, with labels that can be read; images side by side
    results.py    predictions from files or of a detector
    gallery.py    pictures and one HTML page of them
    main.py       the command line of tools/visualize_results.py

For others: `Instance`, `match`, `draw_instances`.
"""

from importlib import import_module
from typing import Any

_HOMES = {"Instance": "matching", "match": "matching", "draw_instances": "drawing"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: main.py's --help answers at once."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
