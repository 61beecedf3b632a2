"""The demo from beginning to end."""

from pathlib import Path

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.demo import figures, report, results
from virtex_d2.studies.demo.masks import load_pictures
from virtex_d2.studies.demo.plan import STARTS, Plan, make_budget, make_plan
from virtex_d2.studies.pipeline.process import cores
from virtex_d2.studies.pipeline.progress import clock
from virtex_d2.studies.pipeline.runner import claim_output, elapsed, run_stages
from virtex_d2.studies.pipeline.stage import read_config
from virtex_d2.studies.reporting.metrics import Metrics
from virtex_d2.studies.reporting.page import Picture

NUM_PICTURES = 8  # held-out images in the report


def run_demo(root: Path, output: Path, scale: float = 1.0, num_seeds: int = 1) -> Path:
    """Run what is not done yet, then write PNGs and report.html into `output`.

    Args:
        root: the project's folder, with tools/ and configs/.
        output: the demo's folder; new, or of an earlier demo of the same scale.
        scale: multiplies the iterations and the captioned images.
        num_seeds: repetitions of pretraining and both detectors.

    Returns:
        The report's path.

    Raises:
        pipeline.runner.StageFailedError: a stage failed; there is no report then.
    """
    root, output = root.resolve(), output.resolve()
    plan = make_plan(root, output, make_budget(root, scale), num_seeds)
    missing = [name for name in ("tools", "configs") if not (root / name).is_dir()]
    if missing:
        raise InputError(f"{root}: expected the project's folder; it has no {missing[0]}/.")
    claim_output(output, "demo", {"scale": plan.budget.scale})
    path = output / "report.html"
    path.unlink(missing_ok=True)  # it would not speak of this run
    print(
        f"{len(plan.stages)} stages into {output}, on {cores()} cores. Commands run in {root}.",
        flush=True,
    )
    markers = run_stages(plan.stages, root, output)

    print("\nReport", flush=True)
    comparisons = _report(plan, root, output, markers, path)
    print(f"\n{_text_table(comparisons)}\n")
    for row in comparisons:
        if row.metric in results.MAIN_METRICS:
            print(results.verdict(row))
    print(f"{clock(elapsed(plan.stages, markers))} in all. Report: {path}")
    return path


def _report(
    plan: Plan, root: Path, output: Path, markers: dict, path: Path
) -> list[results.Comparison]:
    def run(seed: int, name: str) -> Path:
        return root / plan.run_folder(seed, name)

    pretraining = [
        Metrics(run(seed, "pretrain") / "metrics.json", plan.budget.pretrain.iterations)
        for seed in plan.seeds
    ]
    detectors = {
        start: [
            Metrics(run(seed, start) / "metrics.json", plan.budget.detect.iterations)
            for seed in plan.seeds
        ]
        for start in STARTS
    }
    comparisons = results.compare(**detectors)
    first = plan.seeds[0]
    pictures = load_pictures(
        root / plan.annotations("instances", "test"),
        root / plan.images("test"),
        {start: results.find_predictions(run(first, start)) for start in STARTS},
        NUM_PICTURES,
    )
    drawn = {name: output / f"{name}.png" for name in _WORDS}
    figures.draw_pretraining(drawn["pretraining"], pretraining)
    figures.draw_detectors(drawn["detectors"], detectors)
    figures.draw_masks(drawn["masks"], pictures)
    figures.draw_captions(
        drawn["captions"],
        root / plan.annotations("captions", "captions"),
        root / plan.images("captions"),
    )
    figures.draw_overview(output / "overview.png", detectors, pictures)
    report.write_report(
        path,
        plan,
        comparisons,
        {name: Picture(drawn[name], *words) for name, words in _WORDS.items()},
        markers,
        sorted({_device(run(seed, name)) for seed in plan.seeds for name in ("pretrain", *STARTS)}),
    )
    return comparisons


# What each picture shows, in words, and what is written below it.
_WORDS = {
    "detectors": (
        "Box AP, mask AP and training loss of both starts against iteration",
        "With several seeds, thin lines are single seeds and the thick one is their mean.",
    ),
    "masks": (
        "Held-out images with true masks, and with the masks that each start predicts",
        f"The first {NUM_PICTURES} held-out images, first seed; of each start as many predictions "
        "as the image has objects, those of the highest score. Filled: right class, and mask IoU "
        "with a true object of at least 0.5. Dashed: wrong class, wrong place, or found twice.",
    ),
    "captions": (
        "Captioned images of the synthetic world",
        "The first of the captioned images, with two of their five captions. This is all that the "
        "pretraining is given.",
    ),
    "pretraining": (
        "Caption loss of the forward and the backward direction against iteration",
        "The loss of predicting each next piece of the caption, forwards and backwards, from the "
        "image and the pieces before it. The dashed line is what knowing the pieces' frequencies, "
        "and no image, would give.",
    ),
}


def _device(run: Path) -> str:
    return str(read_config(run / "config.yaml").get("MODEL", {}).get("DEVICE", "unknown"))


def _text_table(comparisons: list[results.Comparison]) -> str:
    rows = [("", "random", "caption-pretrained", "difference"), *results.table(comparisons)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
