"""A small IPT on six tasks: is it better than what it is given, and than an untrained one?

python benchmarks/ipt_small.py --data FOLDER --output output/ipt_small

FOLDER has SunHays80 (40 of its photographs, at half size, to train on), Set5 and Set14 (19 central
crops of 144 pixels to restore). For each seed: configs/pretrain/ipt_small.yaml, 2 000 steps of 8,
two CPU minutes; then noise 70, which is not among the six, for 100 steps of 4: on the trained body
with the head, tail and embedding of noise 50 ("tuned") or new ones ("anew"), and from scratch.
Noise 10 and 70 are restored by what has learned 30 and 50, too. Writes
benchmarks/results/ipt_small.json; what is finished is not repeated.

--x2 ITERATIONS trains the first seed's network on x2 alone instead, for hours if it is to come near
bicubic enlargement, and goes on where it was stopped: benchmarks/results/ipt_x2.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import machine  # noqa: E402
from pretrain.config import load_pretrain_config  # noqa: E402
from pretrain.methods.ipt.degrade import degrade, resize  # noqa: E402
from pretrain.methods.ipt.method import Restoration  # noqa: E402
from pretrain.methods.ipt.network import IPT  # noqa: E402
from pretrain.methods.ipt.scores import psnr_y  # noqa: E402
from pretrain.methods.ipt.tasks import SIX_TASKS, parse_task  # noqa: E402
from pretrain.methods.ipt.tiles import SPARSE, restore_tiled  # noqa: E402
from pretrain.trainer import PretrainTrainer  # noqa: E402

CROP = 144  # pixels
# What is restored, and by the head of which task.
RESTORED = {**{name: name for name in SIX_TASKS}, "noise10": "noise30", "noise70": "noise50"}
# How noise 70 begins.
BEGINNINGS = {"tuned": ["noise70:noise50"], "anew": ["noise70"], "scratch": []}
NEW = {"IPT.TASKS": ["noise70"], "SOLVER.MAX_ITER": 100, "SOLVER.IMS_PER_BATCH": 4}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--x2", type=int, default=0, metavar="ITERATIONS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_world(args.data, args.output / "world")
    crops = [read(file) for file in sorted((args.output / "world" / "val").iterdir())]
    if args.x2:
        enlarge(args.output, args.seeds[0], args.x2, crops)
        return
    seeds = {}
    for seed in args.seeds:
        result = args.output / f"seed{seed}.json"
        if not result.exists():
            result.write_text(json.dumps(of_seed(args.output, seed, crops)))
        seeds[seed] = json.loads(result.read_text())
        report(seeds, crops)


def of_seed(output: Path, seed: int, crops: list[torch.Tensor]) -> dict:
    """Mean PSNR of the luma in dB by what is restored, of every network of a seed."""
    six, folder = list(SIX_TASKS), output / f"seed{seed}"
    found = {"untrained": of_all(untrained(output, seed), six, crops)}
    trained = train(output, folder / "six", seed)
    found["trained"] = of_all(trained, six, crops)
    for name, begins in BEGINNINGS.items():
        weights = folder / "six" / "model_final.pth" if begins else ""
        more = {**NEW, "MODEL.WEIGHTS": weights, "IPT.NEW_TASKS": begins}
        tuned = train(output, folder / name, seed, more)
        found[f"noise70 {name}"] = psnr(tuned, 0, "noise70", crops)
    return found


def enlarge(output: Path, seed: int, iterations: int, crops: list[torch.Tensor]) -> None:
    """Train x2 alone, and write its curve and its mean PSNR beside that of bicubic enlargement."""
    folder = output / f"seed{seed}" / f"x2-{iterations}"
    keys = {"IPT.TASKS": ["x2"], "IPT.CONTRAST_WEIGHT": 0.0, "SOLVER.MAX_ITER": iterations}
    watched = {"DATA.VAL_IMAGES": output / "world" / "val", "TEST.EVAL_PERIOD": 2000}
    network = train(output, folder, seed, {**keys, **watched})
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    curve = {line["iteration"] + 1: line["val/psnr_x2"] for line in lines if "val/psnr_x2" in line}
    found = {"input": psnr(None, 0, "x2", crops), "trained": psnr(network, 0, "x2", crops)}
    print(f"x2, {iterations} iterations, PSNR of the luma in dB: {found}")
    result = {"machine": machine(torch.device("cpu")), "iterations": iterations, **found}
    write(ROOT / "benchmarks/results/ipt_x2.json", {**result, "validated": curve})


def config(output: Path, folder: Path, seed: int, more: dict):
    world = output / "world"
    keys = {"SEED": seed, "OUTPUT_DIR": folder, "DATA.TRAIN_IMAGES": world / "train", **more}
    opts = [str(part) for pair in keys.items() for part in pair]
    return load_pretrain_config(str(ROOT / "configs/pretrain/ipt_small.yaml"), opts)


def untrained(output: Path, seed: int) -> IPT:
    cfg = config(output, output, seed, {})
    torch.manual_seed(seed)
    return Restoration(cfg, 0).network.eval()


def train(output: Path, folder: Path, seed: int, more: dict | None = None) -> IPT:
    """Train or go on, unless it is finished."""
    cfg = config(output, folder, seed, {"MODEL.DEVICE": "cpu", **(more or {})})
    folder.mkdir(parents=True, exist_ok=True)
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer.method.network.eval()


def of_all(network: IPT, tasks: list[str], crops: list[torch.Tensor]) -> dict[str, float]:
    return {name: psnr(network, tasks.index(by), name, crops) for name, by in RESTORED.items()}


@torch.inference_mode()
def psnr(network: IPT | None, number: int, name: str, crops: list[torch.Tensor]) -> float:
    """In dB, of the network's task with this number; of the input itself without a network."""
    task, each = parse_task(name), []
    for seed, clean in enumerate(crops):
        given = degrade(clean[None], task, [seed])
        if network is None:
            restored = (resize(given, task.scale) if task.scale > 1 else given)[0]
        else:
            step = lambda x: network(x, number)  # noqa: E731
            restored = restore_tiled(step, given[0], network.sizes.patch, task.scale, SPARSE)
        each.append(psnr_y(restored, clean, task.scale if task.scale > 1 else 0))
    return float(np.mean(each))


