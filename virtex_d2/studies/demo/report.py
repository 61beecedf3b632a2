"""The report: one HTML file with everything in it, which opens anywhere, offline."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from virtex_d2.studies.demo.figures import COLORS, LABELS
from virtex_d2.studies.demo.plan import DETECT_CONFIG, IMAGE_SIZE, PRETRAIN_CONFIG, Plan
from virtex_d2.studies.demo.results import MAIN_METRICS, METRICS, Comparison, table, verdict
from virtex_d2.studies.pipeline.progress import clock
from virtex_d2.studies.pipeline.runner import elapsed
from virtex_d2.studies.reporting.metrics import mean_and_spread
from virtex_d2.studies.reporting.page import Picture, definitions, figure, machine, write_page

_CSS = f"""
:root {{ --random: {COLORS["random"]}; --pretrained: {COLORS["pretrained"]}; }}
.random {{ color: var(--random); }} .pretrained {{ color: var(--pretrained); }}
"""


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
        markers: of every stage, as `pipeline.runner.run_stages` returns them.
        devices: where the training ran, e.g. ["cpu"].
    """
    body = "\n".join(
        [
            _heading(comparisons),
            "<h2>Average precision</h2>",
            _table(comparisons),
            _seeds_table(plan, comparisons),
            figure(pictures["detectors"]),
            "<h2>Predicted masks on held-out images</h2>",
            figure(pictures["masks"]),
            "<h2>Caption pretraining</h2>",
            figure(pictures["captions"]),
            figure(pictures["pretraining"]),
            "<h2>What was measured</h2>",
            _facts(plan, markers, devices),
            "<h2>Commands</h2>",
            _commands(plan, markers),
        ]
    )
    write_page(path, "From captions to a detector", body, _CSS)


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
        "Time": f"{clock(elapsed(plan.stages, markers))} for all stages; detectors run two at a "
        "time",
        "Trained on": ", ".join(devices),
        **machine(),
    }
    return definitions(facts)


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
