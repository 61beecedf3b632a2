"""Learn to restore images: a degradation a batch, and the clean image to find again."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils import comm

from pretrain.config import get_pretrain_cfg
from pretrain.data.loader import ValSet
from pretrain.data.order import Stream, generator
from pretrain.data.records import CaptionRecord
from pretrain.export import Exported
from pretrain.methods.ipt.degrade import degrade, resize
from pretrain.methods.ipt.loss import patch_contrast
from pretrain.methods.ipt.network import IPT, Sizes, sizes_of
from pretrain.methods.ipt.origin import PREFIX, Origin, origin_of, released_state, tasks_of
from pretrain.methods.ipt.samples import CropSamples, parts
from pretrain.methods.ipt.scores import psnr_y
from pretrain.methods.ipt.tasks import SIX_TASKS, Task, parse_tasks
from pretrain.methods.method import Batch, Method
from pretrain.transforms import upload
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.loop import share_of
from virtex_d2.engine.safe_load import StoredCheckpoint

logger = logging.getLogger(__name__)

_LARGEST_PSNR = 100.0  # dB, of a patch that is restored without any error: means stay finite
# Keys of other methods: who sets one would wait for its effect.
_NOT_USED = (
    *("DATA.IMAGE_SIZE", "DATA.CROP_SCALE", "DATA.CROP_RATIO", "DATA.FLIP_PROB"),
    *("DATA.COLOR_JITTER", "DATA.COLOR_JITTER_PROB"),
)


class Pair(NamedTuple):
    """A task's (N, 3, P, P) degraded and (N, 3, kP, kP) clean patches, float32 on 0-255."""

    degraded: torch.Tensor
    clean: torch.Tensor


