"""The comparison's numbers: rows for people, and CSV for programs."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virtex_d2.engine.files import atomic_path
from virtex_d2.studies.compare.plan import percent
from virtex_d2.studies.compare.runs import AVERAGES, Metric, Run
from virtex_d2.studies.compare.statistics import Difference, Summary, difference, summarise

SIZES = ("APs", "APm", "APl")
FREQUENCIES = ("APr", "APc", "APf")


@dataclass(frozen=True)
class Block:
    """The runs of one config at one fraction of the images.

    Attributes:
        config, fraction: as in `Cell`.
        runs: by start's name, in the plan's order (the baseline first), then by seed. A start
            without a finished run has an empty dict.
    """

    config: str
    fraction: float
    runs: Mapping[str, Mapping[int, Run]]

    @property
    def title(self) -> str:
        """For people: "mask_rcnn_R_50_FPN_2x, 10 % of the images"."""
        return f"{self.config}, {self.part}"

    @property
    def part(self) -> str:
        """The fraction alone: "10 % of the images"."""
        return f"{percent(self.fraction)} % of the images"

    @property
    def baseline(self) -> str:
        """The start that the others are compared with."""
        return next(iter(self.runs))

    @property
    def complete(self) -> dict[str, Mapping[int, Run]]:
        """The starts that have a finished run."""
        return {init: runs for init, runs in self.runs.items() if runs}

    @property
    def metrics(self) -> list[Metric]:
        """Those that any run has, in a reader's order: averages first, box before mask."""
        found = {m for runs in self.runs.values() for run in runs.values() for m in run.results}
        return sorted(found, key=_order)

    @property
    def averages(self) -> list[Metric]:
        """AP, AP50 and AP75 of every task."""
        return [metric for metric in self.metrics if metric.name in AVERAGES]

    @property
    def main(self) -> list[Metric]:
        """The AP of every task."""
        return [metric for metric in self.averages if metric.name == "AP"]

    def values(self, init: str, metric: Metric) -> dict[int, float]:
        """A result by seed."""
        return {
            seed: run.results[metric]
            for seed, run in self.runs[init].items()
            if metric in run.results
        }

    def summary(self, init: str, metric: Metric) -> Summary:
        """Mean and spread over the seeds."""
        return summarise(self.values(init, metric))

    def difference(self, init: str, metric: Metric) -> Difference:
        """From the baseline, paired by seed."""
        return difference(self.values(init, metric), self.values(self.baseline, metric))


def make_blocks(inits: Sequence[str], runs: Iterable[Run]) -> list[Block]:
    """Runs in blocks of one config and fraction, in the order in which they come."""
    blocks: dict[tuple[str, float], dict[str, dict[int, Run]]] = {}
    for run in runs:
        block = blocks.setdefault(
            (run.cell.config, run.cell.fraction), {init: {} for init in inits}
        )
        block[run.cell.init][run.cell.seed] = run
    return [Block(config, fraction, found) for (config, fraction), found in blocks.items()]


def results_csv(blocks: Iterable[Block]) -> str:
    """Every result of every run, one a line; an empty value where there was nothing to measure."""
    rows = [
        (
            *(block.config, block.fraction, init, seed, run.iterations, metric.key),
            _number(value),
        )
        for block in blocks
        for init, runs in block.runs.items()
        for seed, run in sorted(runs.items())
        for metric, value in sorted(run.results.items())
    ]
    return _csv(("config", "fraction", "init", "seed", "iterations", "metric", "value"), rows)


def summary_csv(blocks: Iterable[Block]) -> str:
    """Mean, spread and difference from the baseline of every result over the seeds."""
    rows = []
    for block in blocks:
        for init in block.complete:
            for metric in block.metrics:
                summary, diff = block.summary(init, metric), block.difference(init, metric)
                low, high = diff.interval or (math.nan, math.nan)
                deviation = math.nan if summary.deviation is None else summary.deviation
                numbers = (summary.mean, deviation, diff.mean, low, high)
                rows.append(
                    (
                        *(block.config, block.fraction, init, metric.key, len(summary.values)),
                        *map(_number, numbers if init != block.baseline else numbers[:2]),
                        *([""] * 3 if init == block.baseline else []),
                        "" if init == block.baseline else len(diff.values),
                    )
                )
    head = ("config", "fraction", "init", "metric", "seeds", "mean", "standard_deviation")
    return _csv((*head, "difference", "ci95_low", "ci95_high", "paired_seeds"), rows)


def write_text(path: Path, text: str) -> None:
    """Write a file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def value_text(summary: Summary) -> str:
    """ "12.3 ± 0.4", "12.3" for one seed, "n/a" for none."""
    if not summary.values:
        return "n/a"
    spread = "" if summary.deviation is None else f" ± {summary.deviation:.1f}"
    return f"{summary.mean:.1f}{spread}"


def difference_text(diff: Difference) -> str:
    """ "+1.2 [-0.3, 2.7]", "+1.2" for one seed, "n/a" for none."""
    if not diff.values:
        return "n/a"
    interval = (
        ""
        if diff.interval is None
        else f" [{_signed(diff.interval[0])}, {_signed(diff.interval[1])}]"
    )
    return f"{_signed(diff.mean)}{interval}"


def _signed(value: float) -> str:
    """One decimal; what rounds to zero has no sign."""
    return f"{value:+.1f}" if round(value, 1) else "0.0"


def verdict(block: Block, init: str, metric: Metric) -> str:
    """What one difference says, in a sentence; as ready to say that there is none."""
    diff = block.difference(init, metric)
    if not diff.values:
        return f"{metric.label}: {init} and {block.baseline} share no finished seed."
    size = f"{metric.label}: {init} is {abs(diff.mean):.1f} points "
    size += "ahead of" if diff.mean > 0 else "behind"
    if round(diff.mean, 1) == 0:
        return (
            f"{metric.label}: no difference of a tenth of a point between {init} and "
            f"{block.baseline}."
        )
    sentence = f"{size} {block.baseline}"
    count = len(diff.values)
    if diff.interval is None:
        return f"{sentence} (one seed: noise may be larger)."
    low, high = diff.interval
    what = "more than noise explains" if diff.decided else "within what noise alone may give"
    return (
        f"{sentence} over {count} seeds, 95 % interval {low:+.1f} to {high:+.1f}: {what}; better "
        f"in {diff.ahead} of {count} seeds."
    )


def text_table(blocks: Iterable[Block]) -> str:
    """The averages of all blocks for a terminal."""
    parts = []
    for block in blocks:
        rows = [("", *(metric.label for metric in block.averages))]
        for init in block.runs:
            rows.append((init, *(value_text(block.summary(init, m)) for m in block.averages)))
            if init != block.baseline and block.runs[init]:
                rows.append(
                    (
                        f"  against {block.baseline}",
                        *(difference_text(block.difference(init, m)) for m in block.averages),
                    )
                )
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        parts.append("\n".join([block.title, *lines]))
    return "\n\n".join(parts)


def _order(metric: Metric) -> tuple:
    names = (*AVERAGES, *SIZES, *FREQUENCIES)
    rank = names.index(metric.name) if metric.name in names else len(names)
    return (metric.data, metric.kind, metric.task, rank, metric.name)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()
