"""Stands in for the tool of this name: AP that depends on the start, and predictions to draw."""

import ast
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask

arguments = sys.argv[1:]
values = dict(itertools.pairwise(arguments))
folder, length = Path(values["OUTPUT_DIR"]), int(values.get("SOLVER.MAX_ITER", 100))
better = bool(values["MODEL.WEIGHTS"])
if better and not Path(values["MODEL.WEIGHTS"]).is_file():
    sys.exit("no backbone")
(folder / "inference").mkdir(parents=True, exist_ok=True)
data_sets = ast.literal_eval(values["VIRTEX.DATASETS"])
config = {
    "SEED": int(values["SEED"]),
    "MODEL": {"DEVICE": "cpu", "WEIGHTS": values["MODEL.WEIGHTS"], "ROI_HEADS": {}},
    "SOLVER": {"MAX_ITER": length},
    "DATASETS": {"TEST": ["shapes_test"]},
    "VIRTEX": {"DATASETS": data_sets},
}
(folder / "config.yaml").write_text(json.dumps(config))
final = (32 if better else 21) + 1.3 * int(values["SEED"]) ** 0.5
with open(folder / "metrics.json", "a") as file:
    for iteration in range(length):
        record = {"iteration": iteration, "total_loss": 1.2 + 2 * 0.97**iteration - 0.2 * better}
        if iteration % 20 == 19 or iteration == length - 1:
            for task, share in (("bbox", 1), ("segm", 0.8)):
                for name, factor in (("AP", 1), ("AP50", 1.8), ("AP75", 0.9)):
                    done = (iteration + 1) / length
                    record[f"{task}/{name}"] = final * share * factor * done**0.5
        file.write(json.dumps(record) + "\n")
test = {name: Path(path) for name, _, path, _ in data_sets}
annotations = json.loads(test["shapes_test"].read_text())
rng = np.random.default_rng(int(values["SEED"]) + 10 * better)
predictions = []
for item in annotations["annotations"]:
    for _ in range(2):
        box = np.array(item["bbox"], dtype=float) + rng.normal(0, 3 if better else 8, 4)
        box[:2] = np.clip(box[:2], 0, 80)
        box[2:] = np.clip(box[2:], 4, 96 - box[:2])
        x, y, w, h = box
        rle = mask.merge(mask.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], 96, 96))
        wrong = rng.random() < (0.1 if better else 0.4)
        predictions.append(
            {
                "image_id": item["image_id"],
                "category_id": int(rng.integers(1, 4)) if wrong else item["category_id"],
                "bbox": box.tolist(),
                "score": float(rng.random()),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
(folder / "inference" / "coco_instances_results.json").write_text(json.dumps(predictions))