def write_world(data: Path, world: Path) -> None:
    """Images to train on, and crops to restore; refuses a folder that lacks some."""
    photographs = sorted((data / "SunHays80").iterdir())[:40]
    test = [file for name in ("Set5", "Set14") for file in sorted((data / name).iterdir())]
    if (len(photographs), len(test)) != (40, 19):
        raise SystemExit(f"{data}: expected 40 photographs and 19 images of Set5 and Set14")
    for split in ("train", "val"):
        (world / split).mkdir(parents=True, exist_ok=True)
    for file in photographs:
        image = Image.open(file).convert("RGB")
        # not compressed: to decode a PNG takes as long as to train on the crop
        image.reduce(2).save(world / "train" / f"{file.stem}.ppm")
    for file in test:
        image = Image.open(file).convert("RGB")
        x, y = ((side - CROP) // 2 for side in image.size)
        crop = image.crop((x, y, x + CROP, y + CROP))
        crop.save(world / "val" / f"{file.parent.name}-{file.stem}.png")


def read(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()


def report(seeds: dict[int, dict], crops: list[torch.Tensor]) -> None:
    """Print the means over seeds, and write them with each seed's numbers."""
    given = {name: psnr(None, 0, name, crops) for name in RESTORED}
    rows = {"input": given}
    for row in ("untrained", "trained"):
        rows[row] = {
            name: float(np.mean([found[row][name] for found in seeds.values()])) for name in given
        }
    tuned = {
        name: float(np.mean([found[f"noise70 {name}"] for found in seeds.values()]))
        for name in BEGINNINGS
    }
    print(f"PSNR of the luma in dB, mean of seeds {', '.join(map(str, seeds))}")
    print(f"{'':10}" + "".join(f"{name:>9}" for name in given))
    for row, values in rows.items():
        print(f"{row:10}" + "".join(f"{value:9.2f}" for value in values.values()))
    print("noise 70, 100 steps:", ", ".join(f"{name} {v:.2f}" for name, v in tuned.items()))
    result = {
        "machine": machine(torch.device("cpu")),
        "mean": {**rows, "noise70": tuned},
        "seeds": {str(seed): found for seed, found in seeds.items()},
    }
    write(ROOT / "benchmarks/results/ipt_small.json", result)


def write(file: Path, result: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