class Restoration(Method):
    """The image processing transformer on IPT.TASKS (arXiv 2012.00364).

    A batch has one task, drawn from the iteration: the same in all processes. Validation has all of
    them, on the centre of each image; metrics are PSNR of the luma, "psnr" their mean over tasks.
    """

    def __init__(self, cfg: CfgNode, num_outputs: int):
        super().__init__(cfg, num_outputs)
        group = cfg.IPT
        self.tasks = _tasks(cfg)
        # heads and tails of the tasks that a batch does not have
        self.unused_parameters = len(self.tasks) > 1
        self.network = IPT(_sizes(cfg))
        self.losses = ("loss_l1", "loss_contrast") if group.CONTRAST_WEIGHT else ("loss_l1",)
        self.metrics = ("psnr", *(f"psnr_{task.name}" for task in self.tasks))
        sources = _new_tasks(cfg)
        self._stand_ins = {name: source for name, source in sources.items() if source}
        names = [task.name for task in self.tasks]
        self._new = [names.index(name) for name, source in sources.items() if not source]
        self.fresh = tuple(f"{PREFIX}{part}.{n}." for n in self._new for part in ("head", "tail"))
        self._seed = cfg.SEED
        self._contrast, self._temperature = group.CONTRAST_WEIGHT, group.TEMPERATURE

    @staticmethod
    def add_config(cfg: CfgNode) -> None:
        group = cfg.IPT = type(cfg)()
        # What is restored: x2, x3, x4, derain, and noise with its deviation. In this order heads,
        # tails and embeddings are numbered.
        group.TASKS = list(SIX_TASKS)
        # Those of TASKS that MODEL.WEIGHTS lacks. Head, tail and embedding of "noise70" start anew;
        # of "noise70:noise50" they start as, and are evaluated by, the checkpoint's noise50.
        group.NEW_TASKS = []
        # Side in pixels of the degraded patches, a multiple of 3; channels of the maps; layers of
        # the encoder, and of the decoder; heads of attention.
        group.PATCH_SIZE = 48
        group.FEATURES = 64
        group.LAYERS = 12
        group.HEADS = 12
        # Where positions are added: "once", in "every" layer, "none"; without MLP tokens are not
        # embedded, and no task is either.
        group.POSITIONS = "once"
        group.MLP = True
        # Weight of the contrast of patches (0: without) beside L1 on the scale 0-255, and its
        # temperature: those of the authors' MindSpore code. The paper's equation has none, i.e. 1.
        group.CONTRAST_WEIGHT = 0.1
        group.TEMPERATURE = 0.07
        # Whether training crops are flipped and transposed at random.
        group.FLIPS = False
        # A folder of gray layers of rain, such as RainTrainL's rainstreak-*.png. Empty: drawn.
        group.RAIN_STREAKS = ""

    @staticmethod
    def check(cfg: CfgNode) -> None:
        _tasks(cfg)
        _sizes(cfg)
        group = cfg.IPT
        _new_tasks(cfg)
        if group.CONTRAST_WEIGHT < 0 or group.TEMPERATURE <= 0:
            raise InputError(
                f"IPT.CONTRAST_WEIGHT {group.CONTRAST_WEIGHT} must not be negative, and "
                f"IPT.TEMPERATURE {group.TEMPERATURE} must be positive."
            )
        if group.CONTRAST_WEIGHT and share_of(cfg.SOLVER.IMS_PER_BATCH) < 2:
            raise InputError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is one image for each of "
                f"{comm.get_world_size()} processes, whose patches cannot be contrasted with "
                "another's: raise it, or set IPT.CONTRAST_WEIGHT to 0."
            )
        defaults = get_pretrain_cfg()
        for key in _NOT_USED:
            name = key.removeprefix("DATA.")
            if cfg.DATA[name] != defaults.DATA[name]:
                raise InputError(
                    f"{key} {cfg.DATA[name]}: MODEL.OBJECTIVE ipt has no use for it. Leave it out; "
                    "crops are IPT.PATCH_SIZE times the scale, and IPT.FLIPS turns them."
                )

    @classmethod
    def build_samples(
        cls, cfg: CfgNode, train: Sequence[CaptionRecord] | None, val: Sequence[CaptionRecord]
    ) -> CropSamples:
        return CropSamples(cfg, _tasks(cfg))

    def task_at(self, iteration: int) -> int:
        """The number of the task of an iteration, each as likely."""
        rng = generator(self._seed, Stream.RESTORATION_TASK, iteration)
        return int(rng.integers(len(self.tasks)))

    def prepare(self, batch: dict) -> Batch:
        """The batch's images on the device, and "pairs": the number of a task -> `Pair`."""
        device = next(self.parameters()).device
        image = upload(batch["image"], device)
        place = upload(batch["place"], device)
        streaks = upload(batch["streaks"], device).float() if "streaks" in batch else None
        drawn = "iteration" in batch  # is in training
        numbers = [self.task_at(batch["iteration"])] if drawn else range(len(self.tasks))
        pairs, seeds = {}, batch["seed"].tolist()
        for number in numbers:
            task = self.tasks[number]
            side = task.scale * self.network.sizes.patch
            clean = parts(image, place, side).float().contiguous()
            pairs[number] = Pair(degrade(clean, task, seeds, streaks), clean)
        return {"image": image, "pairs": pairs}

    def forward(self, batch: Batch) -> Batch:
        return self._losses(self._restored(batch), batch)

    def _restored(self, batch: Batch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Number of a task -> (N, 3, kP, kP) restored and (N, T, D) tokens."""
        pairs = batch["pairs"]
        return {n: self.network.restore(pair.degraded, n) for n, pair in pairs.items()}

    def _losses(self, found: dict, batch: Batch) -> Batch:
        pairs = batch["pairs"]
        each = [F.l1_loss(x, pairs[number].clean.to(x.dtype)) for number, (x, _) in found.items()]
        losses = {"loss_l1": torch.stack(each).mean()}
        if self._contrast:
            each = [patch_contrast(tokens, self._temperature) for _, tokens in found.values()]
            losses["loss_contrast"] = self._contrast * torch.stack(each).mean()
        return losses

    def measure(self, batch: Batch) -> dict[str, tuple[torch.Tensor, int]]:
        """Losses; PSNR of each task, and of its input ("input_psnr_x2": enlarged bicubically)."""
        count, restored = self.count(batch), self._restored(batch)
        numbers = {name: (loss, count) for name, loss in self._losses(restored, batch).items()}
        means = []
        for number, (found, _) in restored.items():
            task, (degraded, clean) = self.tasks[number], batch["pairs"][number]
            means.append(_psnr(found, clean, task))
            numbers[f"psnr_{task.name}"] = (means[-1], count)
            given = resize(degraded, task.scale) if task.scale > 1 else degraded
            numbers[f"input_psnr_{task.name}"] = (_psnr(given, clean, task), count)
        return {**numbers, "psnr": (torch.stack(means).mean(), count)}

    def pictures(self, val: ValSet, count: int) -> list[tuple[str, np.ndarray]]:
        """Of each image a row for every task: the input, what is restored, and the truth."""
        of_images = (val.of_image(index)[0] for index in range(min(count, len(val.records))))
        samples = [sample for of_image in of_images for sample in of_image]
        if not samples:
            return []
        training = self.training
        self.eval()
        with torch.no_grad():
            together = [{**s, "position": n, "failures": []} for n, s in enumerate(samples)]
            batch = self.prepare(val.samples.collate(together))
            restored = self._restored(batch)
        self.train(training)
        side = val.samples.side
        rows = []
        for number, (found, _) in restored.items():
            degraded, clean = batch["pairs"][number]
            columns = [F.interpolate(x.float(), (side, side)) for x in (degraded, found, clean)]
            rows.append(torch.cat(columns, 3))  # (N, 3, S, 3 S)
        drawn = torch.cat(rows, 2).clamp(0, 255).round().to("cpu", torch.uint8)
        return [(f"restored/{s['image_id']}", d.numpy()) for s, d in zip(samples, drawn)]

    def adapt(self, state: Batch, stored: StoredCheckpoint, fresh: tuple[str, ...]) -> Batch:
        """Take this model's tasks out of a checkpoint: of ours or released, with more tasks or not.

        Tasks that the checkpoint does not name are taken in order, where it has as many as this
        model is to find there. A new task that begins as another one does so where the checkpoint
        has not got it.
        """
        path, found, origin = stored.path, released_state(stored), origin_of(stored)
        theirs = sizes_of(found, path, heads=1, positions=origin.positions or "once")
        self._check_sizes(theirs, origin, path)
        new = self._new if fresh else []
        old = [number for number in range(len(self.tasks)) if number not in new]
        source = self._find_tasks(old, tasks_of(origin, theirs, path), theirs, path)
        own = ("head.", "tail.")
        taken = {name: tensor for name, tensor in found.items() if not name.startswith(own)}
        for number, theirs_number in source.items():
            for part in ("head", "tail"):
                prefix = f"{part}.{theirs_number}."
                taken |= {
                    f"{part}.{number}.{name.removeprefix(prefix)}": tensor
                    for name, tensor in found.items()
                    if name.startswith(prefix)
                }
        if theirs.mlp:
            name = "body.query_embed.weight"
            rows = self.network.state_dict()[name].to("cpu", copy=True)
            for number, theirs_number in source.items():
                rows[number] = found[name][theirs_number]
            taken[name] = rows
        if new:
            logger.info("Embeddings start anew: %s", ", ".join(self.tasks[n].name for n in new))
        return {PREFIX + name: tensor for name, tensor in taken.items()}

    def _check_sizes(self, theirs: Sizes, origin: Origin, path: str) -> None:
        """Refuse a checkpoint of another body, by the keys that would have to be set."""
        own = self.network.sizes
        same = {"FEATURES": "features", "PATCH_SIZE": "patch", "LAYERS": "layers", "MLP": "mlp"}
        pairs = {key: (getattr(theirs, name), getattr(own, name)) for key, name in same.items()}
        pairs["HEADS"] = (origin.heads or own.heads, own.heads)
        if origin.positions or "none" in (theirs.positions, own.positions):
            pairs["POSITIONS"] = (theirs.positions, own.positions)
        differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        told = [f"IPT.{key} {there}, not {here}" for key, (there, here) in differing.items()]
        if told:
            raise InputError(
                f"MODEL.WEIGHTS {path}: is a network of other sizes: it has {'; '.join(told)}. "
                "Nothing was loaded. Set these keys to what the checkpoint has."
            )

    def _find_tasks(
        self, old: list[int], names: tuple[str, ...] | None, theirs: Sizes, path: str
    ) -> dict[int, int]:
        """This model's task numbers -> those of the checkpoint."""
        wanted = [self.tasks[number] for number in old]
        if names is None:
            if len(wanted) != len(theirs.scales):
                raise InputError(
                    f"MODEL.WEIGHTS {path}: does not say what its {len(theirs.scales)} tasks are, "
                    f"and IPT.TASKS looks for {len(wanted)} there: "
                    f"{', '.join(task.name for task in wanted) or 'none'}. Name as many, in its "
                    "order."
                )
            names = tuple(task.name for task in wanted)
        source = {}
        for number, task in zip(old, wanted):
            name = task.name if task.name in names else self._stand_ins.get(task.name, task.name)
            if name not in names:
                raise InputError(
                    f"MODEL.WEIGHTS {path}: has no task {name}, but {', '.join(names)}. Leave "
                    f"{task.name} out of IPT.TASKS, or put it into IPT.NEW_TASKS to learn it anew."
                )
            source[number] = names.index(name)
            if theirs.scales[source[number]] != task.scale:
                raise InputError(
                    f"MODEL.WEIGHTS {path}: its task {source[number]} enlarges by "
                    f"{theirs.scales[source[number]]}, {task.name} by {task.scale}. Nothing was "
                    "loaded. Give the checkpoint of this task."
                )
        return source

    @staticmethod
    def export(state: Batch, cfg: CfgNode) -> dict[str, Exported]:
        """The network by released names; no backbone: there is no ResNet in it."""
        tensors = {
            name.removeprefix(PREFIX): tensor.detach().cpu().contiguous()
            for name, tensor in state.items()
        }
        group = cfg.IPT
        origin = Origin(tuple(group.TASKS), group.HEADS, group.POSITIONS)
        pixels = {"pixels": "RGB, 0 to 255"}
        return {"restorer": Exported(tensors, {**origin.metadata(), **pixels})}


def _tasks(cfg: CfgNode) -> list[Task]:
    return parse_tasks(cfg.IPT.TASKS, "IPT.TASKS")


def _new_tasks(cfg: CfgNode) -> dict[str, str]:
    """Tasks that a checkpoint lacks -> the task that each begins as; "" anew."""
    tasks = {task.name: task for task in _tasks(cfg)}
    parted = [str(entry).partition(":") for entry in cfg.IPT.NEW_TASKS]
    for name, _, source in parted:
        if name not in tasks:
            raise InputError(f"IPT.NEW_TASKS: {name!r} is not among IPT.TASKS {cfg.IPT.TASKS}.")
        if source and parse_tasks([source], "IPT.NEW_TASKS")[0].scale != tasks[name].scale:
            raise InputError(
                f"IPT.NEW_TASKS {name}:{source}: {source} does not enlarge as {name} does, whose "
                "tail has other shapes. Name a task of its scale, or none to start anew."
            )
    if len({name for name, _, _ in parted}) < len(parted):
        raise InputError(f"IPT.NEW_TASKS {cfg.IPT.NEW_TASKS}: names a task twice. Keep one.")
    return {name: source for name, _, source in parted}


def _sizes(cfg: CfgNode) -> Sizes:
    group = cfg.IPT
    scales = tuple(task.scale for task in _tasks(cfg))
    body = (group.FEATURES, group.PATCH_SIZE, group.LAYERS, group.HEADS)
    return Sizes(scales, *body, group.POSITIONS, group.MLP)


def _psnr(found: torch.Tensor, clean: torch.Tensor, task: Task) -> torch.Tensor:
    """Mean over images, in dB, on the CPU."""
    border = task.scale if task.scale > 1 else 0
    each = [min(psnr_y(f, c, border), _LARGEST_PSNR) for f, c in zip(found, clean)]
    return torch.tensor(each, dtype=torch.float64).mean()
