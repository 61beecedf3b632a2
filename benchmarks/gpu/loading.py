"""Step 8: what the loader alone gives, and whether training waits for it."""

import io
import os
import shutil
import statistics
import time
from pathlib import Path

from PIL import Image

from pretrain.augment import TrainTransform
from pretrain.captions import load_coco_captions
from pretrain.captions.records import Records
from pretrain.loader import CaptionDataset, build_train_loader
from pretrain.prepare import Settings, prepare_image
from pretrain.tokenizer import Tokenizer

from . import runs
from .step import Step

WAITING = 0.1  # of an iteration, for the loader


def run(step: Step) -> None:
    folders = _prepared(step, runs.world(step))
    _tokenizer(step)
    workers = [n for n in step.scale.workers if n <= 2 * (os.cpu_count() or 1)]
    table: dict[str, dict[str, float]] = {}
    for kind, folder in folders.items():
        for count in workers:
            if not step.late(f"{kind}, {count} workers", 15):
                rate = _rate(step, folder, count)
                table.setdefault(kind, {})[str(count)] = rate
                step.figure("images/s by workers", table)
    best = {kind: max(rates.values()) for kind, rates in table.items()}
    if len(best) < len(folders):
        return
    step.limit("prepared", best["prepared"] / best["originals"], "times originals'", least=1.2)
    ratio = best["prepared"] / best["without markers"]
    step.figure("restart markers, times as fast as without", ratio)
    _training(step, folders["prepared"], max(table["prepared"], key=table["prepared"].get))


def _prepared(step: Step, world: Path) -> dict[str, Path]:
    """Folders of the same images: as they are, prepared, and that without restart markers."""
    originals = world / "images" / "train"
    made = {"prepared": step.folder / "prepared", "without markers": step.folder / "no_markers"}
    for folder in made.values():
        shutil.rmtree(folder, ignore_errors=True)
    settings = Settings(shorter_side=min(320, 2 * step.scale.side // 3))
    for path in sorted(originals.glob("*.jpg")):
        prepare_image(path.name, str(originals), str(made["prepared"]), settings)
        with Image.open(made["prepared"] / path.name) as image:
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality="keep", optimize=True)  # the same pixels
        made["without markers"].mkdir(exist_ok=True)
        (made["without markers"] / path.name).write_bytes(stream.getvalue())
    return {"originals": originals, **made}


def _tokenizer(step: Step) -> None:
    if not (step.folder / "tokenizer.model").is_file():
        runs.build_trainer(step, "loading")
        shutil.copy(step.folder / "loading" / "tokenizer.model", step.folder / "tokenizer.model")


def _rate(step: Step, folder: Path, workers: int) -> float:
    """Images a second, behind the first batches, which were made before anyone waited."""
    captions = runs.world(step) / "annotations" / "captions.json"
    records = load_coco_captions(str(captions), str(runs.world(step) / "images" / "train"))
    names = [Path(record.file_name).name for record in records]
    ours = Records.of_files(range(len(names)), names, [r.captions for r in records], folder)
    tokenizer = Tokenizer(step.folder / "tokenizer.model")
    dataset = CaptionDataset(ours, tokenizer, TrainTransform(step.scale.crop))
    batch = min(64, step.scale.batch)
    batches = iter(build_train_loader(dataset, batch, num_workers=workers))
    for _ in range(4 * workers):
        next(batches)
    count = 0
    start = time.perf_counter()
    while count < 2 or step.cuda and time.perf_counter() - start < 4:
        found = next(batches)
        count += 1
        if list(found["skipped_files"]):
            step.check("all images decode", False, str(found["skipped_files"][:3]))
    return count * batch / (time.perf_counter() - start)


def _training(step: Step, folder: Path, workers: str) -> None:
    options = ("DATA.NUM_WORKERS", workers, "DATA.TRAIN_IMAGES", folder)
    trainer = runs.build_trainer(step, "loading", *options)
    warm_up = 5 * int(workers) if step.cuda else 1
    clock = runs.train(trainer, runs.Clock(40 if step.cuda else 2, warm_up))
    seconds = clock.seconds / (40 if step.cuda else 2)
    # of single iterations: the median hides that every n-th one waits for all n workers
    waited = statistics.mean(clock.data_seconds[warm_up:])
    rate = step.scale.batch / seconds
    step.figure("training", {"workers": workers, "images_per_s": rate, "s, waited": waited})
    step.check("training goes on", len(clock.losses) > warm_up, f"{len(clock.losses)} losses")
    step.limit("training waits", waited / seconds, "of an iteration", most=WAITING)
    step.headline(f"{rate:.0f} images/s with {workers} workers, {waited / seconds:.0%} of waiting")
