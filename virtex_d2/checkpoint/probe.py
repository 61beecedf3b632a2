"""Does the loaded detector compute what the pretrained network computed? Stage by stage.

Names, shapes and counts can all be right and the network still wrong: another stride convention,
channel order, mean or standard deviation. None of them changes a cosine similarity by more than a
few percent, so the stages' outputs are compared by relative error, on the same pixels, against a
network that is built here from the file's tensors and from nothing of the detector.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from torch import nn
from torch.nn import functional as F

from virtex_d2.checkpoint.resnet import BLOCKS
from virtex_d2.checkpoint.source import Backbone
from virtex_d2.engine.backbone_file import Preprocessing
from virtex_d2.engine.errors import InputError

TOLERANCE = 1e-5  # relative error in float32; the wrong networks are at 0.03 and above
SIZE = 64  # pixels: what leaves the last stage two by two


@dataclass(frozen=True)
class ProbeResult:
    """Relative errors of a loaded detector's stages."""

    errors: dict[str, float]  # stage -> ||detector - source|| / ||source||, of those that it has
    cause: str = ""  # what would explain them; "" where all are within the tolerance

    @property
    def passed(self) -> bool:
        return all(error <= TOLERANCE for error in self.errors.values())

    def summary(self) -> str:
        """One line: each stage's error."""
        return ", ".join(f"{stage} {error:.1e}" for stage, error in self.errors.items())


def probe(
    model: nn.Module, backbone: Backbone, preprocessing: Preprocessing, input_format: str
) -> ProbeResult:
    """Compare a detector's ResNet with the network it was loaded from.

    Takes a fraction of a second for a ResNet-50 on one core. The model's mode and every tensor of
    it are left as they were.

    Args:
        model: a detectron2 detector (not wrapped), on any device.
        backbone: what it was loaded from.
        preprocessing: what the source network saw, from the file or vouched for by the user.
        input_format: INPUT.FORMAT, the order in which the detector's data loader gives channels.
    """
    resnet = _find_resnet(model)

    def stages(rgb: torch.Tensor) -> dict[str, torch.Tensor]:
        return _detector_stages(model, resnet, rgb if input_format == "RGB" else rgb.flip(0))

    return compare(model, stages, backbone, preprocessing, _last_dilation(resnet))


