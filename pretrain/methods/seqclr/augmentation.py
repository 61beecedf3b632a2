"""Views of a word that keep its letters in their order: drawn on the host, made on the device.

What SeqCLR's authors release (amazon-research/semimtr-text-recognition,
`dataset/augmentation_pipelines.py`, severity 2), with the paper's number of changes (arXiv
2012.10873, supplement: some of seven, never flips, nor large turns or shifts along the text). All
that is random comes from the sample's generator. The device then makes all views of a batch at
once; all that moves pixels is one `grid_sample`, in this order: crop, perspective, warp; then come
contrast, blur and sharpening, and STYLE. The released code resizes after it, in random order.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from virtex_d2.engine.errors import InputError

CHANGES = (
    *("CONTRAST", "BLUR", "CROP_VERTICAL", "CROP_HORIZONTAL", "SHARPEN", "WARP", "PERSPECTIVE"),
)
# Control points of the warp along each side.
POINTS = 4
_GREY = 127.0  # contrast is about it

# Where in a view's numbers what stands; lengths and shifts are fractions of height or width.
_PARTS = {
    "contrast": 1,  # factor
    "blur": 1,  # deviation in pixels
    "crop": 4,  # top, bottom, left, right
    "sharpen": 2,  # share, lightness
    "perspective": 8,  # x and y of each corner inwards: top left, top right, bottom right and left
    "warp": 2 * POINTS**2,  # x, then y, of the points
    "gain": 1,  # negative: inverted
    "offset": 3,  # of each colour, on the scale 0-255
    "noise": 1,  # deviation, likewise
}
_ENDS = np.cumsum(list(_PARTS.values())).tolist()
PART = {name: slice(end - _PARTS[name], end) for name, end in zip(_PARTS, _ENDS)}
NUMBERS = _ENDS[-1]
_REACH = 3  # deviations that a blur's kernel reaches


def add_augmentation_config(cfg: CfgNode) -> None:
    """Add AUGMENT and STYLE to the method's group `cfg`."""
    augment = cfg.AUGMENT = type(cfg)()
    # How many of the seven changes a view gets, from and to; which ones is drawn.
    augment.NUMBER = (1, 5)
    # Ranges: of the factor about the middle grey,
    augment.CONTRAST = (0.5, 1.0)
    # of the deviation in pixels,
    augment.BLUR = (0.5, 1.5)
    # of what is cut from top and bottom, and from left and right, each as a fraction,
    augment.CROP_VERTICAL = (0.0, 0.4)
    augment.CROP_HORIZONTAL = (0.0, 0.02)
    # of the sharpened image's share, and of its lightness,
    augment.SHARPEN = (0.0, 0.5)
    # of the deviation, as a fraction, by which points of a 4 x 4 grid move,
    augment.WARP = (0.02, 0.03)
    # and of the deviation, as a fraction, by which corners move inwards.
    augment.PERSPECTIVE = (0.01, 0.02)
    # Each view is inverted or not, and has contrast, colour and noise of its own, so that views
    # are not told by the style that they share: for scene text. For handwriting, whose style is
    # always ink on paper, False. Not of SeqCLR.
    cfg.STYLE = True


def check_augmentation(cfg: CfgNode, group: str) -> None:
    """Refuse values of the method's group `cfg` that cannot be."""
    limits = dict.fromkeys(CHANGES, 1.0) | {"BLUR": 10.0, "CROP_VERTICAL": 0.45}
    limits |= {"CONTRAST": 4.0, "CROP_HORIZONTAL": 0.45, "WARP": 0.1, "PERSPECTIVE": 0.1}
    for name, limit in {"NUMBER": len(CHANGES), **limits}.items():
        value = tuple(cfg.AUGMENT[name])
        if len(value) != 2 or not 0 <= value[0] <= value[1] <= limit:
            raise InputError(
                f"{group}.AUGMENT.{name}: expected a range within 0 and {limit:g}, found {value}."
            )
    if not all(isinstance(number, int) for number in cfg.AUGMENT.NUMBER):
        raise InputError(
            f"{group}.AUGMENT.NUMBER: expected whole numbers, found {cfg.AUGMENT.NUMBER}."
        )


