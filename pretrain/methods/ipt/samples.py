"""Clean crops to degrade, and what is random about each."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from pretrain.data.loader import Samples, Visit
from pretrain.methods.ipt.tasks import Task
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import images_in, read_image


class WholeImage:
    """Stands where other methods have a view: says that images are not to be reduced."""

    smallest_side = 0


class CropSamples(Samples):
    """Clean squares as large as the most enlarging task needs, of which each task takes a part.

    A sample is "image" (3, S, S) uint8; "place" (2,) float64, where in [0, 1) the part begins
    between the topmost and the lowest place, the leftmost and the rightmost; "seed" () int64 of
    noise and rain; and where the config names a folder of streaks, "streaks" (1, P, P) uint8 of a
    patch. Images smaller than S are enlarged, bilinearly.
    """

    def __init__(self, cfg: CfgNode, tasks: Sequence[Task]):
        super().__init__(cfg)
        self.train_view = self.val_view = WholeImage()
        self.patch = cfg.IPT.PATCH_SIZE
        self.side = self.patch * max(task.scale for task in tasks)
        self._turns = 8 if cfg.IPT.FLIPS else 1
        rain = any(task.rain for task in tasks) and cfg.IPT.RAIN_STREAKS
        self._layers = _read_streaks(cfg.IPT.RAIN_STREAKS, self.patch) if rain else []

    def train(self, visit: Visit) -> dict[str, torch.Tensor]:
        rng = visit.rng()
        place = rng.random(2)
        side = min(self.side, *visit.image.size)
        y, x = (int(u * (n - side + 1)) for u, n in zip(place, visit.image.size[::-1]))
        pixels = visit.image.crop((x, y, x + side, y + side), self.side)
        turned = _turned(pixels, int(rng.integers(self._turns)))
        return {**self._random(rng, place), "image": _as_tensor(turned)}

    def val(self, visit: Visit) -> list[dict[str, torch.Tensor]]:
        """The central square, of which every task takes the centre."""
        width, height = visit.image.size
        side = min(self.side, width, height)
        x, y = (width - side) // 2, (height - side) // 2
        image = visit.image.crop((x, y, x + side, y + side))
        if side < self.side:
            image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return [{**self._random(visit.rng(), np.full(2, 0.5)), "image": _as_tensor(image)}]

    def _random(self, rng: np.random.Generator, place: np.ndarray) -> dict[str, torch.Tensor]:
        drawn = {"place": torch.from_numpy(place), "seed": torch.tensor(int(rng.integers(2**63)))}
        if not self._layers:
            return drawn
        layer = self._layers[int(rng.integers(len(self._layers)))]
        y, x = (int(rng.integers(n - self.patch + 1)) for n in layer.shape)
        part = layer[y : y + self.patch, x : x + self.patch]
        return {**drawn, "streaks": torch.from_numpy(part.copy())[None]}


def parts(images: torch.Tensor, place: torch.Tensor, side: int) -> torch.Tensor:
    """(N, C, S, S) -> (N, C, side, side), each from its own place; (N, 2) of `CropSamples`.

    An image's crop and the part of it have one place, so that parts, too, come from anywhere in
    an image, its borders included.
    """
    room = images.shape[2] - side + 1
    first = (place * room).long()  # (N, 2)
    reach = torch.arange(side, device=images.device)
    rows, columns = (first[:, axis, None] + reach for axis in (0, 1))  # (N, side) each
    number = torch.arange(len(images), device=images.device)
    # indices around a slice put the colours last
    taken = images[number[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return taken.permute(0, 3, 1, 2)


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """(S, S, 3) in one of the eight ways to lay a square down; 0 leaves it."""
    pixels = np.rot90(pixels, turn % 4)
    return pixels[:, ::-1] if turn >= 4 else pixels


def _as_tensor(pixels: np.ndarray | Image.Image) -> torch.Tensor:
    """(S, S, 3) -> (3, S, S), channels last in memory."""
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)


def _read_streaks(folder: str, patch: int) -> list[np.ndarray]:
    """(H, W) uint8 each: gray layers of rain, kept in memory."""
    layers = []
    for name in images_in(folder):
        path = os.path.join(folder, name)
        try:
            layer = np.asarray(read_image(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error}. Replace or remove it.") from error
        height, width, _ = layer.shape
        if min(height, width) < patch:
            raise InputError(
                f"{path}: is {width}x{height} pixels, less than IPT.PATCH_SIZE {patch} on a side. "
                "Remove it from IPT.RAIN_STREAKS."
            )
        if (layer != layer[:, :, :1]).any():
            raise InputError(
                f"{path}: is coloured; expected the gray layer of rain alone, as RainTrainL's "
                "rainstreak-*.png, and not a rainy photograph. Give a folder of such layers."
            )
        layers.append(layer[:, :, 0].copy())
    return layers
