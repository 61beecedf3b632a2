"""Stands in for the tool of this name: coloured blocks with captions, in the same files."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("square", "bar", "column")
SIZES = {"square": (30, 30), "bar": (50, 18), "column": (18, 50)}

parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path)
parser.add_argument("--split")
for flag in ("--num-images", "--max-objects", "--size", "--seed"):
    parser.add_argument(flag, type=int)
parser.add_argument("--overwrite", action="store_true")
args = parser.parse_args()

rng = np.random.default_rng(args.seed)
images, instances, captions = [], [], []
folder = args.output / "images" / args.split
folder.mkdir(parents=True, exist_ok=args.overwrite)
for image_id in range(1, args.num_images + 1):
    pixels = rng.integers(60, 200, (args.size, args.size, 3), dtype=np.uint8)
    for name in rng.permutation(NAMES)[: rng.integers(1, 4)]:
        w, h = SIZES[name]
        x, y = (int(rng.integers(2, args.size - side - 2)) for side in (w, h))
        pixels[y : y + h, x : x + w] = rng.integers(0, 256, 3)
        instances.append(
            {
                "id": len(instances) + 1,
                "image_id": image_id,
                "category_id": NAMES.index(name) + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
        captions.append(
            {"id": len(captions) + 1, "image_id": image_id, "caption": f"a {name} on some noise"}
        )
    images.append(
        {"id": image_id, "file_name": f"{image_id}.png", "height": args.size, "width": args.size}
    )
    Image.fromarray(pixels).save(folder / f"{image_id}.png")
annotations = args.output / "annotations"
annotations.mkdir(exist_ok=True)
categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
for kind, items in (("instances", instances), ("captions", captions)):
    content = {"images": images, "annotations": items, "categories": categories}
    (annotations / f"{kind}_{args.split}.json").write_text(json.dumps(content))
print(f"wrote {args.num_images} images")