class ViewDraws:
    """Draw what happens to a view.

    Args:
        cfg: the method's group, with AUGMENT and STYLE.

    Attributes:
        radius: of the blur's kernel, in pixels.
    """

    def __init__(self, cfg: CfgNode):
        self.ranges = {name: tuple(cfg.AUGMENT[name]) for name in CHANGES}
        self.number = tuple(cfg.AUGMENT.NUMBER)
        self.style = cfg.STYLE
        # pixels: of one length for all, or a view would depend on those beside it
        self.radius = math.ceil(_REACH * self.ranges["BLUR"][1])

    def __call__(self, rng: np.random.Generator) -> torch.Tensor:
        """(`NUMBERS`,) float32, as `augment` reads them."""
        number = rng.integers(self.number[0], self.number[1] + 1)
        chosen = {CHANGES[i] for i in rng.permutation(len(CHANGES))[:number]}
        view = no_change()

        def uniform(name: str, size: int) -> np.ndarray:
            return rng.uniform(*self.ranges[name], size)

        def normal(name: str, size: int) -> np.ndarray:
            return uniform(name, 1) * rng.standard_normal(size)

        if "CONTRAST" in chosen:
            view[PART["contrast"]] = uniform("CONTRAST", 1)
        if "BLUR" in chosen:
            view[PART["blur"]] = uniform("BLUR", 1)
        if "CROP_VERTICAL" in chosen:
            view[PART["crop"]][:2] = uniform("CROP_VERTICAL", 2)
        if "CROP_HORIZONTAL" in chosen:
            view[PART["crop"]][2:] = uniform("CROP_HORIZONTAL", 2)
        if "SHARPEN" in chosen:
            view[PART["sharpen"]] = uniform("SHARPEN", 2)
        if "WARP" in chosen:
            view[PART["warp"]] = normal("WARP", _PARTS["warp"])
        if "PERSPECTIVE" in chosen:
            view[PART["perspective"]] = abs(normal("PERSPECTIVE", _PARTS["perspective"]))
        if self.style:
            view[PART["gain"]] = rng.uniform(0.5, 1.5) * (-1 if rng.random() < 0.5 else 1)
            view[PART["offset"]] = rng.uniform(-64, 64, 3)
            view[PART["noise"]] = rng.uniform(0, 12)
        return torch.from_numpy(view)

    def noise(self, rng: np.random.Generator, height: int, width: int) -> torch.Tensor:
        """(H, W) float32, standard normal: what STYLE adds, grey."""
        return torch.from_numpy(rng.standard_normal((height, width), np.float32))


def no_change() -> np.ndarray:
    """(`NUMBERS`,) float32 of a view that is the image itself."""
    view = np.zeros(NUMBERS, np.float32)
    view[PART["contrast"]] = view[PART["gain"]] = 1
    return view


@torch.no_grad()
def augment(
    images: torch.Tensor, draws: torch.Tensor, noise: torch.Tensor | None, radius: int
) -> torch.Tensor:
    """Make a view of each image.

    Args:
        images: (N, 3, H, W) on the scale 0-255, of any dtype.
        draws: (N, `NUMBERS`) of `ViewDraws`, on their device.
        noise: (N, H, W) of `ViewDraws.noise`; None without.
        radius: `ViewDraws.radius`.

    Returns:
        (N, 3, H, W) float32 on the scale 0-255; STYLE leaves that range, and nothing is clipped.
    """
    # contiguous: loaders' images are channels last
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    grid = source_grid(draws, *pixels.shape[2:])
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast, gain, offset, noise_scale = (
        draws[:, PART[name]][:, :, None, None] for name in ("contrast", "gain", "offset", "noise")
    )
    pixels = _GREY + contrast * (pixels - _GREY)
    pixels = blur(pixels, draws[:, PART["blur"]], radius)
    pixels = sharpen(pixels, draws[:, PART["sharpen"]]).clamp_(0, 255)
    pixels = _GREY + gain * (pixels - _GREY) + offset
    return pixels if noise is None else pixels + noise_scale * noise[:, None]


