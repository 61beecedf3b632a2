"""Stands in for the tool of this name: a falling loss, and an empty backbone file."""

import itertools
import json
import sys
from pathlib import Path

arguments = sys.argv[1:]
resume = "--resume" in arguments
values = dict(itertools.pairwise(arguments))
folder, length = Path(values["OUTPUT_DIR"]), int(values.get("SOLVER.MAX_ITER", 100))
folder.mkdir(parents=True, exist_ok=True)
print("resumed" if resume else "new", flush=True)
if (folder / "fail").exists():
    sys.exit("the disk is on fire")
(folder / "config.yaml").write_text("MODEL:\n  DEVICE: cpu\n")
with open(folder / "metrics.json", "a") as file:
    for iteration in range(length):
        loss = 2 + 3 * 0.97**iteration + 0.01 * int(values["SEED"])
        record = {"iteration": iteration, "total_loss": 2.1 * loss}
        for name, factor in (("forward", 1), ("backward", 1.1)):
            record[f"loss_captioning_{name}"] = factor * loss
            if iteration % 20 == 19 or iteration == length - 1:
                record[f"val/loss_captioning_{name}"] = factor * loss + 0.1
                record["val/unigram_entropy"] = 4.6
        file.write(json.dumps(record) + "\n")
        print(
            f"[11/21 05:50:53 pretrain]: eta: 0:00:{length - iteration:02}  "
            f"iter: {iteration}  total_loss: {2.1 * loss:.3f}  lr: 0.1",
            flush=True,
        )
(folder / "backbone.safetensors").write_bytes(b"")
