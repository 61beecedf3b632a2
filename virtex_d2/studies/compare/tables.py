"""The comparison's numbers: means and paired differences, rows for people, CSV for programs."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tabulate import tabulate

from virtex_d2.studies.compare.runs import AREA, AVERAGES, Metric, Run, percent
from virtex_d2.studies.verdict import POWER, Sample, Verdict, difference, judge, sample

SIZES = ("APs", "APm", "APl")
FREQUENCIES = ("APr", "APc", "APf")


@dataclass(frozen=True)
class Block:
    """The runs of one config at one fraction of the images.

    Attributes:
        config, fraction: as in `Cell`.
        runs: by start's name, in the plan's order (the baseline first), then by seed. A start
            without a finished run has an empty dict.
        step: as in `Cell`.
    """

    config: str
    fraction: float
    runs: Mapping[str, Mapping[int, Run]]
    step: str = ""

    @property
    def name(self) -> str:
        """For programs."""
        return f"{self.config}-{self.step}" if self.step else self.config

    @property
    def title(self) -> str:
        """For people: "mask_rcnn_R_50_FPN_2x, 10 % of the images"."""
        return ", ".join([self.config, self.part, *(["frozen backbone"] if self.step else [])])

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
        """AP, AP50, AP75 and AP over the run of every task."""
        return [metric for metric in self.metrics if metric.name in (*AVERAGES, AREA)]

    @property
    def main(self) -> list[Metric]:
        """The AP of every task."""
        return [metric for metric in self.averages if metric.name == "AP"]

    @property
    def decisive(self) -> Metric:
        """The measure of the verdict: box AP (of the first test set) over the run."""
        return replace(self.main[0], name=AREA)

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
    blocks: dict[tuple[str, float, str], dict[str, dict[int, Run]]] = {}
    for run in runs:
        place = (run.cell.config, run.cell.fraction, run.cell.step)
        blocks.setdefault(place, {init: {} for init in inits})[run.cell.init][run.cell.seed] = run
    return [Block(place[0], place[1], found, place[2]) for place, found in blocks.items()]


@dataclass(frozen=True)
class Probes:
    """Linear SVMs on the frozen features of one config's starts, at one fraction of the images.

    Attributes:
        config, fraction: as in `Cell`.
        results: by start (the baseline first), seed and stage: mAP in percent.
    """

    config: str
    fraction: float
    results: Mapping[str, Mapping[int, Mapping[str, float]]]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.config}, {percent(self.fraction)} % of the images, SVMs on frozen features"

    @property
    def stages(self) -> list[str]:
        """The features' names, in the network's order."""
        runs = [run for by_seed in self.results.values() for run in by_seed.values()]
        return sorted({stage for run in runs for stage in run})

    def values(self, init: str, stage: str) -> dict[int, float]:
        """A result by seed."""
        return {seed: run[stage] for seed, run in self.results[init].items() if stage in run}

    def cells(self, init: str) -> list[tuple[str, str]]:
        """A start's mean in each stage, and its difference from the baseline."""
        baseline = next(iter(self.results))
        return [
            (
                value_text(sample(self.values(init, stage))),
                ""
                if init == baseline
                else difference_text(
                    difference(self.values(init, stage), self.values(baseline, stage))
                ),
            )
            for stage in self.stages
        ]


def judged(blocks: Iterable[Block]) -> dict[tuple[str, str], Verdict]:
    """Judge every start in every block by its `decisive` measure, as one family.

    Detectors on frozen backbones are not in it: they are shown, and claim nothing.

    Returns:
        By the block's title and the start's name.
    """
    return judge(
        {
            (block.title, init): block.difference(init, block.decisive)
            for block in blocks
            if not block.step
            for init in block.runs
            if init != block.baseline
        }
    )


def judgements(blocks: Iterable[Block]) -> list[str]:
    """Say the verdicts of `judged` in words."""
    blocks = list(blocks)
    by_title = {block.title: block for block in blocks}
    several = sum(not block.step for block in blocks) > 1
    sentences = []
    for (title, init), found in judged(blocks).items():
        block, diff = by_title[title], found.difference
        count = len(diff.values)
        place = f" ({title})" if several else ""
        told = f"{init}{place}: {found.word}."
        if not count:
            sentences.append(f"{told} It shares no finished seed with {block.baseline}.")
            continue
        told += f" {block.decisive.label}: {difference_text(diff)} against {block.baseline}"
        told += f", {count} {'seed' if count == 1 else 'seeds'}."
        if math.isnan(found.smallest):
            told += " Without a spread over seeds nothing is claimed."
        else:
            told += (
                f" With a chance of {100 * POWER:g} % these seeds see differences from "
                f"{found.smallest:.1f} points on."
            )
        sentences.append(told)
    return sentences


def results_csv(blocks: Iterable[Block]) -> str:
    """List every result of every run; an empty value where there was nothing to measure."""
    rows = [
        (block.name, block.fraction, init, seed, run.iterations, metric.key, _number(value))
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
                row = [block.name, block.fraction, init, metric.key, len(own.values)]
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


def text_table(blocks: Iterable[Block], probes: Iterable[Probes] = ()) -> str:
    """Lay the averages of all blocks out for a terminal."""
    parts = []
    for probe in probes:
        rows = [("", *probe.stages)]
        for init, runs in probe.results.items():
            values, diffs = zip(*probe.cells(init))
            rows.append((init, *values))
            if any(diffs) and runs:
                rows.append((f"- against {next(iter(probe.results))}", *diffs))
        align = ("left", *["right"] * len(probe.stages))
        table = tabulate(rows, tablefmt="plain", colalign=align, disable_numparse=True)
        parts.append(f"{probe.title}, mAP\n{table}")
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
    names = (*AVERAGES, AREA, *SIZES, *FREQUENCIES)
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
