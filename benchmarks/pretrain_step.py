"""The pretraining step beside a plain one: images a second, time of its parts, FLOP/s, memory.

R-50 bicaptioning on random images and captions as long as COCO's. The plain step is
`benchmarks.plain`: on a CPU in float32, on a GPU under float16 autocast with a loss scaler, in
torch's own memory layout, with SGD, clipping and Lookahead as everyone has them. Before anything is
timed the losses and gradients of both are compared in float32, and the losses of the timed
precision with them. Memory is that of a process of its own for each way, less what it held before
the model was built, beside the plain step in the same precision.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring import Clock, ceilings, machine, peak_memory, resident_memory
from benchmarks.plain import PlainBicaptioner
from benchmarks.rounds import count, ratios, split, spread, take_turns
from pretrain.backbone import BLOCKS
from pretrain.config import get_pretrain_cfg
from pretrain.methods.method import build_method
from pretrain.optim import Lookahead, build_optimizer
from pretrain.transforms import PIXEL_MEAN, PIXEL_STD, draw_jitter, normalize, upload
from virtex_d2.engine.loop import step_where_finite

ROOT = Path(__file__).resolve().parents[1]

# How many of 7 215 captions of COCO 2017 have 9, 10 ... 30 pieces (of 4 000), specials included.
SHORTEST_CAPTION = 9
CAPTIONS = (28, 285, 988, 1341, 1410, 1062, 739, 524, 294, 165, 122)
CAPTIONS += (81, 56, 33, 19, 15, 17, 6, 4, 5, 4, 17)
WAYS = ("ours", "plain", "plain_same_precision")
JITTER = (0.4, 0.4, 0.4, 0.1)  # as `pretrain.transforms.TrainTransform`
UPDATES = 10  # in a turn on a GPU
PAPER_IMAGES = 500_000 * 256  # iterations and batch of the paper's runs (section 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    batch = 256 if torch.cuda.is_available() else 16
    parser.add_argument("--batch", type=count, default=batch, help=f"images (default {batch})")
    parser.add_argument("--size", type=count, default=224, help="of an image (default 224)")
    parser.add_argument("--width", type=count, default=1024, help="of the decoder (default 1024)")
    parser.add_argument("--layers", type=count, default=1, help="of the decoder (default 1)")
    parser.add_argument("--vocab", type=count, default=10_000, help="pieces (default 10 000)")
    parser.add_argument("--words", type=count, help="of every caption (default: as COCO's)")
    parser.add_argument("--rounds", type=count, default=7, help="turns of each (default 7)")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument(
        "--recompute",
        choices=("", BLOCKS),
        default="",
        help="what ours computes again in the backward pass (default: nothing)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="ours has its backbone compiled: minutes, at first"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)


class Setting:
    """Models of equal weights, a batch, and a step of each way.

    Args:
        args: of `add_arguments`.
        needed: the ways that will be run. A model that none of them runs is not kept.
    """

    def __init__(self, args: argparse.Namespace, needed: tuple[str, ...] = WAYS):
        if args.threads:
            torch.set_num_threads(args.threads)
        self.device = torch.device(args.device)
        self.clock = Clock(self.device)
        torch.backends.cudnn.benchmark = True  # as training does
        cfg = get_pretrain_cfg()
        cfg.MODEL.TEXTUAL.HIDDEN_SIZE = args.width
        cfg.MODEL.TEXTUAL.NUM_LAYERS = args.layers
        cfg.MODEL.TEXTUAL.MAX_LENGTH = max(cfg.MODEL.TEXTUAL.MAX_LENGTH, args.words or 0)
        cfg.MODEL.VISUAL.RECOMPUTE = args.recompute
        cfg.MODEL.VISUAL.COMPILE = args.compile
        self._cfg = cfg
        torch.manual_seed(0)
        self.ours = self.plain = None
        ours = build_method(cfg, args.vocab)
        if set(needed) - {"ours"}:
            self.plain = PlainBicaptioner.of(ours, cfg.MODEL.TEXTUAL.DROPOUT).to(self.device)
        if "ours" in needed:
            self.ours = ours.to(self.device)
        self.batch = make_batch(args)
        self.ways = {name: getattr(self, f"_{name}")() for name in needed}

    def _ours(self) -> Callable[[], dict[str, float]]:
        cfg, model = self._cfg, self.ours
        optimizer = build_optimizer(cfg, model.parameter_groups(cfg))
        Lookahead(optimizer, cfg.SOLVER.LOOKAHEAD.STEPS, cfg.SOLVER.LOOKAHEAD.ALPHA)

        random = np.random.default_rng(0)
        jitter = torch.stack([draw_jitter(JITTER, 0.8, random) for _ in self.batch["image"]])

        def load() -> dict[str, torch.Tensor]:
            given = self.batch | model.places(self.batch)
            batch = {k: upload(v, self.device) for k, v in given.items()}
            batch["image"] = normalize(batch["image"], jitter, torch.channels_last)
            return batch

        return self._step(model, optimizer, load, model, torch.bfloat16)

    def _plain(self) -> Callable[[], dict[str, float]]:
        return self._plain_step(torch.float16 if self.device.type == "cuda" else None)

    def _plain_same_precision(self) -> Callable[[], dict[str, float]]:
        return self._plain_step(torch.bfloat16)

    def _plain_step(self, dtype: torch.dtype | None) -> Callable[[], dict[str, float]]:
        solver, model = self._cfg.SOLVER, self.plain
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=solver.MOMENTUM)
        Lookahead(optimizer, solver.LOOKAHEAD.STEPS, solver.LOOKAHEAD.ALPHA)
        mean, std = (torch.tensor(of).view(3, 1, 1) for of in (PIXEL_MEAN, PIXEL_STD))
        image = (self.batch["image"].float() - mean) / std  # plain loaders do that on the host
        given = [image, self.batch["caption_tokens"], self.batch["caption_lengths"]]

        def load() -> list[torch.Tensor]:
            return [tensor.to(self.device) for tensor in given]

        return self._step(model, optimizer, load, lambda batch: model(*batch), dtype)

    def _step(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        load: Callable,
        losses: Callable[..., dict[str, torch.Tensor]],
        dtype: torch.dtype | None,
    ) -> Callable[[], dict[str, float]]:
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

        def update(lap: Callable[[str], None]) -> None:
            batch = load()
            lap("data")
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                total = sum(losses(batch).values())
            lap("forward")
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(total).backward()
            lap("backward")
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), self._cfg.SOLVER.CLIP_GRAD_NORM
            )
            if scaler.is_enabled():
                scaler.step(optimizer)
                scaler.update()
            else:
                step_where_finite(optimizer, norm)
            lap("optimizer")

        def turn() -> dict[str, float]:
            self.clock.start()
            if self.device.type == "cpu":
                update(self.clock.lap)
                return dict(self.clock.parts)
            # whole updates: to time parts of one is to wait for each, which training does not
            for _ in range(UPDATES):
                update(lambda part: None)
            self.clock.lap("update")
            return {part: seconds / UPDATES for part, seconds in self.clock.parts.items()}

        return turn

    def check(self) -> dict[str, float]:
        """Losses without dropout: of both in float64 on four images, of ours as it is timed.

        Raises:
            AssertionError: losses or gradients differ by more than the types' rounding.
        """
        self.ours.visual.compiled = False  # would be anew for each type
        batch = {key: value.to(self.device) for key, value in self.batch.items()}
        batch["image"] = normalize(batch["image"])
        few = {key: value[:4] for key, value in batch.items()}
        few["image"] = few["image"].double()
        found, gradients = {}, {}
        for name, model, run in (
            ("ours", self.ours, self.ours),
            ("plain", self.plain, lambda batch: self.plain(*batch.values())),
        ):
            with no_dropout(model.double()):
                loss = sum(run(few).values())
                loss.backward()
                found[f"{name}, float64"] = loss.item()
                first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
                gradients[name] = first.weight.grad.clone()
                model.zero_grad(set_to_none=True)
                model.float()
                with torch.no_grad():
                    found[f"{name}, float32"] = sum(run(batch).values()).item()
                    with torch.autocast(self.device.type, torch.bfloat16):
                        found[f"{name}, bfloat16"] = sum(run(batch).values()).item()
        difference = (gradients["ours"] - gradients["plain"]).norm() / gradients["plain"].norm()
        assert abs(found["ours, float64"] / found["plain, float64"] - 1) < 1e-6, found
        assert difference < 1e-6, f"gradients of the first convolution differ by {difference}"
        tolerances = {"float32": 1e-4, "bfloat16": 2e-2}
        if self._cfg.MODEL.VISUAL.COMPILE:
            self.ours.visual.compiled = True
            tolerances["compiled"] = 2e-2
            with no_dropout(self.ours), torch.autocast(self.device.type, torch.bfloat16):
                found["ours, compiled"] = sum(self.ours(batch).values()).item()
        for dtype, tolerance in tolerances.items():
            assert abs(found[f"ours, {dtype}"] / found["plain, float32"] - 1) < tolerance, found
        return found


class no_dropout:  # noqa: N801 - reads as a statement
    """Dropout off and batch norm as in training, within the block."""

    def __init__(self, model: torch.nn.Module):
        self._modules = [
            m
            for m in model.modules()
            if isinstance(m, torch.nn.Dropout | torch.nn.MultiheadAttention)
        ]

    def __enter__(self) -> None:
        for module in self._modules:
            module.eval()

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.train()


def make_batch(args: argparse.Namespace, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if args.words:
        drawn = torch.full((args.batch,), args.words)
    else:
        counts = torch.tensor(CAPTIONS, dtype=torch.float32)
        drawn = SHORTEST_CAPTION + torch.multinomial(counts, args.batch, True, generator=generator)
    shape = (args.batch, int(drawn.max()))
    tokens = torch.randint(4, args.vocab, shape, generator=generator)
    tokens[:, 0] = 1  # [SOS]
    places = torch.arange(shape[1])
    tokens[places == drawn.unsqueeze(1) - 1] = 2  # [EOS]
    tokens[places >= drawn.unsqueeze(1)] = 0
    image = (args.batch, 3, args.size, args.size)
    batch = {
        "image": torch.randint(0, 256, image, generator=generator, dtype=torch.uint8),
        "caption_tokens": tokens,
        "caption_lengths": drawn,
    }
    if args.device != "cpu":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return batch


def measure(args: argparse.Namespace) -> dict:
    """All figures; seconds are medians over rounds."""
    setting = Setting(args, ("ours", "plain"))
    losses = setting.check()
    # what is computed twice is no more of an achievement, and compiled code is not counted
    setting.ours.visual.recompute, setting.ours.visual.compiled = "", False
    turns_of = UPDATES if setting.device.type == "cuda" else 1
    flops = {name: _flops(turn) / turns_of for name, turn in setting.ways.items()}
    setting.ours.visual.recompute, setting.ours.visual.compiled = args.recompute, args.compile
    turns = take_turns(setting.ways, args.rounds, warm_up=2)
    found = {
        "settings": {
            key: value for key, value in vars(args).items() if key not in ("memory_of", "profile")
        },
        "machine": machine(setting.device),
        "ceilings": ceilings(setting.device),
        "losses": losses,
        "ways": {},
    }
    totals = {name: [sum(turn.values()) for turn in turns[name]] for name in turns}
    for name, seconds in totals.items():
        found["ways"][name] = {
            "images_per_s": spread([args.batch / second for second in seconds]),
            "seconds": split(turns[name]),
            "gflop_per_image": flops[name] / args.batch / 1e9,
            "tflops": flops[name] / spread(seconds)["median"] / 1e12,
        }
    found["hours_of_paper"] = {
        name: PAPER_IMAGES / way["images_per_s"]["median"] / 3600
        for name, way in found["ways"].items()
    }
    found["ratio"] = ratios(totals["plain"], totals["ours"])
    found["share_of_bfloat16_ceiling"] = (
        found["ways"]["ours"]["tflops"] / found["ceilings"]["matmul_bfloat16_tflops"]
    )
    found["memory_bytes"] = {
        name: _memory_in_a_process(args, name) for name in ("ours", "plain_same_precision")
    }
    found["memory_ratio"] = (
        found["memory_bytes"]["ours"] / found["memory_bytes"]["plain_same_precision"]
    )
    return found


def profile(args: argparse.Namespace) -> str:
    """Where a step of ours spends its time, a table by operator."""
    setting = Setting(args, ("ours",))
    step = setting.ways["ours"]
    step(), step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        step()
    order = f"self_{setting.device.type}_time_total"
    return profiled.key_averages().table(order, row_limit=30, max_name_column_width=60)


def report(found: dict) -> str:
    """The figures as text."""
    lines = [f"{found['machine']['device']}, {found['machine']['threads']} threads"]
    lines += [f"{name} {value:.3g}" for name, value in found["ceilings"].items()]
    for name, way in found["ways"].items():
        rate = way["images_per_s"]
        parts = "  ".join(f"{part} {seconds:.3f} s" for part, seconds in way["seconds"].items())
        lines.append(
            f"{name:6} {rate['median']:8.2f} images/s ({rate['min']:.2f} to {rate['max']:.2f})  "
            f"{way['tflops']:.3f} TFLOP/s of {way['gflop_per_image']:.1f} GFLOP an image  {parts}"
        )
    ratio, memory = found["ratio"], found["memory_bytes"]
    lines += [
        f"ours is {ratio['median']:.2f} times as fast ({ratio['min']:.2f} to {ratio['max']:.2f}), "
        f"at {found['share_of_bfloat16_ceiling']:.0%} of the bfloat16 matrix product's rate",
        "memory: " + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items()),
        f"memory, ours / plain in the same precision: {found['memory_ratio']:.2f}",
        f"{PAPER_IMAGES:,} images, as the paper's runs see, at these rates: "
        + ", ".join(f"{name} {hours:,.0f} h" for name, hours in found["hours_of_paper"].items()),
    ]
    return "\n".join(lines)


def _flops(step: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _memory_in_a_process(args: argparse.Namespace, name: str) -> int:
    options = [
        part
        for key in ("batch", "size", "width", "layers", "vocab", "threads", "device", "recompute")
        for part in (f"--{key}", str(getattr(args, key)))
    ]
    options += ["--words", str(args.words)] if args.words else []
    options += ["--compile"] if args.compile else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pretrain_step", *options, "--memory-of", name],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def _memory(args: argparse.Namespace) -> int:
    before = resident_memory(torch.device(args.device))
    setting = Setting(args, (args.memory_of,))
    step = setting.ways[args.memory_of]
    step(), step()
    return peak_memory(step, setting.device) - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(_memory(arguments)))
    else:
        print(report(measure(arguments)))
