"""Stands in for the tool of this name: AP that depends on start, seed and fraction.

A file named "stop_after" beside the output folders says how many runs may still begin.
"""

import json
import random
import sys
from pathlib import Path

flags = [argument for argument in sys.argv[1:] if argument == "--resume"]
arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
values = dict(zip(arguments[::2], arguments[1::2]))
folder, length = Path(values["OUTPUT_DIR"]), int(values.get("SOLVER.MAX_ITER", 100))
budget = Path("stop_after")
if budget.exists():
    left = int(budget.read_text())
    if not left:
        sys.exit("the machine was switched off")
    budget.write_text(str(left - 1))
seed, fraction = int(values["SEED"]), float(values.get("VIRTEX.FRACTION", 1))
weights = values["MODEL.WEIGHTS"]
better = 6 if weights else 0
folder.mkdir(parents=True, exist_ok=True)
config = {
    "SEED": seed,
    "OUTPUT_DIR": str(folder),
    "DATASETS": {"TEST": ["tiny_val"]},
    "MODEL": {
        "DEVICE": "cpu",
        "WEIGHTS": weights,
        "MASK_ON": True,
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {"DEPTH": 50, "NORM": values.get("MODEL.RESNETS.NORM", "SyncBN")},
        "ROI_HEADS": {"NUM_CLASSES": 3},
    },
    "SOLVER": {"MAX_ITER": length},
    "VIRTEX": {"FRACTION": fraction},
}
(folder / "config.yaml").write_text(json.dumps(config))
(folder / "log.txt").write_text("[11/21 05:50:53] virtex_d2 INFO: Process 0 of 2; command line: \n")
final = 20 + 5 * fraction + better + random.Random(f"{seed} {fraction} {better}").gauss(0, 0.5)
with open(folder / "metrics.json", "a") as file:
    for iteration in range(19, length, 20):
        record = {"iteration": iteration, "total_loss": 3 - iteration / length, "time": 0.5}
        if iteration % 40 == 39 or iteration == length - 1:
            done = ((iteration + 1) / length) ** 0.5
            for task, share in (("bbox", 1), ("segm", 0.8)):
                ap = final * share * done
                record |= {f"{task}/AP": ap, f"{task}/AP50": 1.8 * ap, f"{task}/AP75": 0.9 * ap}
                record |= {f"{task}/APs": 0.5 * ap, f"{task}/APm": ap, f"{task}/APl": float("nan")}
                record |= {f"{task}/AP-cat": ap + 1, f"{task}/AP-dog": ap - 1}
                record[f"{task}/AP-unicorn"] = float("nan")
        file.write(json.dumps(record) + "\n")
