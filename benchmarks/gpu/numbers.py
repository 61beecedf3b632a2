"""Step 3: the same numbers from the device as from the CPU, without dropout and TensorFloat-32."""

import copy

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from pretrain.config import get_pretrain_cfg
from pretrain.data.sources import open_data
from pretrain.methods.method import build_method, find_method
from pretrain.transforms import jitter_colors, normalize
from virtex_d2.checkpoint.probe import exact_float32
from virtex_d2.engine.config import load_config

from . import runs
from .step import Step

# Relative. Gradients pass through batch norms of a few images, which enlarge roundings; losses are
# summed in float32 always.
LOSS, GRADIENT, DOUBLE = 1e-4, 2e-2, 1e-5
LEVELS = 0.02  # of 255
DECODED = 1e-4  # relative, of a loss
ROI = 5e-3  # relative; a number in bfloat16 has 4e-3


def run(step: Step) -> None:
    words = ["MODEL.TEXTUAL.DROPOUT", "0.0", "SOLVER.IMS_PER_BATCH", "8", "DATA.NUM_WORKERS", "0"]
    words += ["MODEL.VISUAL.ZERO_INIT_RESIDUAL", "False"]  # or most gradients are 0
    cfg = load_config(get_pretrain_cfg(), "", runs.options(step, step.fresh("numbers"), *words))
    data = open_data(cfg, find_method(cfg).build_samples)
    batch = next(iter(data.train_loader(cfg, 0)))
    given = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    jitter = given.pop("jitter")
    torch.manual_seed(0)
    objective = build_method(cfg, data.samples.num_outputs)
    if not step.cuda:
        step.instead("CUDA's losses and gradients", "float32's beside float64's")
    with exact_float32():
        _jitter(step, given["image"], jitter)
        given["image"] = normalize(given["image"])
        _losses(step, objective, given)
        _decoders(step, objective, {key: value.to(step.device) for key, value in given.items()})
    _roi_features(step)


def _losses(step: Step, objective: torch.nn.Module, given: dict) -> None:
    ways = {"CPU": ("cpu", torch.float64), "float32": (step.device, torch.float32)}
    if step.cuda:
        ways["float64"] = (step.device, torch.float64)
    losses, gradients = {}, {}
    for name, (device, dtype) in ways.items():
        model = copy.deepcopy(objective).to(device, dtype)
        moved = {key: value.to(device) for key, value in given.items()}
        total = sum(model({**moved, "image": moved["image"].to(dtype)}).values())
        total.backward()
        losses[name] = total.item()
        flat = [parameter.grad.flatten() for parameter in model.parameters()]
        gradients[name] = torch.cat(flat).cpu().double()
    for name in list(ways)[1:]:
        apart = abs(losses[name] / losses["CPU"] - 1), relative(gradients[name], gradients["CPU"])
        most = (DOUBLE, DOUBLE) if name == "float64" else (LOSS, GRADIENT)
        for what, found, bound in zip(("loss", "gradients"), apart, most):
            told = f"{found:.2g} from the CPU's in float64"
            step.check(f"{what} in {name}", found <= bound, told)
    step.headline(f"loss {losses['float32']:.5f}, CPU {losses['CPU']:.5f}")


def _jitter(step: Step, image: torch.Tensor, jitter: torch.Tensor) -> None:
    expected, found = image.double().contiguous(), image.to(step.device).float().contiguous()
    jitter_colors(expected, jitter)
    jitter_colors(found, jitter)
    apart = (found.cpu() - expected).abs().mean().item()
    changed = (expected - image).abs().mean().item()
    told = f"{apart:.2g} levels from float64 on the CPU, of {changed:.1f}"
    step.check("jitter", apart <= LEVELS < changed, told)


@torch.no_grad()
def _decoders(step: Step, objective: torch.nn.Module, batch: dict) -> None:
    """Word by word with a cache, as captions are made, against all at once, as is trained."""
    model = copy.deepcopy(objective).to(step.device).eval()
    full = model(batch)["loss_captioning_forward"].item()
    head, tokens = model.textual, batch["caption_tokens"]
    caches = head.start(head.project(model.visual(batch["image"])))
    words = enumerate(tokens[:, :-1].unbind(1))
    found = [head.step(word[:, None], place, caches, None)[:, 0] for place, word in words]
    found = torch.stack(found, 1)
    loss = F.nll_loss(found.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0).item()
    step.check("cached against full decoder", abs(loss / full - 1) <= DECODED, f"{loss}, {full}")


@torch.no_grad()
def _roi_features(step: Step) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(1, 32, 200 >> i, 336 >> i, generator=generator) for i in range(4)]
    maps = [m.to(step.device, torch.bfloat16) for m in maps]
    corners = torch.rand(200, 2, 2, generator=generator).sort(1).values
    boxes = Boxes((corners.flatten(1) * torch.tensor([1344, 800] * 2)).to(step.device))
    pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2")
    with torch.autocast(step.device.type, torch.bfloat16):
        found = pooler(maps, [boxes]).float()
    apart = relative(found, pooler([m.float() for m in maps], [boxes]))
    step.check("RoI features in bfloat16", apart <= ROI, f"{apart:.2g} from float32's")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return ((found - expected).norm() / expected.norm()).item()
