"""The comparison as one HTML file with everything in it, which opens anywhere, offline."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path
from virtex_d2.studies.compare import figures, tables
from virtex_d2.studies.compare.runs import TASKS, Run, config_differences
from virtex_d2.studies.compare.tables import Block, Probes
from virtex_d2.studies.page import Picture, machine, render, write_page
from virtex_d2.studies.verdict import FALSE_CLAIMS

_DIFFERENCES, _CURVES = "Difference from the baseline", "Learning curves"
_CLASSES, _PREDICTIONS = "Sizes and classes", "The same images"
# Heading of each section of pictures -> the files' name, and what they show.
_SECTIONS = {
    _DIFFERENCES: (
        "differences",
        "AP of each start minus that of the baseline, with every seed and a confidence interval",
    ),
    _CURVES: ("curves", "AP of each start against iteration"),
    _CLASSES: ("classes", "AP by object size and by class minus that of the baseline"),
    _PREDICTIONS: (
        "predictions",
        "Test images with their true objects, and with the predictions of each start",
    ),
}


def write_report(
    output: Path,
    inits: Sequence[str],
    runs: Sequence[Run],
    missing: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
    *,
    root: Path = Path(),
    title: str = "Which initialisation?",
    introduction: str = "",
    probes: Sequence[Probes] = (),
    notes: Sequence[str] = (),
    sections: Mapping[str, Sequence[Picture]] | None = None,
    facts: Mapping[str, str] | None = None,
) -> tuple[Path, list[Block]]:
    """Write report.html, results.csv and summary.csv, and the pictures as PNGs.

    Args:
        output: the folder.
        inits: the starts' names, the baseline first.
        runs: the finished runs.
        missing: names of the others.
        commands: what was run, by name.
        root: where relative paths of the runs' data sets begin.
        title, introduction: of the page.
        probes: of the starts' features.
        notes: sentences on what is left out, and on test images that starts have seen before.
        sections: further pictures by heading, behind the comparison's.
        facts: further ones about what was run.

    Returns:
        The page, and what is in it.
    """
    path = output / "report.html"
    path.unlink(missing_ok=True)  # it would not speak of these runs
    if not runs:
        raise InputError(f"{output}: no run is finished yet; there is nothing to report.")
    blocks = tables.make_blocks(inits, runs)
    for name, text in (("results", tables.results_csv), ("summary", tables.summary_csv)):
        with atomic_path(output / f"{name}.csv") as temporary:
            temporary.write_text(text(blocks), encoding="utf-8", newline="")
    drawn, without_pictures = _draw(output / "pictures", blocks, root)
    body = render(
        "comparison.html",
        title=title,
        introduction=introduction,
        blocks=blocks,
        probes=probes,
        judgements=tables.judgements(blocks),
        bound=f"{100 * FALSE_CLAIMS:g}",
        notes=notes,
        metrics=_main_metrics(blocks),
        differences=[config_differences(block.all_runs) for block in blocks],
        missing=len(missing),
        without_pictures=without_pictures,
        sections={**drawn, **(sections or {})},
        facts={**_facts(runs, missing), **(facts or {}), **machine()},
        commands=commands or {},
        colors=figures.colors,
        verdicts=tables.verdicts,
        value_text=tables.value_text,
        difference_text=tables.difference_text,
    )
    write_page(path, title, body)
    return path, blocks


def _main_metrics(blocks: Sequence[Block]) -> list:
    return list(dict.fromkeys(metric for block in blocks for metric in block.main))


def _draw(
    folder: Path, blocks: Sequence[Block], root: Path
) -> tuple[dict[str, list[Picture]], list[str]]:
    """Draw the pictures of each section; the second says of which blocks there are no predictions.

    Those are of the first seed that all starts have. Data sets may be on another machine than the
    report: it is complete but for this.
    """
    folder.mkdir(exist_ok=True)
    sections: dict[str, list[Picture]] = {heading: [] for heading in _SECTIONS}
    missing = []

    def add(section: str, number: object, caption: str, draw: Callable, *what: object) -> None:
        name, alternative = _SECTIONS[section]
        path = folder / f"{name}{number}.png"
        left_out = draw(path, *what)
        more = f" {left_out} that change least are left out." if left_out else ""
        sections[section].append(Picture(path, alternative, caption + more))

    metrics = _main_metrics(blocks)
    for start in range(0, len(metrics), 2):  # a page of panels has room for two columns
        number = start // 2 if len(metrics) > 2 else ""
        columns = metrics[start : start + 2]
        if len(blocks[0].runs) > 1:
            caption = "Strokes are single seeds, the point is their mean, the line its interval."
            add(_DIFFERENCES, number, caption, figures.draw_differences, blocks, columns)
        caption = (
            "Thin lines are single seeds, the thick one is their mean. What a start is worth shows "
            "early; a long training may make up for a poor one."
        )
        add(_CURVES, number, caption, figures.draw_curves, blocks, columns)
    for number, block in enumerate(blocks):
        if len(block.complete) > 1 and block.baseline in block.complete:
            task = "segm" if any(metric.task == "segm" for metric in block.main) else "bbox"
            words = f"{block.title}, {TASKS[task]} AP. Classes without a true object are left out."
            add(_CLASSES, number, words, figures.draw_classes, block, task)
        try:
            seed, rows = figures.prediction_panels(block, root)
        except InputError as error:
            missing.append(f"{block.title}: {error}")
            continue
        caption = (
            f"{block.title}: the first test images with an object, seed {seed}; of each start as "
            "many predictions as the image has objects, those of the highest score."
        )
        add(_PREDICTIONS, number, caption, figures.draw_predictions, rows)
    return sections, missing


def _facts(runs: Sequence[Run], missing: Sequence[str]) -> dict[str, str]:
    unit = "GPU hours" if all(run.device.startswith("cuda") for run in runs) else "process hours"
    unknown = "" if all(run.processes for run in runs) else ", logs that name no processes as one"
    hours = sum(run.cost for run in runs)
    return {
        "Runs": f"{len(runs)} finished" + (f", {len(missing)} not" if missing else ""),
        "Cost": f"{hours:.2f} {unit} of training, evaluations not counted{unknown}",
        "Trained on": ", ".join(sorted({run.device for run in runs})),
    }
