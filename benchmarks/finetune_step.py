"""The fine-tuning step beside stock detectron2's: seconds an update, ratio, memory.

A detector of a config of this project on random images with boxes and polygons, decoded already.
Stock is detectron2's own `DefaultTrainer.build_model`, `build_optimizer` and `SimpleTrainer` on the
same config (on a GPU also its `AMPTrainer`, float16). With the same weights and seed both must find
the same losses in float32 before anything is timed.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from benchmarks.measuring import Clock, machine
from benchmarks.rounds import count, ratios, spread, take_turns
from virtex_d2.detection.batch import build_loop
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.config import load_config
from virtex_d2.engine.randomness import place_seed

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "coco" / "mask_rcnn_R_50_FPN_2x.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", default=str(CONFIG), help="default: COCO Mask R-CNN FPN")
    parser.add_argument("--images", type=count, default=2, help="of a batch (default 2)")
    parser.add_argument(
        "--size", type=count, nargs=2, default=(320, 416), help="height, width (default 320 416)"
    )
    parser.add_argument("--objects", type=count, default=7, help="of an image (default 7, as COCO)")
    parser.add_argument("--classes", type=count, default=80, help="default 80, as COCO")
    parser.add_argument("--rounds", type=count, default=7, help="turns of each (default 7)")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def config(args: argparse.Namespace, *options: object) -> CfgNode:
    """The detector's config that both ways have, with norms that one process computes alone.

    Args:
        args: --config-file, --device and --classes.
        options: further keys and values.
    """
    always = ["MODEL.DEVICE", args.device, "MODEL.ROI_HEADS.NUM_CLASSES", args.classes]
    # synchronised norms are for several processes; alone they are these
    always += ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"]
    return load_config(get_virtex_cfg(), args.config_file, [*map(str, [*always, *options])])


def make_batch(args: argparse.Namespace, cfg: CfgNode) -> list[dict]:
    """As detectron2's mapper makes it: uint8 images, boxes, classes and polygons."""
    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    batch = []
    for _ in range(args.images):
        corners = torch.rand(args.objects, 2, 2, generator=generator).sort(dim=1).values
        boxes = (corners.flatten(1) * torch.tensor([width, height] * 2)).round()
        boxes[:, 2:] += 8
        objects = Instances((height, width))
        objects.gt_boxes = Boxes(boxes)
        objects.gt_boxes.clip((height, width))
        objects.gt_classes = torch.randint(0, args.classes, (args.objects,), generator=generator)
        if cfg.MODEL.MASK_ON:
            outlines = [
                [[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.double().tolist()
            ]
            masks = PolygonMasks(outlines)
            if cfg.INPUT.MASK_FORMAT == "bitmask":
                masks = BitMasks.from_polygon_masks(masks, height, width)
            objects.gt_masks = masks
        shape = (3, height, width)
        image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": objects, "height": height, "width": width})
    return batch


class Way:
    """A model with its loop; a call is an update, on the same random numbers as every other's."""

    def __init__(
        self,
        args: argparse.Namespace,
        cfg: CfgNode,
        stock: bool,
        batches: Iterable[list[dict]] | None = None,
    ):
        torch.manual_seed(0)
        self._seed = cfg.SEED
        self._record = lambda: None  # detectron2's loops record in each step
        trainer = DefaultTrainer if stock else DetectionTrainer
        self.model = trainer.build_model(cfg).train()
        optimizer = trainer.build_optimizer(cfg, self.model)
        batches = batches or itertools.repeat(make_batch(args, cfg))
        if not stock:
            loop = build_loop(cfg, self.model, optimizer, lambda _: batches)
            self._step = lambda: loop.step(self.storage.iter)
            self._record = lambda: loop.record(self.storage)
        elif cfg.SOLVER.AMP.ENABLED:
            self._step = AMPTrainer(self.model, batches, optimizer).run_step
        else:
            self._step = SimpleTrainer(self.model, batches, optimizer).run_step
        self._clock = Clock(torch.device(args.device))
        self.storage = EventStorage(0)

    def __call__(self) -> dict[str, float]:
        # proposals and boxes are sampled: from what our loop seeds itself with
        torch.manual_seed(place_seed(self._seed, self.storage.iter, 0))
        with self.storage:
            self._clock.start()
            self._step()
            self._clock.lap("step")
            self._record()
        self.storage.step()
        return dict(self._clock.parts)

    def losses(self) -> dict[str, float]:
        """As the loop has logged them last."""
        return {name: value for name, (value, _) in self.storage.latest().items() if "loss" in name}


def measure(args: argparse.Namespace) -> dict:
    """All figures; seconds are medians over rounds."""
    if args.threads:
        torch.set_num_threads(args.threads)
    plain = config(args, "SOLVER.AMP.ENABLED", False, "VIRTEX.CHANNELS_LAST", False)
    fast = config(args, "SOLVER.AMP.ENABLED", True, "VIRTEX.CHANNELS_LAST", True)
    ways = {
        "stock": Way(args, plain, stock=True),
        "ours": Way(args, plain, stock=False),
        "ours, bfloat16, channels_last": Way(args, fast, stock=False),
    }
    if args.device != "cpu":
        mixed = config(args, "SOLVER.AMP.ENABLED", True, "VIRTEX.CHANNELS_LAST", False)
        ways["stock, AMP"] = Way(args, mixed, stock=True)
    losses = _check(ways)
    turns = take_turns(ways, args.rounds)
    seconds = {name: [turn["step"] for turn in turns[name]] for name in turns}
    images = plain.SOLVER.MAX_ITER * plain.SOLVER.IMS_PER_BATCH
    return {
        "settings": {key: value for key, value in vars(args).items() if key != "profile"},
        "machine": machine(torch.device(args.device)),
        "losses": losses,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio_to_stock": {
            name: ratios(seconds["stock"], values)
            for name, values in seconds.items()
            if name != "stock"
        },
        "schedule": {
            "images": images,
            "hours": {
                name: images / args.images * spread(values)["median"] / 3600
                for name, values in seconds.items()
            },
        },
    }


def _check(ways: dict[str, Callable]) -> dict[str, dict[str, float]]:
    """The losses of each way's first update.

    Raises:
        AssertionError: ours are not stock's.
    """
    found = {}
    for name, way in ways.items():
        way()
        found[name] = way.losses()
    assert found["ours"], "no losses were logged"
    assert found["ours"].keys() == found["stock"].keys(), found
    for name, value in found["stock"].items():
        assert abs(found["ours"][name] - value) <= 1e-4 * max(1.0, abs(value)), (name, found)
    return found


def report(found: dict) -> str:
    """The figures as text."""
    lines = [f"{found['machine']['device']}, {found['machine']['threads']} threads"]
    for name, seconds in found["seconds"].items():
        line = f"{name:30} {seconds['median']:.3f} s ({seconds['min']:.3f} to {seconds['max']:.3f})"
        if name in found["ratio_to_stock"]:
            ratio = found["ratio_to_stock"][name]
            line += (
                f"  {ratio['median']:.2f} times as fast ({ratio['min']:.2f} to {ratio['max']:.2f})"
            )
        lines.append(line)
    hours = found["schedule"]["hours"].items()
    lines.append(
        f"the config's {found['schedule']['images']:,} images, of this size and at these rates: "
        + ", ".join(f"{name} {value:,.0f} h" for name, value in hours)
    )
    return "\n".join(lines)