def compare(
    model: nn.Module,
    stages: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    backbone: Backbone,
    preprocessing: Preprocessing,
    last_dilation: int = 1,
) -> ProbeResult:
    """Compare any network with the one it was loaded from, as `probe` does.

    Args:
        model: on any device; its mode and every tensor of it are left as they were.
        stages: of an image, (3, SIZE, SIZE) RGB float32 on the scale 0 to 255, on the model's
            device -> what leaves "stem", "res2", ... of `model`, each (1, C, H, W).
        backbone, preprocessing: as of `probe`.
        last_dilation: of res5.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8).float()
    rgb = rgb.to(device)
    tensors = {name: tensor.to(device) for name, tensor in backbone.tensors.items()}
    with exact_float32(), torch.no_grad(), _evaluating(model):
        found = stages(rgb)

        def errors(assumed: Preprocessing) -> dict[str, float]:
            expected = _source_stages(tensors, backbone, assumed, rgb, last_dilation)
            return {stage: _relative(found[stage], expected[stage]) for stage in found}

        result = ProbeResult(errors(preprocessing))
        if result.passed:
            return result
        return replace(result, cause=_cause(result, preprocessing, errors))


def _cause(
    result: ProbeResult,
    assumed: Preprocessing,
    errors: Callable[[Preprocessing], dict[str, float]],
) -> str:
    """The first single difference under which the detector computes what the source does."""
    opposite = "BGR" if assumed.channel_order == "RGB" else "RGB"
    ones, scale = (1.0,) * 3, tuple(255.0 * value for value in assumed.std)
    turned = replace(assumed, channel_order=opposite)
    other = {
        "the stride convention (MODEL.RESNETS.STRIDE_IN_1X1)": replace(
            assumed, stride_in_1x1=not assumed.stride_in_1x1
        ),
        "the channel order (INPUT.FORMAT)": turned,
        "the channel order of the mean and standard deviation only (MODEL.PIXEL_MEAN, PIXEL_STD)": (
            replace(assumed, mean=assumed.mean[::-1], std=assumed.std[::-1])
        ),
        "the channel order of pixels, mean and standard deviation": replace(
            turned, mean=assumed.mean[::-1], std=assumed.std[::-1]
        ),
        "a standard deviation of 1 (MODEL.PIXEL_STD)": replace(assumed, std=ones),
        "pixels that are not scaled (MODEL.PIXEL_STD)": replace(assumed, std=scale),
        "a mean of 0 (MODEL.PIXEL_MEAN)": replace(assumed, mean=(0.0,) * 3),
    }
    for cause, preprocessing in other.items():
        if all(error <= TOLERANCE for error in errors(preprocessing).values()):
            return cause
    first = next(stage for stage, error in result.errors.items() if error > TOLERANCE)
    if first == "stem":
        return (
            "pixels (INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD), or the stem's tensors: "
            "the first stage differs already"
        )
    return f"the tensors or the stride of {first}: the stages before it agree"


def _source_stages(
    tensors: Mapping[str, torch.Tensor],
    backbone: Backbone,
    preprocessing: Preprocessing,
    rgb: torch.Tensor,
    last_dilation: int,
) -> dict[str, torch.Tensor]:
    """The source network's stages, each (1, C, H, W), for an image (3, H, W), RGB, 0 to 255.

    He et al., arXiv 1512.03385; written with functions, so that no module of the detector's kind
    can hide a mistake that both make.
    """
    pixels = rgb if preprocessing.channel_order == "RGB" else rgb.flip(0)
    mean, std = (
        torch.tensor(values, device=rgb.device).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    architecture = backbone.architecture

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, weight, bias = (
            tensors[f"{name}.{parameter}"]
            for parameter in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)

    def conv(x: torch.Tensor, name: str, stride: int = 1, dilation: int = 1, groups: int = 1):
        weight = tensors[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    def block(x: torch.Tensor, name: str, stride: int, dilation: int) -> torch.Tensor:
        if architecture.bottleneck:
            strides = (stride, 1) if preprocessing.stride_in_1x1 else (1, stride)
            out = F.relu(norm(conv(x, f"{name}.conv1", strides[0]), f"{name}.bn1"))
            out = conv(out, f"{name}.conv2", strides[1], dilation, architecture.groups)
            out = conv(F.relu(norm(out, f"{name}.bn2")), f"{name}.conv3")
            out = norm(out, f"{name}.bn3")
        else:
            out = F.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
            out = norm(conv(out, f"{name}.conv2"), f"{name}.bn2")
        if f"{name}.downsample.0.weight" in tensors:
            x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return F.relu(out + x)

    x = F.relu(norm(conv(((pixels - mean) / std)[None], "conv1", 2), "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    stages = {"stem": x}
    for stage, count in enumerate(BLOCKS[architecture.depth]):
        for number in range(count):
            dilation = last_dilation if stage == 3 else 1
            # A dilated last stage (DC5) keeps the resolution instead of halving it.
            first = number == 0 and stage > 0 and dilation == 1
            x = block(x, f"layer{stage + 1}.{number}", 2 if first else 1, dilation)
        stages[f"res{stage + 2}"] = x
    broken = [stage for stage, value in stages.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(
            f"{backbone.path}: its own output is not finite from {broken[0]} on; its weights or "
            "running statistics cannot be those of a trained network."
        )
    return stages


def _detector_stages(
    model: nn.Module, resnet: ResNet, image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The detector's own stages for an image (3, H, W), through its own preprocessing."""
    if hasattr(model, "preprocess_image"):
        pixels = model.preprocess_image([{"image": image}]).tensor[..., :SIZE, :SIZE]
    else:  # ProposalNetwork does it in its forward
        pixels = ((image - model.pixel_mean) / model.pixel_std)[None]
    x = resnet.stem(pixels)
    stages = {"stem": x}
    for name, stage in zip(resnet.stage_names, resnet.stages):
        x = stages[name] = stage(x)
    res5 = getattr(getattr(model, "roi_heads", None), "res5", None)
    if res5 is not None and "res5" not in stages:
        for part in res5.children():
            if isinstance(part, BottleneckBlock):  # and not C4's extra norm
                x = part(x)
        stages["res5"] = x
    return stages


def _find_resnet(model: nn.Module) -> ResNet:
    backbone = getattr(model, "backbone", None)
    resnet = getattr(backbone, "bottom_up", backbone)
    if not isinstance(resnet, ResNet):
        raise InputError(
            f"the detector's backbone is a {type(resnet).__name__}; expected detectron2's ResNet, "
            "alone or below an FPN. Use build_resnet_backbone or build_resnet_fpn_backbone."
        )
    return resnet


def _last_dilation(resnet: ResNet) -> int:
    if "res5" not in resnet.stage_names:
        return 1
    return resnet.stages[-1][0].conv2.dilation[0]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 as it is: TensorFloat-32 alone is a thousandth."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_tf32 = products
