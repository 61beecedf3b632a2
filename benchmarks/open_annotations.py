#!/usr/bin/env python
"""Time to open a COCO-sized annotation file, and what a loader's worker adds in memory.

python benchmarks/open_annotations.py

The file is generated: 118 000 images with five captions of ten words each, and a folder with their
names. The baseline, in the same process, is json.load and a list of records. Memory is what a
forked process keeps for itself alone (USS, from /proc/self/smaps_rollup) after it has read every
record; one that reads nothing is the zero.
"""

import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain.data.formats import load_coco_captions  # noqa: E402
from pretrain.data.records import CaptionRecord  # noqa: E402

NUM_IMAGES, CAPTIONS_PER_IMAGE, WORDS_PER_CAPTION = 118_000, 5, 10
REPEATS = 3


def write_annotations(
    folder: Path, num_images: int = NUM_IMAGES, captions_per_image: int = CAPTIONS_PER_IMAGE
) -> tuple[Path, Path]:
    """The file, with the fields that COCO's have, and the folder of (empty) images."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(5000)]
    images, annotations = [], []
    root = folder / "images"
    root.mkdir()
    for i in range(num_images):
        name = f"{i:012d}.jpg"
        (root / name).touch()
        address = f"http://images.cocodataset.org/train2017/{name}"
        images.append({"license": 3, "file_name": name, "coco_url": address, "id": i})
        images[-1].update(height=360, width=640, date_captured="2013-11-14 11:18:45")
        for _ in range(captions_per_image):
            text = " ".join(rng.choices(words, k=WORDS_PER_CAPTION))
            annotations.append({"image_id": i, "id": len(annotations), "caption": text})
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path, root


def baseline(path: Path, root: Path) -> list[CaptionRecord]:
    """json.load and a list, without any check."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [
        CaptionRecord(i["id"], os.path.join(root, i["file_name"]), tuple(captions[i["id"]]))
        for i in content["images"]
    ]


def read_all(records: Sequence[CaptionRecord]) -> int:
    """Characters of all names and captions: what a loader comes by in its epochs."""
    total = 0
    for index in range(len(records)):
        record = records[index]
        total += len(record.file_name) + sum(len(caption) for caption in record.captions)
    return total


def worker_memory(work: Callable[[], object]) -> float:
    """MiB that a forked process has for itself alone, when it has done its work."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        work()
        os.write(sender, str(private_memory()).encode())
        os._exit(0)
    os.close(sender)
    with open(receiver) as pipe:
        result = float(pipe.read())
    os.waitpid(child, 0)
    return result


def private_memory() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        path, root = write_annotations(Path(name))
        print(
            f"{path.stat().st_size / 1e6:.0f} MB of JSON, {NUM_IMAGES} images, "
            f"{NUM_IMAGES * CAPTIONS_PER_IMAGE} captions"
        )
        for what, load in (("json.load and a list", baseline), ("packed", load_coco_captions)):
            times = []
            for _ in range(REPEATS):
                records = None
                gc.collect()
                wall, cpu = time.perf_counter(), time.process_time()
                records = load(path, root)
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
            wall, cpu = min(times)
            nothing = worker_memory(lambda: None)
            everything = worker_memory(lambda records=records: read_all(records))
            print(
                f"{what:22} {wall:5.2f} s ({cpu:.2f} s of CPU), a worker adds "
                f"{everything - nothing:6.1f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
