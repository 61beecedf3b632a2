"""The report: one HTML file with everything in it, which opens anywhere, offline."""

import base64
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import virtex_d2
from virtex_d2.runtime.files import atomic_path

from .figures import COLORS, LABELS
from .plan import DETECT_CONFIG, IMAGE_SIZE, PRETRAIN_CONFIG, Plan
from .progress import clock
from .results import MAIN_METRICS, METRICS, Comparison, mean_and_spread, table, verdict
from .runner import cores, elapsed

# The distributions whose versions can change a result; detectron2 goes by either name.
_DISTRIBUTIONS = (
    *("torch", "torchvision", "detectron2", "pb1-detectron2", "fvcore", "numpy", "pillow"),
    *("pycocotools", "sentencepiece", "safetensors"),
)

_CSS = f"""
:root {{ color-scheme: light; --ink: #202124; --muted: #5f6368; --rule: #e4e6e9;
  --random: {COLORS["random"]}; --pretrained: {COLORS["pretrained"]}; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }}
main {{ max-width: 1000px; margin: 0 auto; padding: 48px 24px 72px; }}
h1 {{ font-size: 30px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 8px; }}
h2 {{ font-size: 19px; margin: 52px 0 6px; padding-top: 20px; border-top: 1px solid var(--rule); }}
p {{ margin: 8px 0; max-width: 74ch; }}
.muted, figcaption {{ color: var(--muted); font-size: 14px; }}
.random {{ color: var(--random); }} .pretrained {{ color: var(--pretrained); }}
.numbers {{ display: flex; flex-wrap: wrap; gap: 16px 64px; margin: 26px 0 14px; }}
.numbers .name {{ font-weight: 600; font-size: 14px; color: var(--muted); }}
.numbers .pair {{ font-size: 34px; font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }}
.numbers .pair small {{ font-size: 20px; color: #9aa0a6; font-weight: 400; padding: 0 8px; }}
.numbers .lead {{ font-size: 14px; color: var(--muted); }}
table {{ border-collapse: collapse; margin: 14px 0; font-size: 15px;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: 6px 28px 6px 0; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; }}
th {{ font-weight: 600; font-size: 14px; }}
td.n, th.n {{ text-align: right; padding: 6px 0 6px 28px; white-space: nowrap; }}
tr.main td {{ font-weight: 600; }}
figure {{ margin: 14px 0 0; }} figure img {{ width: 100%; height: auto; display: block; }}
figcaption {{ margin-top: 6px; max-width: 90ch; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 5px 24px; margin: 14px 0;
  font-size: 15px; }}
dt {{ color: var(--muted); }} dd {{ margin: 0; }}
pre {{ background: #f6f7f8; border-radius: 6px; padding: 10px 14px; margin: 4px 0 14px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
.stage {{ margin-top: 14px; font-size: 14px; display: flex; justify-content: space-between; }}
@media (max-width: 640px) {{
  dl {{ grid-template-columns: 1fr; gap: 0; }} dd {{ margin-bottom: 8px; }} }}
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


def write_report(
    path: Path,
    plan: Plan,
    comparisons: Sequence[Comparison],
    pictures: Mapping[str, Picture],
    markers: Mapping[str, Mapping[str, Any]],
    devices: Sequence[str],
) -> None:
    """Write the report, atomically.

    Args:
        path: of the HTML file.
        plan: what ran.
        comparisons: of the starts, all metrics.
        pictures: by name: "detectors", "masks", "pretraining", "captions".
        markers: of every stage, as `runner.run_plan` returns them.
        devices: where the training ran, e.g. ["cpu"].
    """
    body = "\n".join(
        [
            _heading(comparisons),
            "<h2>Average precision</h2>",
            _table(comparisons),
            _seeds_table(plan, comparisons),
            _figure(pictures["detectors"]),
            "<h2>Predicted masks on held-out images</h2>",
            _figure(pictures["masks"]),
            "<h2>Caption pretraining</h2>",
            _figure(pictures["captions"]),
            _figure(pictures["pretraining"]),
            "<h2>What was measured</h2>",
            _facts(plan, markers, devices),
            "<h2>Commands</h2>",
            _commands(plan, markers),
        ]
    )
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>From captions to a detector</title><style>{_CSS}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _heading(comparisons: Sequence[Comparison]) -> str:
    numbers = "".join(
        f'<div><div class="name">{METRICS[row.metric]}</div><div class="pair">'
        f'<span class="random">{mean_and_spread(row.random)}</span><small>&rarr;</small>'
        f'<span class="pretrained">{mean_and_spread(row.pretrained)}</span></div>'
        f'<div class="lead">difference {mean_and_spread(row.differences, signed=True)}</div></div>'
        for row in comparisons
        if row.metric in MAIN_METRICS
    )
    return (
        "<h1>From captions to a detector</h1>"
        '<p class="muted">A ResNet-50 learns from captioned images of a synthetic world, without a '
        "single box or class label. It then starts a Mask R-CNN, against the same "
        'detector started <b class="random">at random</b>. '
        "AP is COCO's, in percent, on images that neither has seen.</p>"
        f'<div class="numbers">{numbers}</div>'
        + "".join(
            f"<p>{escape(verdict(row))}</p>" for row in comparisons if row.metric in MAIN_METRICS
        )
    )


def _table(comparisons: Sequence[Comparison]) -> str:
    rows = "".join(
        f"<tr{' class=main' if row.metric in MAIN_METRICS else ''}><td>{text[0]}</td>"
        + "".join(f'<td class="n">{cell}</td>' for cell in text[1:])
        + "</tr>"
        for row, text in zip(comparisons, table(comparisons))
    )
    seeds = len(comparisons[0].random)
    note = (
        f"Mean ± sample standard deviation over {seeds} seeds; differences are paired by seed."
        if seeds > 1
        else "One seed, so without a spread. <code>make demo DEMO_SEEDS=3</code> adds two more."
    )
    return (
        f'<table><tr><th></th><th class="n random">{LABELS["random"]}</th>'
        f'<th class="n pretrained">{LABELS["pretrained"]}</th><th class="n">difference</th></tr>'
        f'{rows}</table><p class="muted">{note}</p>'
    )


def _seeds_table(plan: Plan, comparisons: Sequence[Comparison]) -> str:
    if len(plan.seeds) < 2:
        return ""
    main = [row for row in comparisons if row.metric in MAIN_METRICS]
    head = "".join(
        f'<th class="n random">{METRICS[row.metric]}</th>'
        f'<th class="n pretrained">{METRICS[row.metric]}</th><th class="n">difference</th>'
        for row in main
    )
    rows = "".join(
        f"<tr><td>Seed {seed}</td>"
        + "".join(
            f'<td class="n">{row.random[i]:.1f}</td><td class="n">{row.pretrained[i]:.1f}</td>'
            f'<td class="n">{row.differences[i]:+.1f}</td>'
            for row in main
        )
        + "</tr>"
        for i, seed in enumerate(plan.seeds)
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f'<figure><img alt="{escape(picture.alternative)}" src="data:image/png;base64,{data}">'
        f"{caption}</figure>"
    )


def _facts(plan: Plan, markers: Mapping[str, Mapping[str, Any]], devices: Sequence[str]) -> str:
    budget = plan.budget
    facts = {
        "World": f"{budget.caption_images} captioned images for pretraining; "
        f"{budget.labelled_images} labelled ones for the detectors; {budget.test_images} held out, "
        f"for AP and for the captions' validation loss; {IMAGE_SIZE} px each, disjoint",
        "Pretraining": f"{budget.pretrain.iterations} iterations of "
        f"{budget.pretrain.images_per_batch} images ({PRETRAIN_CONFIG})",
        "Detectors": f"{budget.detect.iterations} iterations of {budget.detect.images_per_batch} "
        f"images, the same for both starts ({DETECT_CONFIG})",
        "Seeds": f"{', '.join(map(str, plan.seeds))}. A seed sets initialisation, order and "
        "augmentation of the pretraining and of both detectors; the images are the same for all",
        "Scale": f"{budget.scale:g} (DEMO_SCALE)",
        "Time": f"{clock(elapsed(plan, markers))} for all stages; detectors run two at a time",
        "Trained on": ", ".join(devices),
        **machine(),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{rows}</dl>"


def _commands(plan: Plan, markers: Mapping[str, Mapping[str, Any]]) -> str:
    parts = ['<p class="muted">From the project\'s folder.</p>']
    for stage in plan.stages:
        marker = markers[stage.name]
        parts.append(
            f'<div class="stage"><span>{escape(stage.title)}</span>'
            f'<span class="muted">{clock(marker["seconds"])}</span></div>'
            f"<pre>OMP_NUM_THREADS={escape(marker['threads'])} {escape(marker['command'])}</pre>"
        )
    return "\n".join(parts)


def _processor() -> str:
    """The processor's model as Linux names it, else what Python knows."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
