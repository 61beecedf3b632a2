"""One iteration is one update: accumulation, mixed precision, clipping."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from virtex_d2.detection.loader import build_train_loader
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.loop import UpdateLoop


class _Regression(nn.Module):
    """Mean over images of a loss each, and a second term; notes what it has seen."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 1)
        self.sizes, self.dtypes = [], []

    def forward(self, batch):
        output = self.last(self.first(torch.stack(batch)).tanh())
        self.sizes.append(len(batch))
        self.dtypes.append(output.dtype)
        return {"loss_square": output.float().pow(2).mean(), "loss_mean": output.mean().float()}


def _run(model, batch, optimizer=None, **options):
    """One update; returns what it wrote to the metrics."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    loop = UpdateLoop(model, optimizer, lambda _: [batch], **options)
    with EventStorage() as storage:
        loop.step(0)
        loop.record(storage)
    return {name: value for name, (value, _) in storage.latest().items()}


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return _Regression()


@pytest.fixture
def images():
    return list(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("passes", [2, 3, 12])
def test_passes_give_the_gradient_and_the_metrics_of_all_images_at_once(passes, model, images):
    model, images = model.double(), [image.double() for image in images]
    whole = copy.deepcopy(model)
    expected = _run(whole, images)
    found = _run(model, images, passes=passes)
    assert model.sizes == [12 // passes] * passes
    for name, gradient in _gradients(whole).items():
        torch.testing.assert_close(_gradients(model)[name], gradient, rtol=1e-6, atol=1e-9)
    del expected["data_time"], found["data_time"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_passes_of_a_detector_give_the_gradient_of_the_big_batch(detection_cfg, monkeypatch):
    """With FrozenBN; the same proposals are sampled whatever the order of images."""
    cfg = detection_cfg
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM = "FrozenBN", ""
    cfg.SOLVER.IMS_PER_BATCH = 4
    # Mask losses are means over objects, of which images have different numbers.
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 10000  # all anchors: of every level
    torch.manual_seed(0)
    batch = next(iter(build_train_loader(cfg)))
    permutation = torch.randperm
    monkeypatch.setattr(
        torch, "randperm", lambda n, **_: permutation(n, generator=torch.Generator().manual_seed(n))
    )
    small = build_model(cfg)
    whole, half = copy.deepcopy(small), copy.deepcopy(small)
    _run(whole, batch)
    _run(small, batch, passes=4)
    _run(half, batch[:2])
    expected, found, other = map(_gradients, (whole, small, half))
    assert len(found) == len(expected) > 40
    assert max(_differences(found, expected)) < 1e-4
    assert max(_differences(other, expected)) > 0.1  # half of the images: another gradient


def _differences(found, expected):
    return [((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()]


def test_autocast_on_a_cpu_computes_in_bfloat16_and_updates_float32_weights(model, images):
    before = copy.deepcopy(model)
    written = _run(model, images, passes=3, dtype=torch.bfloat16)
    assert model.dtypes == [torch.bfloat16] * 3
    assert model.first.weight.dtype == model.first.weight.grad.dtype == torch.float32
    assert not torch.equal(model.first.weight, before.first.weight)
    _run(before, images)
    torch.testing.assert_close(model.first.weight, before.first.weight, rtol=0.05, atol=0.01)
    assert written["total_loss"] == pytest.approx(written["loss_square"] + written["loss_mean"])


def _scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**12)


def _clipping_sgd(cfg, model, kind, value):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = kind, value
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(model.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", ["none", "value", "norm", "full_model"])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_scaled_loss_updates_as_an_unscaled_one_whatever_clips(
    kind, passes, model, images, detection_cfg
):
    """Clipping must see the gradients without the scale; 1e-3 clips every parameter here."""
    options = {"passes": passes, "max_norm": 1e-3 if kind == "full_model" else None}
    plain, free = copy.deepcopy(model), copy.deepcopy(model)
    for network, scaler in ((plain, None), (model, _scaler())):
        optimizer = None
        if kind in ("value", "norm"):
            optimizer = _clipping_sgd(detection_cfg, network, kind, 1e-3)
        written = _run(network, images, optimizer, scaler=scaler, **options)
    assert written["grad_scale"] == 2**12
    _run(free, images, passes=passes)
    changed = []
    for name, weights in model.named_parameters():
        torch.testing.assert_close(weights, plain.get_parameter(name), rtol=1e-5, atol=1e-8)
        changed.append(not torch.allclose(weights, free.get_parameter(name), atol=1e-6))
    assert all(changed) == any(changed) == (kind != "none")


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_gradients_that_overflow_are_left_out_and_lower_the_scale(max_norm, model, images):
    nn.init.constant_(model.last.weight, 100.0)  # a loss that is infinite when scaled
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    _run(model, images, scaler=scaler, max_norm=max_norm, passes=2)
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_scale_goes_on_where_the_checkpoint_was(model, images):
    nn.init.constant_(model.last.weight, 100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = UpdateLoop(
        model, optimizer, lambda _: [images], scaler=torch.amp.GradScaler("cpu", 2.0**127)
    )
    loop.step(0)
    resumed = UpdateLoop(model, optimizer, lambda _: [images], scaler=_scaler())
    resumed.load_state_dict(loop.state_dict())
    assert resumed.grad_scaler.state_dict() == loop.grad_scaler.state_dict()
    assert resumed.grad_scaler.get_scale() == 2.0**126


def test_a_scale_that_the_checkpoint_does_not_know_is_told(model, images, caplog):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = UpdateLoop(model, optimizer, lambda _: [images]).state_dict()
    assert "grad_scaler" not in state
    UpdateLoop(model, optimizer, lambda _: [images], scaler=_scaler()).load_state_dict(state)
    assert "not trained in float16" in caplog.text


def _first_update(cfg):
    """The weights' change and the metrics of one iteration."""
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BASE_LR = 0.0, 1.0
    cfg.SOLVER.MAX_ITER, cfg.TEST.PRECISE_BN.ENABLED = 1, False
    seed_all_rng(0)
    trainer = DetectionTrainer(cfg)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with EventStorage() as trainer.storage:
        trainer.run_step()
    change = [q.detach() - p for p, q in zip(before, trainer.model.parameters())]
    return change, {name: value for name, (value, _) in trainer.storage.latest().items()}


