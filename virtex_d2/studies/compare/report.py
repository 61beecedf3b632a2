"""The comparison as one HTML file with everything in it, which opens anywhere, offline."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from virtex_d2.studies.compare.figures import colors
from virtex_d2.studies.compare.runs import Metric, Run, config_differences
from virtex_d2.studies.compare.statistics import summarise
from virtex_d2.studies.compare.tables import Block, difference_text, value_text, verdict
from virtex_d2.studies.reporting.page import Picture, definitions, figure, machine, write_page

_CSS = """
.scroll { overflow-x: auto; }
.scroll td, .scroll th { font-size: 14px; padding-right: 0; }
.scroll td.n, .scroll th.n { padding-left: 16px; }
.diff { display: block; font-size: 12px; color: var(--muted); font-weight: 400; }
td.name { font-weight: 600; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--muted); font-size: 14px; }
"""


def write_report(
    path: Path,
    blocks: Sequence[Block],
    pictures: Mapping[str, Sequence[Picture]],
    missing: Sequence[str],
    commands: Mapping[str, str],
    note: str = "",
) -> None:
    """Write the report, atomically.

    Args:
        path: of the HTML file.
        blocks: the finished runs.
        pictures: of the sections "differences", "curves", "classes" and "predictions".
        missing: names of runs that are not finished.
        commands: of runs that this comparison made, by their names.
        note: HTML below the heading, for what pictures cannot show.
    """
    body = [
        _heading(blocks, missing),
        note,
        *_section("Difference from the baseline", pictures["differences"]),
        "<h2>Average precision</h2>",
        *(_table(block) for block in blocks),
        *_section("Learning curves", pictures["curves"]),
        *_section("Sizes and classes", pictures["classes"]),
        *_section("The same images", pictures["predictions"]),
        "<h2>What was run</h2>",
        _facts(blocks, missing),
        _seeds(blocks),
        *(_differences(block) for block in blocks),
        _commands(commands),
    ]
    write_page(path, "Which initialisation?", "\n".join(filter(None, body)), _CSS)


def _heading(blocks: Sequence[Block], missing: Sequence[str]) -> str:
    sentences = [
        f"<p><b>{escape(block.title)}</b></p><ul>"
        + "".join(
            f"<li>{escape(verdict(block, init, metric))}</li>"
            for init in list(block.complete)
            if init != block.baseline
            for metric in block.main
        )
        + "</ul>"
        for block in blocks
    ]
    incomplete = (
        f"<p><b>{len(missing)} {'run is' if len(missing) == 1 else 'runs are'} not finished; the "
        "same command goes on with what is missing.</b></p>"
        if missing
        else ""
    )
    return (
        "<h1>Which initialisation?</h1>"
        f'<p class="muted">{_sameness(blocks)} AP in percent. Intervals are of the mean '
        "paired difference (Student's t, 95 %): with few seeds they are wide, and should be.</p>"
        + incomplete
        + "".join(sentences)
    )


def _sameness(blocks: Sequence[Block]) -> str:
    if any(_config_differences(block) for block in blocks):
        return (
            "Detectors trained from different starts. <b>Their configs differ in more than the "
            "start; the keys are at the end of this page.</b>"
        )
    return (
        "The same detectors, trained from different starts: same images, order, augmentation and "
        "length for equal seeds."
    )


def _config_differences(block: Block) -> dict[str, dict[str, str]]:
    return config_differences(run for runs in block.runs.values() for run in runs.values())


def _section(title: str, pictures: Sequence[Picture]) -> list[str]:
    return [f"<h2>{title}</h2>", *map(figure, pictures)] if pictures else []


def _table(block: Block) -> str:
    head = "".join(f'<th class="n">{escape(metric.label)}</th>' for metric in block.averages)
    rows = []
    for init, color in colors(list(block.runs)).items():
        cells = "".join(_cell(block, init, metric) for metric in block.averages)
        rows.append(
            f'<tr><td class="name" style="color: {color}">{escape(init)}</td>'
            f'<td class="n">{len(block.runs[init])}</td>{cells}</tr>'
        )
    return (
        f"<p><b>{escape(block.title)}</b></p>"
        f'<div class="scroll"><table><tr><th></th><th class="n">seeds</th>{head}</tr>'
        f'{"".join(rows)}</table></div><p class="muted">Mean ± sample standard deviation over '
        f"seeds; below it the mean paired difference from {escape(block.baseline)} with its 95 % "
        "interval.</p>"
    )


def _cell(block: Block, init: str, metric: Metric) -> str:
    text = value_text(block.summary(init, metric))
    if init != block.baseline and block.runs[init]:
        diff = difference_text(block.difference(init, metric))
        text += f'<span class="diff">{escape(diff)}</span>'
    return f'<td class="n">{text}</td>'


def _facts(blocks: Sequence[Block], missing: Sequence[str]) -> str:
    runs = [run for block in blocks for found in block.runs.values() for run in found.values()]
    facts = {
        "Runs": f"{len(runs)} finished" + (f", {len(missing)} not" if missing else ""),
        "Cost": _cost(runs),
        "Trained on": ", ".join(sorted({run.device for run in runs})),
        **{f"{name} of this report": text for name, text in machine().items()},
    }
    return definitions(facts)


def _cost(runs: Sequence[Run]) -> str:
    hours = sum(run.hours * (run.processes or 1) for run in runs)
    unit = "GPU hours" if all(run.device.startswith("cuda") for run in runs) else "process hours"
    unknown = "" if all(run.processes for run in runs) else ", logs that name no processes as one"
    return f"{hours:.2f} {unit} of training, evaluations not counted{unknown}"


def _seeds(blocks: Sequence[Block]) -> str:
    """Every run by itself: nobody should have to believe a mean."""
    rows = []
    metrics = list(dict.fromkeys(metric for block in blocks for metric in block.main))
    for block in blocks:
        for init, runs in block.runs.items():
            for seed, run in sorted(runs.items()):
                cells = "".join(
                    f'<td class="n">{value_text(summarise({seed: run.results[metric]}))}</td>'
                    if metric in run.results
                    else '<td class="n"></td>'
                    for metric in metrics
                )
                hours = run.hours * (run.processes or 1)
                rows.append(
                    f"<tr><td>{escape(block.title)}</td><td>{escape(init)}</td>"
                    f'<td class="n">{seed}</td>{cells}<td class="n">{run.iterations}</td>'
                    f'<td class="n">{hours:.2f}</td></tr>'
                )
    head = "".join(f'<th class="n">{escape(metric.label)}</th>' for metric in metrics)
    return (
        "<details><summary>Every run</summary><div class=scroll><table><tr><th></th><th>start</th>"
        f'<th class="n">seed</th>{head}<th class="n">iterations</th><th class="n">hours</th></tr>'
        f"{''.join(rows)}</table></div></details>"
    )


def _differences(block: Block) -> str:
    """Where the starts' configs differ: it is not only the weights that are compared then."""
    found = _config_differences(block)
    if not found:
        return (
            f'<p class="muted">{escape(block.title)}: the runs\' configs differ in nothing but '
            "start, seed and folder.</p>"
        )
    head = "".join(f"<th>{escape(init)}</th>" for init in block.complete)
    rows = "".join(
        f"<tr><td>{escape(key)}</td>"
        + "".join(f"<td>{escape(values[init])}</td>" for init in block.complete)
        + "</tr>"
        for key, values in found.items()
    )
    return (
        f"<p><b>{escape(block.title)}: the starts differ in more than their weights.</b></p>"
        f'<div class="scroll"><table><tr><th>key</th>{head}</tr>{rows}</table></div>'
    )


def _commands(commands: Mapping[str, str]) -> str:
    parts = "".join(
        f'<div class="stage">{escape(name)}</div><pre>{escape(command)}</pre>'
        for name, command in commands.items()
    )
    return f"<details><summary>Commands</summary>{parts}</details>" if commands else ""
