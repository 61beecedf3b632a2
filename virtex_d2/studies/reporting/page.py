"""Pages: one HTML file with everything in it, which opens anywhere, offline."""

import base64
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import virtex_d2
from virtex_d2.engine.files import atomic_path
from virtex_d2.studies.pipeline.process import cores

# The distributions whose versions can change a result; detectron2 goes by either name.
_DISTRIBUTIONS = (
    *("torch", "torchvision", "detectron2", "pb1-detectron2", "fvcore", "numpy", "pillow"),
    *("pycocotools", "sentencepiece", "safetensors"),
)

_CSS = """
:root { color-scheme: light; --ink: #202124; --muted: #5f6368; --rule: #e4e6e9; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 8px; }
h2 { font-size: 19px; margin: 52px 0 6px; padding-top: 20px; border-top: 1px solid var(--rule); }
p { margin: 8px 0; max-width: 74ch; }
.muted, figcaption { color: var(--muted); font-size: 14px; }
.numbers { display: flex; flex-wrap: wrap; gap: 16px 64px; margin: 26px 0 14px; }
.numbers .name { font-weight: 600; font-size: 14px; color: var(--muted); }
.numbers .pair { font-size: 34px; font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.numbers .pair small { font-size: 20px; color: #9aa0a6; font-weight: 400; padding: 0 8px; }
.numbers .lead { font-size: 14px; color: var(--muted); }
table { border-collapse: collapse; margin: 14px 0; font-size: 15px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 28px 6px 0; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { font-weight: 600; font-size: 14px; }
td.n, th.n { text-align: right; padding: 6px 0 6px 28px; white-space: nowrap; }
tr.main td { font-weight: 600; }
figure { margin: 14px 0 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: 6px; max-width: 90ch; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 24px; margin: 14px 0;
  font-size: 15px; }
dt { color: var(--muted); } dd { margin: 0; }
pre { background: #f6f7f8; border-radius: 6px; padding: 10px 14px; margin: 4px 0 14px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.stage { margin-top: 14px; font-size: 14px; display: flex; justify-content: space-between; }
@media (max-width: 640px) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG of the report, with the words for whoever cannot see it and the words below it."""

    path: Path
    alternative: str
    caption: str = ""


def machine() -> dict[str, str]:
    """The machine and the versions that this process sees; {"Processor": ..., "Versions": ...}."""
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


def write_page(path: Path, title: str, body: str, css: str = "") -> None:
    """Write a page, atomically.

    Args:
        path: of the HTML file.
        title: plain text.
        body: HTML.
        css: rules in addition to those of all pages.
    """
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}{css}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def figure(picture: Picture) -> str:
    """The picture as HTML, its pixels inside."""
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f'<figure><img alt="{escape(picture.alternative)}" src="data:image/png;base64,{data}">'
        f"{caption}</figure>"
    )


def definitions(facts: Mapping[str, str]) -> str:
    """Names with texts as an HTML list."""
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()
    )
    return f"<dl>{rows}</dl>"


def _processor() -> str:
    """The processor's model as Linux names it, else what Python knows."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