def test_clipping_each_parameters_gradient_comes_from_the_config(detection_cfg):
    clip = detection_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "norm", 1e-3
    change, _ = _first_update(detection_cfg)
    norms = torch.stack([part.norm() for part in change])
    assert norms.max() == pytest.approx(1e-3, rel=0.01)
    assert norms.norm() > 5e-3  # all together: more than that


def test_clipping_all_gradients_together_keeps_their_direction(detection_cfg):
    free, _ = _first_update(detection_cfg)
    clip = detection_cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "full_model", 0.01
    change, metrics = _first_update(detection_cfg)
    # in float64: a float32 sum over millions of squares is wrong in its third digit
    whole, clipped = (
        torch.cat([part.flatten().double() for part in parts]) for parts in (free, change)
    )
    assert whole.norm() > 0.1
    assert clipped.norm() == pytest.approx(0.01, rel=1e-3)
    assert torch.dot(whole, clipped) / whole.norm() / clipped.norm() > 0.9999
    assert metrics["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 training needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_detector_trains_in_mixed_precision_on_a_gpu(dtype, detection_cfg):
    cfg = detection_cfg
    cfg.MODEL.DEVICE = "cuda"
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, dtype
    cfg.VIRTEX.ACCUMULATE = 2
    change, metrics = _first_update(cfg)
    assert all(part.isfinite().all() for part in change)
    assert ("grad_scale" in metrics) == (dtype == "float16")
    assert metrics["total_loss"] > 0


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"dtype": torch.bfloat16, "passes": 2}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_a_weight_has_it(options, bad, model, images):
    """The loss is finite all the same, so that nothing else would tell before the next one."""
    before = copy.deepcopy(model.state_dict())
    model.last.weight.register_hook(lambda gradient: gradient * bad)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match=r"not finite at iteration 0: .*grad_norm (nan|inf)"):
        _run(model, images, optimizer, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