def source_grid(draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Say where in the image each pixel of a view lies.

    Args:
        draws: (N, `NUMBERS`).

    Returns:
        (N, H, W, 2) x and y as `grid_sample` has them, -1 and 1 at the image's edges.
    """
    device, size = draws.device, len(draws)
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    points = draws[:, PART["warp"]].view(size, 2, POINTS, POINTS)
    # (N, 2, H, W) each point's shift, between the grid's points in proportion
    shift = F.interpolate(points, (height, width), mode="bilinear", align_corners=True)
    x, y = x + shift[:, 0], y[:, None] + shift[:, 1]  # (N, H, W)
    x, y = _perspective(draws[:, PART["perspective"]], x, y)
    top, bottom, left, right = draws[:, PART["crop"], None, None].unbind(1)  # (N, 1, 1)
    x, y = left + (1 - left - right) * x, top + (1 - top - bottom) * y
    return torch.stack([2 * x - 1, 2 * y - 1], dim=3)


def _perspective(
    inwards: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map the unit square to four corners, (N, 8) inwards of its own.

    In closed form: Heckbert, Fundamentals of Texture Mapping and Image Warping (1989), 2.2.3.
    """
    shifts = inwards.view(-1, 4, 2)
    square = inwards.new_tensor([[0, 0], [1, 0], [1, 1], [0, 1]])
    corners = square + (1 - 2 * square) * shifts  # (N, 4, 2)
    first, second, third, fourth = corners.unbind(1)
    one, two, rest = second - third, fourth - third, first - second + third - fourth
    determinant = one[:, 0] * two[:, 1] - two[:, 0] * one[:, 1]
    g = (rest[:, 0] * two[:, 1] - two[:, 0] * rest[:, 1]) / determinant
    h = (one[:, 0] * rest[:, 1] - rest[:, 0] * one[:, 1]) / determinant
    along = second - first + g[:, None] * second
    down = fourth - first + h[:, None] * fourth

    def of_view(value: torch.Tensor) -> torch.Tensor:
        return value[:, None, None]

    depth = of_view(g) * x + of_view(h) * y + 1
    return tuple(
        (of_view(along[:, i]) * x + of_view(down[:, i]) * y + of_view(first[:, i])) / depth
        for i in range(2)
    )


def blur(pixels: torch.Tensor, deviation: torch.Tensor, radius: int) -> torch.Tensor:
    """Convolve with Gaussians of (N, 1) deviations in pixels; 0 leaves the image.

    The edge's pixels go on beyond it. Kernels have 2 * `radius` + 1 taps along either side.
    """
    steps = torch.arange(-radius, radius + 1, device=pixels.device)
    weights = torch.exp(-(steps**2) / (2 * deviation.clamp(min=1e-3) ** 2))  # (N, taps)
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]
    for dim, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded, size = F.pad(pixels, pad, mode="replicate"), pixels.shape[dim]
        pixels = torch.zeros_like(pixels)
        for number, weight in enumerate(weights.unbind(1)):
            pixels.addcmul_(weight, padded.narrow(dim, number, size))
    return pixels


def sharpen(pixels: torch.Tensor, share_and_lightness: torch.Tensor) -> torch.Tensor:
    """Add (N, 2) a share of the image less its eight neighbours, as imgaug's Sharpen.

    The kernel: (1 - a) times the identity, plus a times -1 around 8 + lightness.
    """
    share, lightness = share_and_lightness[:, :, None, None, None].unbind(1)
    # the sum over 3 x 3 pixels: nine times their mean
    nine = 9 * F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (1 - share) * pixels + share * ((9 + lightness) * pixels - nine)
