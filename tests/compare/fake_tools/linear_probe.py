"""Stands in for the tool of this name: mAP that depends on start, stage, seed and fraction."""

import ast
import json
import random
import sys
from pathlib import Path

arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
values = dict(zip(arguments[::2], arguments[1::2]))
better = 4 if values["MODEL.WEIGHTS"] != "random" else 0
chance = random.Random(f"{values['SEED']} {values['VIRTEX.FRACTION']} {better}")
metrics = {}
for place, name in enumerate(ast.literal_eval(values["MODEL.RESNETS.OUT_FEATURES"])):
    mean = 40 + 3 * place + better + chance.gauss(0, 0.5)
    metrics |= {f"{name}/mAP11": mean + 1, f"{name}/mAP": mean}
folder = Path(values["OUTPUT_DIR"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "results.json").write_text(json.dumps({"metrics": metrics}))
