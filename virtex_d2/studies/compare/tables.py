"""The comparison's numbers: means and paired differences, rows for people, CSV for programs."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from virtex_d2.studies.compare.runs import AVERAGES, Metric, Run, percent
from virtex_d2.studies.verdict import Sample, difference, sample

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
    def all_runs(self) -> list[Run]:
        """The runs of all starts."""
        return [run for runs in self.runs.values() for run in runs.values()]

    @property
    def metrics(self) -> list[Metric]:
        """Those that any run has, in a reader's order: averages first, box before mask."""
        return sorted({metric for run in self.all_runs for metric in run.results}, key=_order)

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

    def sample(self, init: str, metric: Metric) -> Sample:
        """Mean and spread over the seeds."""
        return sample(self.values(init, metric))

    def difference(self, init: str, metric: Metric) -> Sample:
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
    """List every result of every run; an empty value where there was nothing to measure."""
    rows = [
        (block.config, block.fraction, init, seed, run.iterations, metric.key, _number(value))
        for block in blocks
        for init, runs in block.runs.items()
        for seed, run in sorted(runs.items())
        for metric, value in sorted(run.results.items())
    ]
    return _csv(("config", "fraction", "init", "seed", "iterations", "metric", "value"), rows)


def summary_csv(blocks: Iterable[Block]) -> str:
    """List mean, spread and difference from the baseline of every result over the seeds."""
    head = ("config", "fraction", "init", "metric", "seeds", "mean", "standard_deviation")
    head += ("difference", "ci95_low", "ci95_high", "paired_seeds")
    rows = []
    for block in blocks:
        for init in block.complete:
            for metric in block.metrics:
                own, diff = block.sample(init, metric), block.difference(init, metric)
                row = [block.config, block.fraction, init, metric.key, len(own.values)]
                row += [_number(own.mean), _number(own.deviation)]
                bounds = diff.interval or (math.nan, math.nan)
                compared = [*map(_number, (diff.mean, *bounds)), len(diff.values)]
                rows.append([*row, *(compared if init != block.baseline else [""] * 4)])
    return _csv(head, rows)


def value_text(values: Sample) -> str:
    """ "12.3 ± 0.4", "12.3" for one seed, "n/a" for none."""
    if not values.values:
        return "n/a"
    spread = f" ± {values.deviation:.1f}" if len(values.values) > 1 else ""
    return f"{values.mean:.1f}{spread}"


def difference_text(diff: Sample) -> str:
    """ "+1.2 [-0.3, +2.7]", "+1.2" for one seed, "n/a" for none."""
    if not diff.values:
        return "n/a"
    interval = f" [{', '.join(map(_signed, diff.interval))}]" if diff.interval else ""
    return _signed(diff.mean) + interval


def _signed(value: float) -> str:
    """Give one decimal; what rounds to zero has no sign."""
    return f"{value:+.1f}" if round(value, 1) else "0.0"


def verdict(block: Block, init: str, metric: Metric) -> str:
    """Say in a sentence what a difference is worth; as ready to say that there is none."""
    diff, count = block.difference(init, metric), len(block.difference(init, metric).values)
    if not diff.values:
        return f"{metric.label}: {init} and {block.baseline} share no finished seed."
    if round(diff.mean, 1) == 0:
        return (
            f"{metric.label}: no difference of a tenth of a point between {init} and "
            f"{block.baseline}."
        )
    sentence = (
        f"{metric.label}: {init} is {abs(diff.mean):.1f} points "
        f"{'ahead of' if diff.mean > 0 else 'behind'} {block.baseline}"
    )
    if diff.interval is None:
        return f"{sentence} (one seed: noise may be larger)."
    low, high = diff.interval
    what = "more than noise explains" if diff.decided else "within what noise alone may give"
    return (
        f"{sentence} over {count} seeds, 95 % interval {low:+.1f} to {high:+.1f}: {what}; better "
        f"in {diff.ahead} of {count} seeds."
    )


def verdicts(block: Block) -> list[str]:
    """Give the sentences about the AP of every task and start."""
    others = [init for init in block.complete if init != block.baseline]
    return [verdict(block, init, metric) for init in others for metric in block.main]


def text_table(blocks: Iterable[Block]) -> str:
    """Lay the averages of all blocks out for a terminal."""
    parts = []
    for block in blocks:
        rows = [("", *(metric.label for metric in block.averages))]
        for init, runs in block.runs.items():
            rows.append((init, *(value_text(block.sample(init, m)) for m in block.averages)))
            if init != block.baseline and runs:
                diffs = (difference_text(block.difference(init, m)) for m in block.averages)
                rows.append((f"- against {block.baseline}", *diffs))
        align = ("left", *["right"] * len(block.averages))
        table = tabulate(rows, tablefmt="plain", colalign=align, disable_numparse=True)
        parts.append(f"{block.title}\n{table}")
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
