"""Step 3: the same numbers from the device as from the CPU, without dropout and TensorFloat-32."""

import copy

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from pretrain.cached_decoder import CachedDecoder
from pretrain.colors import jitter_colors, normalize
from pretrain.config import get_pretrain_cfg
from pretrain.data import build_data
from pretrain.objectives import build_objective
from pretrain.packed_decoder import Words
from virtex_d2.checkpoint.probe import exact_float32
from virtex_d2.runtime.config import load_config

from . import runs
from .step import Step

# Relative. Gradients pass through batch norms of a few images, which enlarge roundings.
LOSS, GRADIENT, DOUBLE = 1e-4, 2e-2, 1e-5  # losses are summed in float32
LEVELS = 0.02  # of 255
LOG_PROBABILITY = 1e-3
ROI = 5e-3  # relative, of bfloat16 features: its rounding is 4e-3, of single numbers


def run(step: Step) -> None:
    options = runs.pretrain_options(step, step.folder / "numbers", "MODEL.TEXTUAL.DROPOUT", 0.0)
    options += ["SOLVER.IMS_PER_BATCH", "8", "DATA.NUM_WORKERS", "0"]
    options += ["MODEL.VISUAL.ZERO_INIT_RESIDUAL", "False"]  # all of the network takes part
    cfg = load_config(get_pretrain_cfg(), "", options)
    (step.folder / "numbers").mkdir(exist_ok=True)
    data = build_data(cfg)
    batch = next(iter(data.train_loader(cfg, 0)))
    torch.manual_seed(0)
    objective = build_objective(cfg, data.num_outputs)
    if not step.cuda:
        step.instead("CUDA's losses and gradients", "float32's beside float64's")
    with exact_float32():
        _losses(step, objective, batch)
        _jitter(step, batch)
        _decoders(step, objective, batch)
    _roi_features(step)


def _losses(step: Step, objective: torch.nn.Module, batch: dict) -> None:
    given = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    given["image"] = normalize(given["image"])
    given.pop("jitter", None)
    cpu = torch.device("cpu")
    ways = {"CPU, float64": (cpu, torch.float64), "float32": (step.device, torch.float32)}
    if step.cuda:
        ways["CUDA, float64"] = (step.device, torch.float64)
    losses, gradients = {}, {}
    for name, (device, dtype) in ways.items():
        model = copy.deepcopy(objective).to(device, dtype)
        moved = {key: value.to(device) for key, value in given.items()}
        total = sum(model({**moved, "image": moved["image"].to(dtype)}).values())
        total.backward()
        losses[name] = total.item()
        flat = [parameter.grad.flatten() for parameter in model.parameters()]
        gradients[name] = torch.cat(flat).to(cpu, torch.float64)
    reference = gradients["CPU, float64"]
    for name in list(ways)[1:]:
        loss = abs(losses[name] / losses["CPU, float64"] - 1)
        apart = ((gradients[name] - reference).norm() / reference.norm()).item()
        most = (DOUBLE, DOUBLE) if "64" in name else (LOSS, GRADIENT)
        step.check(f"loss, {name}", loss <= most[0], f"{loss:.2g} from the CPU's float64")
        step.check(f"gradients, {name}", apart <= most[1], f"{apart:.2g} from the CPU's float64")
    step.headline(f"loss {losses['float32']:.5f}, CPU {losses['CPU, float64']:.5f}")


def _jitter(step: Step, batch: dict) -> None:
    expected = batch["image"].double().contiguous()
    found = batch["image"].to(step.device).float().contiguous()
    before = found.clone()
    jitter_colors(expected, batch["jitter"])
    jitter_colors(found, batch["jitter"])
    apart = (found.cpu() - expected).abs().mean().item()
    changed = (found - before).abs().mean().item()
    right = apart <= LEVELS < changed
    step.check("jitter", right, f"{apart:.2g} levels from float64 on the CPU, of {changed:.1f}")


@torch.no_grad()
def _decoders(step: Step, objective: torch.nn.Module, batch: dict) -> None:
    """Word by word with a cache, as captions are made, against all at once, as is trained."""
    head = copy.deepcopy(objective.textual).to(step.device).eval()
    tokens = batch["caption_tokens"].to(step.device)
    features = torch.randn(len(tokens), head.visual_projection.in_features, 3, 3)
    visual = head.project(features.to(step.device))
    lengths = torch.full((len(tokens),), tokens.shape[1], device=step.device)
    words = Words.first(lengths, tokens.shape[1])
    hidden = head.hidden_states(head.embedding(words.pack(tokens), words.positions), visual, words)
    logits = head.output(hidden)
    cached = CachedDecoder(head, visual)
    steps = torch.stack([cached.step(word.view(-1, 1))[:, 0] for word in tokens.unbind(1)], 1)
    real = words.pack(tokens) != 0  # beyond a caption's end the two need not agree
    apart = (logits.log_softmax(-1) - words.pack(steps))[real].abs().max().item()
    step.check("cached against full decoder", apart <= LOG_PROBABILITY, f"{apart:.2g} at most")


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
    expected = pooler([m.float() for m in maps], [boxes])
    apart = ((found - expected).norm() / expected.norm()).item()
    step.check("RoI features in bfloat16", apart <= ROI, f"{apart:.2g} from float32's")
