"""Step 8: what the loader alone gives, and whether training waits for it."""

import io
import os
import statistics
import time
from pathlib import Path

from PIL import Image

from pretrain.config import get_pretrain_cfg
from pretrain.data.prepare import Settings, prepare_image
from pretrain.data.sources import open_data
from pretrain.methods.method import find_method
from virtex_d2.engine.config import load_config

from . import runs
from .step import Step

WAITING = 0.1  # of an iteration, for the loader


def run(step: Step) -> None:
    folders = _prepared(step, runs.world(step))
    workers = [n for n in step.scale.workers if n <= max(2, os.cpu_count() or 1)]
    table: dict[str, dict[int, float]] = {kind: {} for kind in folders}
    for count in reversed(workers):
        for kind, folder in folders.items():
            if not step.late(f"{kind}, {count} workers", 12):
                table[kind][count] = _rate(step, folder, count)
                step.figure("images/s by workers", table)
    if not all(table.values()):
        return
    best = {kind: max(rates.values()) for kind, rates in table.items()}
    step.limit("prepared", best["prepared"] / best["originals"], "times originals'", least=1.2)
    ratio = best["prepared"] / best["without markers"]
    step.figure("restart markers, times as fast as without", ratio)
    _training(step, folders["prepared"], max(table["prepared"], key=table["prepared"].get))


def _prepared(step: Step, world: Path) -> dict[str, Path]:
    """Folders of the same images: as they are, prepared, and that without restart markers."""
    folders = {"originals": world / "images" / "train"}
    for kind in ("prepared", "without markers"):
        folders[kind] = step.fresh(kind.replace(" ", "_"))
    settings = Settings(shorter_side=min(320, 2 * step.scale.side // 3))
    for path in sorted(folders["originals"].glob("*.jpg")):
        prepare_image(path.name, str(path.parent), str(folders["prepared"]), settings)
        stream = io.BytesIO()
        with Image.open(folders["prepared"] / path.name) as image:
            image.save(stream, "JPEG", quality="keep", optimize=True)  # the same pixels
        (folders["without markers"] / path.name).write_bytes(stream.getvalue())
    return folders


def _rate(step: Step, folder: Path, workers: int) -> float:
    """Images a second, behind the first batches, which were made before anyone waited."""
    words = ("DATA.TRAIN_IMAGES", folder, "DATA.NUM_WORKERS", workers)
    cfg = load_config(get_pretrain_cfg(), "", runs.options(step, step.fresh("loading"), *words))
    batches = iter(open_data(cfg, find_method(cfg).build_samples).train_loader(cfg, 0))
    for _ in range(2 * workers):
        next(batches)
    count, start = 0, time.perf_counter()
    while count < 2 or (step.cuda and time.perf_counter() - start < 3):
        skipped = list(next(batches)["skipped_files"])
        count += 1
        if skipped:
            step.check("all images decode", False, str(skipped[:3]))
    return count * step.scale.batch / (time.perf_counter() - start)


def _training(step: Step, folder: Path, workers: int) -> None:
    trainer = runs.trainer(step, "DATA.NUM_WORKERS", workers, "DATA.TRAIN_IMAGES", folder)
    count, warm_up = (40, 5 * workers) if step.cuda else (2, 1)
    clock = runs.train(trainer, runs.Clock(count, warm_up))
    seconds = clock.seconds / count
    # a mean: a median hides that every n-th one waits for all n workers
    waited = statistics.mean(clock.data_seconds[warm_up:])
    rate = step.scale.batch / seconds
    step.figure("training", {"workers": workers, "images_per_s": rate, "s, waited": waited})
    step.finite("training at the best", clock.losses)
    step.limit("training waits", waited / seconds, "of an iteration", most=WAITING)
    step.headline(f"{rate:.0f} images/s with {workers} workers, {waited / seconds:.0%} of waiting")
