"""Images a second that one core loads for training, against loading them plainly.

Measured, in turns in one process and one thread, in seconds of the processor (the machine may do
other things meanwhile), at crops of 224 pixels with the recipe's augmentation:

    plain       originals by OpenCV: decode, random resized crop, flip, the four jitters of
                ColorJitter on bytes, float32, less the mean, over the standard deviation
    originals   the same files by `pretrain.jpeg`: crop and flip, in bytes
    prepared    likewise, after tools/prepare_images.py
    samples     prepared, and all else that is in a batch: captions, tokens, collation

Jitter and normalisation are the device's in this project; what they cost where the device is a CPU
is measured by itself. Then batches from 1, 2 and 4 workers, in seconds of the clock.

Photographs with a shorter side below 480 pixels are enlarged to 640 x 480 (480 x 640) and saved at
quality 95, with grain as a sensor's, because enlarged ones have none: 8 levels give the mean size
of COCO's files (163 kB), 0 leaves it out. They stand in for originals. Correctness comes first:
with the same box and flip, pixels are those of the plain way up to how images are made smaller.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.measuring import machine
from benchmarks.rounds import count
from pretrain.config import get_pretrain_cfg
from pretrain.data.formats import load_coco_captions
from pretrain.data.loader import TrainSet, build_train_loader, stack_images
from pretrain.data.prepare import Settings, prepare_image
from pretrain.data.records import Records
from pretrain.jpeg import Box, open_picture
from pretrain.methods.captioning.samples import CaptionSamples
from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from pretrain.transforms import PIXEL_MEAN, PIXEL_STD, TrainTransform, normalize
from virtex_d2.engine.images import read_image

SIZE, BATCH = 224, 32
LONGER, SHORTER = 640, 480  # of an original, pixels
JITTER, JITTER_PROB = (0.4, 0.4, 0.4, 0.1), 0.8
# Mean difference to the plain way, levels of 0-255: it samples where others average.
TOLERANCE = {"originals": 6.0, "prepared": 8.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, help="folder of photographs")
    parser.add_argument("--captions", required=True, help="COCO's caption file of them")
    parser.add_argument("--num-images", type=count, default=96)
    parser.add_argument("--rounds", type=count, default=7, help="turns of each way (default 7)")
    parser.add_argument("--grain", type=float, default=8.0, help="of stand-ins, levels (default 8)")
    parser.add_argument("--vocab", type=count, default=4000, help="pieces (default 4000)")
    parser.add_argument("--quality", type=int, default=90, help="of prepared files (default 90)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])


def measure(args: argparse.Namespace) -> dict:
    """Everything above.

    Returns:
        "settings" and "machine". "files": mean kB of originals and prepared ones. "difference":
        mean to the plain way, in levels. "per_core": by way "images_per_s" (median), "from", "to",
        "ratio" (median over rounds, to plain). "device_ms": of an image, "jitter and normalise" and
        "normalise". "workers": by way and number of workers, images a second.
    """
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            return _measure(args, Path(name))
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _measure(args: argparse.Namespace, folder: Path) -> dict:
    records = load_coco_captions(args.captions, args.images)
    train_tokenizer(
        (c for r in records for c in r.captions), args.vocab, folder / "tokenizer.model"
    )
    tokenizer = Tokenizer(folder / "tokenizer.model")
    chosen = [records[i] for i in range(0, len(records), max(1, len(records) // args.num_images))]
    chosen = chosen[: args.num_images]
    names = [f"{number}.jpg" for number in range(len(chosen))]
    folders = {way: folder / way for way in ("originals", "prepared")}
    folders["originals"].mkdir()
    for name, record in zip(names, chosen):
        write_original(record.file_name, folders["originals"] / name, args.grain)
        settings = Settings(quality=args.quality)
        prepare_image(name, str(folders["originals"]), str(folders["prepared"]), settings)
    files = {way: [str(path / name) for name in names] for way, path in folders.items()}
    difference = {way: _difference(files["originals"], files[way]) for way in files}
    for way, found in difference.items():
        if found > TOLERANCE[way]:
            raise AssertionError(f"{way}: {found:.2f} levels from the plain way")

    cfg = get_pretrain_cfg()
    cfg.DATA.IMAGE_SIZE = SIZE
    samples = CaptionSamples(cfg, tokenizer)
    transform = samples.train_view
    captions = [record.captions for record in chosen]
    datasets = {
        way: TrainSet(Records.of_files(range(len(names)), names, captions, path), samples)
        for way, path in folders.items()
    }
    ways: dict[str, Callable[[int], object]] = {
        "plain": lambda turn: _plain_batches(files["originals"], turn),
        "originals": lambda turn: _pixel_batches(files["originals"], transform, turn),
        "prepared": lambda turn: _pixel_batches(files["prepared"], transform, turn),
        "samples": lambda turn: _sample_batches(datasets["prepared"], len(names), turn),
    }
    seconds = _in_turns(ways, args.rounds)
    rates = {way: [len(names) / s for s in turns] for way, turns in seconds.items()}
    return {
        "settings": vars(args),
        "machine": machine(torch.device("cpu")),
        "files": {
            way: statistics.mean(os.path.getsize(path) for path in paths) / 1e3
            for way, paths in files.items()
        },
        "difference": difference,
        "per_core": {
            way: {
                "images_per_s": statistics.median(turns),
                "from": min(turns),
                "to": max(turns),
                "ratio": statistics.median(a / b for a, b in zip(turns, rates["plain"])),
            }
            for way, turns in rates.items()
        },
        "device_ms": _device_costs(datasets["prepared"], args.rounds),
        "workers": {
            way: {
                workers: _worker_rate(datasets[way], workers, args.rounds)
                for workers in args.workers
            }
            for way in datasets
        },
    }


def write_original(photograph: str, path: Path, grain: float) -> None:
    """A file as a camera's, after COCO's scaling to 640 pixels."""
    image = read_image(photograph)
    if min(image.size) >= SHORTER:
        path.write_bytes(Path(photograph).read_bytes())
        return
    upright = image.height > image.width
    size = (SHORTER, LONGER) if upright else (LONGER, SHORTER)
    pixels = np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC), np.float32)
    rng = np.random.default_rng(0)
    pixels = pixels + grain * rng.standard_normal((*pixels.shape[:2], 1), np.float32)
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(path, quality=95)


# The plain way


def plain_sample(path: str, rng: np.random.Generator) -> torch.Tensor:
    """(3, SIZE, SIZE) float32."""
    image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    box = plain_box(image.shape[1], image.shape[0], rng)
    pixels = plain_crop(image, box, rng.random() < 0.5)
    if rng.random() < JITTER_PROB:
        pixels = plain_jitter(pixels, rng)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float()
    return tensor.sub_(_MEAN).div_(_STD)


_MEAN, _STD = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)


def plain_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """torchvision's RandomResizedCrop.get_params, without its rare last resort."""
    while True:
        area = width * height * rng.uniform(0.2, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h


def plain_crop(image: np.ndarray, box: Box, flip: bool) -> np.ndarray:
    x0, y0, x1, y1 = box
    pixels = cv2.resize(image[y0:y1, x0:x1], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return cv2.flip(pixels, 1) if flip else pixels


def plain_jitter(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue in random order, on bytes, with tables."""
    levels = np.arange(256, dtype=np.float32)
    for kind in rng.permutation(4):
        factor = rng.uniform(1 - JITTER[kind], 1 + JITTER[kind])
        if kind == 0:
            pixels = cv2.LUT(pixels, (levels * factor).clip(0, 255).astype(np.uint8))
        elif kind == 1:
            mean = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).mean()
            table = levels * factor + mean * (1 - factor)
            pixels = cv2.LUT(pixels, table.clip(0, 255).astype(np.uint8))
        elif kind == 2:
            grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            pixels = cv2.addWeighted(pixels, factor, grey, 1 - factor, 0)
        else:
            hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)  # hue in 180 steps
            table = (levels.astype(np.int64) + round((factor - 1) * 180)) % 180
            hsv[..., 0] = cv2.LUT(hsv[..., 0], table.astype(np.uint8))
            pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return pixels


# Turns


def _plain_batches(paths: list[str], turn: int) -> None:
    rng = np.random.default_rng(turn)
    for first in range(0, len(paths), BATCH):
        torch.stack([plain_sample(path, rng) for path in paths[first : first + BATCH]])


def _pixel_batches(paths: list[str], transform: TrainTransform, turn: int) -> None:
    rng = np.random.default_rng(turn)
    for first in range(0, len(paths), BATCH):
        pictures = (
            open_picture(path, transform.smallest_side) for path in paths[first : first + BATCH]
        )
        views = [transform(picture, "", rng) for picture in pictures]
        stack_images([pixels for pixels, _, _ in views])
        torch.stack([jitter for _, _, jitter in views])


def _sample_batches(dataset: TrainSet, count: int, turn: int) -> None:
    for first in range(turn * count, (turn + 1) * count, BATCH):
        last = min(first + BATCH, (turn + 1) * count)
        dataset.samples.collate([dataset[position] for position in range(first, last)])


def _in_turns(ways: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor that each way takes in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, work in ways.items():
            start = time.process_time()
            work(turn)
            if turn:
                seconds[way].append(time.process_time() - start)
    return seconds


def _difference(originals: list[str], files: list[str]) -> float:
    """Mean absolute difference of the crops to those of the plain way from originals."""
    rng = np.random.default_rng(0)
    found = []
    for original, file in zip(originals, files):
        image = cv2.cvtColor(cv2.imread(original), cv2.COLOR_BGR2RGB)
        box, flip = plain_box(image.shape[1], image.shape[0], rng), bool(rng.random() < 0.5)
        picture = open_picture(file, SIZE)
        scale = picture.size[0] / image.shape[1]
        ours = picture.crop(tuple(round(side * scale) for side in box), SIZE, flip)
        found.append(np.abs(ours - plain_crop(image, box, flip).astype(np.float32)).mean())
    return float(np.mean(found))


def _device_costs(dataset: TrainSet, rounds: int) -> dict[str, float]:
    batch = dataset.samples.collate([dataset[position] for position in range(BATCH)])
    ways = {
        "jitter and normalise": lambda _: normalize(batch["image"], batch["jitter"]),
        "normalise": lambda _: normalize(batch["image"]),
    }
    seconds = _in_turns(ways, rounds)
    return {way: 1e3 * statistics.median(turns) / BATCH for way, turns in seconds.items()}


def _worker_rate(dataset: TrainSet, workers: int, rounds: int) -> float:
    """Images a second of the clock, from the first batch on."""
    batches = iter(build_train_loader(dataset, BATCH, num_workers=workers))
    for _ in range(4 * workers):  # what was made before anyone waited for it
        next(batches)
    start = time.perf_counter()
    for _ in range(8 * rounds):
        next(batches)
    return 8 * rounds * BATCH / (time.perf_counter() - start)


def report(result: dict) -> str:
    """The measurements as text."""
    lines = [result["machine"]["device"]]
    lines += [", ".join(f"{way} {size:.0f} kB" for way, size in result["files"].items())]
    lines += [
        "mean difference to the plain way: "
        + ", ".join(f"{way} {levels:.1f} levels" for way, levels in result["difference"].items()),
        "one core          images/s   (from to)        to plain",
    ]
    lines += [
        f"{way:16} {found['images_per_s']:9.0f}   ({found['from']:4.0f} {found['to']:4.0f})"
        f"  {found['ratio']:11.2f}"
        for way, found in result["per_core"].items()
    ]
    lines += [f"on a CPU, {way}: {ms:.2f} ms an image" for way, ms in result["device_ms"].items()]
    lines += [
        f"{way}, workers: " + ", ".join(f"{count}: {rate:.0f}/s" for count, rate in rates.items())
        for way, rates in result["workers"].items()
    ]
    return "\n".join(lines)
