"""What the optional additions to bicaptioning are worth, on the synthetic world.

python benchmarks/ablate_captioning.py --output output/ablation --seeds 3

Each variant pretrains a ResNet-18 with each seed; then its frozen features are judged by a linear
probe: which classes, colours and patterns does an image show? Printed are the mean and standard
deviation over the seeds of the validation losses and of the probe's mAP, and the paired difference
to the plain objective. A run that is there already is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pretrain.backbone import VisualBackbone  # noqa: E402
from pretrain.transforms import normalize  # noqa: E402
from virtex_d2.engine.files import read_safetensors  # noqa: E402
from virtex_d2.studies.shapes.world import CLASSES, COLORS, PATTERNS, render  # noqa: E402  # noqa: E402
from virtex_d2.studies.shapes.write import write_dataset  # noqa: E402

SIZE = 96  # pixels
SEEDS = {"train": 1, "val": 2}  # of the worlds
NUM_VAL = 400
VARIANTS = {
    "bicaptioning": [],
    "+ token classification, weight 0.5": ["MODEL.CAPTIONING.CLASSIFICATION_WEIGHT", "0.5"],
    "+ half of the captions in parallel": ["MODEL.CAPTIONING.PARALLEL_SHARE", "0.5"],
    "+ label smoothing 0.1": ["MODEL.CAPTIONING.LABEL_SMOOTHING", "0.1"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--num-images", type=int, default=3000)
    args = parser.parse_args()

    world = args.output / "world"
    if not world.is_dir():
        write_dataset(world, "train", args.num_images, SIZE, SEEDS["train"])
        write_dataset(world, "val", NUM_VAL, SIZE, SEEDS["val"])
    probe = LinearProbe()
    print(f"untrained ResNet-18: mAP {probe(None):.1f}", flush=True)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(1, args.seeds + 1):
        for number, (name, overrides) in enumerate(VARIANTS.items()):
            run = args.output / f"variant{number}-seed{seed}"
            result = pretrain(run, world, seed, args.iterations, overrides)
            result["mAP"] = probe(run / "backbone.safetensors")
            results[name].append(result)
            shown = "  ".join(f"{key} {value:.3f}" for key, value in result.items())
            print(f"seed {seed}  {name}: {shown}", flush=True)
    print(table(results))


def pretrain(
    run: Path, world: Path, seed: int, iterations: int, overrides: list[str]
) -> dict[str, float]:
    """Train, or find trained; validation losses of the last iteration."""
    if not (run / "model_final.pth").exists():
        options = {
            "SEED": seed,
            "OUTPUT_DIR": run,
            "MODEL.VISUAL.NAME": "resnet18",
            # ten times the iterations would be needed to tell outlines at the config's own rate
            "SOLVER.CNN_LR": 3e-4,
            "SOLVER.MAX_ITER": iterations,
            "TEST.EVAL_PERIOD": iterations,
        }
        for split in ("train", "val"):
            annotations = world / "annotations" / f"captions_{split}.json"
            options[f"DATA.{split.upper()}_CAPTIONS"] = annotations
            options[f"DATA.{split.upper()}_IMAGES"] = world / "images" / split
        pairs = [str(part) for pair in options.items() for part in pair]
        config = ROOT / "configs" / "pretrain" / "shapes_R_50.yaml"
        tool = ROOT / "tools" / "pretrain_net.py"
        command = [sys.executable, tool, "--resume", "--config-file", config, *pairs, *overrides]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    lines = map(json.loads, (run / "metrics.json").read_text().splitlines())
    last = {key: value for line in lines for key, value in line.items()}
    return {
        direction: last[f"val/loss_captioning_{direction}"] for direction in ("forward", "backward")
    }


class LinearProbe:
    """Ridge regression from frozen, pooled features to what images show; mAP in percent.

    What they show are the words for the classes, colours and patterns of their objects. The
    regression's strength is chosen by the last fifth of the training images.
    """

    def __init__(self, num_train: int = 1000):
        self._images, self._labels = {}, {}
        words = (*CLASSES, *COLORS, *PATTERNS)
        for split, number in (("train", num_train), ("val", NUM_VAL)):
            scenes = [render(SEEDS[split], index, SIZE) for index in range(number)]
            pixels = [torch.from_numpy(scene.image.transpose(2, 0, 1).copy()) for scene in scenes]
            self._images[split] = torch.stack(pixels)
            self._labels[split] = np.array(
                [
                    [
                        any(word in (o.name, o.color, o.pattern) for o in scene.objects)
                        for word in words
                    ]
                    for scene in scenes
                ]
            )

    def __call__(self, backbone_file: Path | None) -> float:
        torch.manual_seed(0)
        backbone = VisualBackbone("resnet18").eval()
        if backbone_file is not None:
            tensors, _ = read_safetensors(backbone_file)
            backbone.cnn.load_state_dict(tensors, strict=False)
        features = {split: self._features(backbone, split) for split in self._images}
        mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6
        train, val = ((features[split] - mean) / std for split in ("train", "val"))
        known = self._labels["train"]
        cut = len(train) * 4 // 5
        best = max(
            (10.0**power for power in range(6)),
            key=lambda ridge: mean_ap(
                answers(train[:cut], known[:cut], train[cut:], ridge), known[cut:]
            ),
        )
        return 100 * mean_ap(answers(train, known, val, best), self._labels["val"])

    @torch.no_grad()
    def _features(self, backbone: VisualBackbone, split: str) -> np.ndarray:
        parts = [
            backbone(normalize(images)).mean(dim=(2, 3)) for images in self._images[split].split(64)
        ]
        return torch.cat(parts).numpy().astype(np.float64)


def answers(x: np.ndarray, known: np.ndarray, asked: np.ndarray, ridge: float) -> np.ndarray:
    """(N, D), (N, C) bool, (M, D) -> (M, C): regression of the classes, less their frequency."""
    target = known - known.mean(0)
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ target)
    return asked @ weights


def mean_ap(scores: np.ndarray, known: np.ndarray) -> float:
    """Mean over the classes that occur of the area under precision and recall."""
    values = []
    for score, positive in zip(scores.T, known.T):
        if positive.any():
            hits = positive[np.argsort(-score, kind="stable")]
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            values.append(precision[hits].mean())
    return float(np.mean(values))


def table(results: dict[str, list[dict[str, float]]]) -> str:
    plain = next(iter(results.values()))
    lines = [
        "| objective | loss forward | loss backward | probe mAP | to the plain one |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        cells = [spread([run[key] for run in runs]) for key in ("forward", "backward", "mAP")]
        difference = spread([run["mAP"] - base["mAP"] for run, base in zip(runs, plain)])
        lines.append(f"| {name} | {' | '.join(cells)} | {difference if runs != plain else ''} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
