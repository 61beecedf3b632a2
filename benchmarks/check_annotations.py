"""How long a file of COCO train2017's size takes to check, against reading its JSON.

python benchmarks/check_annotations.py

Writes a generated file of 118 287 images and 860 001 polygons into a temporary folder (300 MB),
reads it with json.load, and reads and checks it as tools/check_dataset.py --no-images does, in one
process. Image files are not there, which is one more problem found for each.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np

from virtex_d2.annotations.checks import check
from virtex_d2.detection.sources import read_annotations

IMAGES, OBJECTS, CLASSES, CORNERS = 118_287, 860_001, 80, 20
WIDTH, HEIGHT = 640, 480


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        write(path)
        print(f"{IMAGES} images, {OBJECTS} objects, {path.stat().st_size / 1e6:.0f} MB", flush=True)
        start = time.process_time()
        with open(path, encoding="utf-8") as file:
            json.load(file)
        baseline = time.process_time() - start
        start = time.process_time()
        checked = check(read_annotations(["coco", str(path), folder], "generated"), decode=False)
        seconds = time.process_time() - start
    kinds = {kind: len(problems) for kind, problems in checked.by_kind().items()}
    print(f"json.load: {baseline:.1f} s of processor time")
    print(f"read and checked: {seconds:.1f} s, {seconds / baseline:.1f} times as long; {kinds}")


def write(path: Path) -> None:
    """Objects in a ring of corners each, two decimals as in COCO's file."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    annotations = []
    for number in range(OBJECTS):
        radius = rng.uniform(5, 100)
        x, y = rng.uniform(radius, WIDTH - radius), rng.uniform(radius, HEIGHT - radius)
        ring = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
        box = [x - radius, y - radius, 2 * radius, 2 * radius]
        annotations.append(
            {
                "id": number + 1,
                "image_id": number % IMAGES + 1,
                "category_id": number % CLASSES + 1,
                "bbox": np.round(box, 2).tolist(),
                "area": round(3.09 * radius**2, 2),
                "iscrowd": 0,
                "segmentation": [np.round(ring, 2).flatten().tolist()],
            }
        )
    content = {
        "images": [
            {"id": i + 1, "file_name": f"{i + 1:012d}.jpg", "width": WIDTH, "height": HEIGHT}
            for i in range(IMAGES)
        ],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CLASSES)],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)


if __name__ == "__main__":
    main()
