"""Pages: one HTML file with everything in it, which opens anywhere, offline."""

import base64
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import virtex_d2
from virtex_d2.engine.files import write_text
from virtex_d2.studies.stages import cores

# The distributions whose versions can change a result; detectron2 goes by either name.
_DISTRIBUTIONS = (
    *("torch", "torchvision", "detectron2", "pb1-detectron2", "fvcore", "numpy", "pillow"),
    *("pycocotools", "sentencepiece", "safetensors"),
)


@dataclass(frozen=True)
class Picture:
    """A PNG of the page, with the words for whoever cannot see it and the words below it."""

    path: Path
    alternative: str
    caption: str = ""


def write_page(path: Path, title: str, body: str, css: str = "") -> None:
    """Write a page, atomically.

    Args:
        title: plain text.
        body: HTML, such as `render` gives.
    """
    write_text(path, render("page.html", title=title, body=Markup(body), css=Markup(css)))


def render(template: str, **values: Any) -> Markup:
    """Fill a file of templates/; every value is escaped that is not HTML already (`Markup`)."""
    return Markup(_templates.get_template(template).render(**values))


def figure(picture: Picture) -> Markup:
    """Show the picture in HTML, its pixels inside."""
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    caption = Markup("<figcaption>{}</figcaption>").format(picture.caption)
    image = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(
        picture.alternative, data
    )
    return Markup("<figure>{}{}</figure>").format(image, caption if picture.caption else "")


def definitions(facts: Mapping[str, str]) -> Markup:
    """List names with texts in HTML."""
    row = Markup("<dt>{}</dt><dd>{}</dd>")
    return Markup("<dl>{}</dl>").format(Markup().join(row.format(*fact) for fact in facts.items()))


def machine() -> dict[str, str]:
    """Name the machine and the versions that this process sees."""
    versions = [f"virtex_d2 {virtex_d2.__version__}", f"Python {platform.python_version()}"]
    for name in _DISTRIBUTIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "Processor": f"{_processor()}, {cores()} cores usable",
        "System": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Versions": ", ".join(versions),
    }


def _processor() -> str:
    """Name the processor's model as Linux does, else as Python does."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals.update(figure=figure, definitions=definitions)
