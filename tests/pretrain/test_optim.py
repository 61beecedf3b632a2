"""Parameter groups, schedule and Lookahead."""

import math

import pytest
import torch
from torch import nn

from pretrain.config import get_pretrain_cfg
from pretrain.methods.method import build_method
from pretrain.optim import (
    Lookahead,
    build_lr_scheduler,
    build_optimizer,
    parameter_groups,
    warmup_cosine,
)
from virtex_d2.checkpoint.resnet import recognise_resnet
from virtex_d2.engine.errors import InputError


@pytest.fixture(scope="module")
def cfg():
    cfg = get_pretrain_cfg()
    cfg.MODEL.VISUAL.NAME = "resnet18"
    cfg.MODEL.TEXTUAL.HIDDEN_SIZE = 64
    return cfg


@pytest.fixture(scope="module")
def model(cfg):
    return build_method(cfg, 50)


def test_each_parameter_is_in_one_group_with_its_rate_and_decay(cfg, model):
    groups = {group["name"]: group for group in parameter_groups(cfg, model)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert set(groups) == {"cnn", "rest", "rest_no_decay"}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(names)
    assert groups["cnn"]["lr"] == 0.2
    assert groups["cnn"]["weight_decay"] == 1e-4
    assert all("visual.cnn." in names[id(p)] for p in groups["cnn"]["params"])
    assert groups["rest"]["lr"] == groups["rest_no_decay"]["lr"] == 1e-3
    assert groups["rest_no_decay"]["weight_decay"] == 0
    undecayed = {names[id(p)] for p in groups["rest_no_decay"]["params"]}
    assert "textual.embedding.layer_norm.weight" in undecayed
    assert "backward_textual.transformer.layers.0.norm3.bias" in undecayed
    assert "textual.transformer.layers.0.linear1.bias" in undecayed
    assert "textual.transformer.layers.0.linear1.weight" not in undecayed
    assert "textual.output.bias" not in undecayed


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_the_last_norms_scales_have_a_rate_of_their_own(cfg, name, last):
    own = cfg.clone()
    own.MODEL.OBJECTIVE, own.MODEL.VISUAL.NAME = "token_classification", name
    own.SOLVER.SCALE_LR_FACTOR = 10.0
    model = build_method(own, 50)
    groups = {group["name"]: group for group in parameter_groups(own, model)}
    assert set(groups) == {"cnn", "scales", "rest"}
    assert [groups[key]["lr"] for key in ("cnn", "scales", "rest")] == [0.2, 2.0, 1e-3]
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in groups["scales"]["params"]}
    tensors = {n.removeprefix("visual.cnn."): t for n, t in model.state_dict().items()}
    expected = recognise_resnet(tensors, name).last_scales()
    assert found == {f"visual.cnn.{scale}" for scale in expected}
    assert all(scale.endswith(f"{last}.weight") for scale in found)
    assert len(found) == {"resnet18": 8, "resnet50": 16}[name]
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    own.SOLVER.SCALE_LR_FACTOR = 1.0
    groups_without = [group["name"] for group in parameter_groups(own, model)]
    assert groups_without == ["cnn", "rest"], "as in checkpoints of before"


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_factor_that_is_none_is_refused(cfg, model, factor):
    own = cfg.clone()
    own.SOLVER.SCALE_LR_FACTOR = factor
    with pytest.raises(InputError, match="SCALE_LR_FACTOR is .*above 0"):
        build_optimizer(own, parameter_groups(own, model))


def test_a_rate_factor_that_nothing_would_have_is_refused(cfg):
    own = cfg.clone()
    own.SOLVER.SCALE_LR_FACTOR = 3.0
    head = nn.Linear(2, 2)
    with pytest.raises(InputError, match="has no group of its residual blocks' last scales"):
        build_optimizer(own, parameter_groups(own, head))


def test_lookahead_restarts_at_weights_that_were_loaded():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    lookahead = Lookahead(optimizer, steps=1, alpha=0.5)
    with torch.no_grad():
        layer.weight.fill_(7.0)
    lookahead.restart()
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert layer.weight.item() == 7.0


def test_the_schedule_warms_up_linearly_and_ends_at_zero(cfg, model):
    assert warmup_cosine(50, 100, 1000) == 0.5
    assert warmup_cosine(100, 100, 1000) == 1
    assert warmup_cosine(550, 100, 1000) == pytest.approx(0.5)
    assert warmup_cosine(1000, 100, 1000) == pytest.approx(0)
    small = cfg.clone()
    small.SOLVER.MAX_ITER, small.SOLVER.WARMUP_ITERS = 20, 4
    optimizer = build_optimizer(small, parameter_groups(small, model))
    scheduler = build_lr_scheduler(small, optimizer)
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    rates = torch.tensor(rates)
    cnn = [group["name"] for group in optimizer.param_groups].index("cnn")
    assert (rates > 0).all()
    assert rates[:4, cnn].tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert rates[-1, cnn].item() == pytest.approx(0.1 * (1 + math.cos(math.pi * 15 / 16)))


@pytest.mark.parametrize("name", ["sgd", "adamw", "adadelta"])
def test_every_optimizer_uses_the_groups(cfg, model, name):
    own = cfg.clone()
    own.SOLVER.OPTIMIZER = name
    optimizer = build_optimizer(own, parameter_groups(own, model))
    assert [group["name"] for group in optimizer.param_groups] == [
        group["name"] for group in parameter_groups(own, model)
    ]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("enabled", "dtype", "fused"),
    [(True, "bfloat16", True), (True, "float16", False), (False, "float16", True)],
)
def test_an_update_is_one_kernel_except_under_a_loss_scaler_that_skips_updates(
    cfg, model, name, enabled, dtype, fused
):
    own = cfg.clone()
    own.SOLVER.OPTIMIZER, own.SOLVER.AMP.ENABLED, own.SOLVER.AMP.DTYPE = name, enabled, dtype
    assert build_optimizer(own, parameter_groups(own, model)).defaults["fused"] is fused


def test_the_first_step_of_adadelta_is_its_papers(cfg):
    weight = torch.nn.Parameter(torch.ones(1))
    own = cfg.clone()
    own.SOLVER.OPTIMIZER = "adadelta"
    optimizer = build_optimizer(own, [{"params": [weight], "lr": 1.0, "weight_decay": 0.0}])
    weight.grad = torch.full((1,), 3.0)
    optimizer.step()
    # root of the mean square of steps, over that of gradients, times the gradient
    step = 1e-8**0.5 / (0.05 * 3**2 + 1e-8) ** 0.5 * 3
    assert 1 - weight.item() == pytest.approx(step, rel=1e-3)


def test_an_unknown_optimizer_is_refused_with_the_nearest_name(cfg, model):
    own = cfg.clone()
    own.SOLVER.OPTIMIZER = "adam"
    with pytest.raises(InputError, match="Did you mean 'adamw'"):
        build_optimizer(own, parameter_groups(own, model))


def _train(layer, optimizer, iterations):
    for i in range(iterations):
        optimizer.zero_grad()
        (layer(torch.full((1, 2), float(i + 1))).sum() - 1).square().backward()
        optimizer.step()


def _linear_with_lookahead(steps=5, alpha=0.5):
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)
    return layer, optimizer, Lookahead(optimizer, steps, alpha)


def test_lookahead_moves_the_slow_weights_a_share_of_the_way():
    layer, optimizer, _ = _linear_with_lookahead(steps=3, alpha=0.25)
    plain, plain_optimizer, _ = _linear_with_lookahead(steps=1000)
    start = layer.weight.detach().clone()
    _train(layer, optimizer, 2)
    _train(plain, plain_optimizer, 2)
    torch.testing.assert_close(layer.weight, plain.weight)
    layer, optimizer, _ = _linear_with_lookahead(steps=3, alpha=0.25)
    plain, plain_optimizer, _ = _linear_with_lookahead(steps=1000)
    _train(layer, optimizer, 3)
    _train(plain, plain_optimizer, 3)
    torch.testing.assert_close(layer.weight, start + 0.25 * (plain.weight - start))


def test_lookahead_resumed_in_the_middle_ends_where_an_uninterrupted_one_does():
    whole, optimizer, _ = _linear_with_lookahead()
    _train(whole, optimizer, 13)

    first, optimizer, lookahead = _linear_with_lookahead()
    _train(first, optimizer, 7)
    second, new_optimizer, new_lookahead = _linear_with_lookahead()
    second.load_state_dict(first.state_dict())
    new_optimizer.load_state_dict(optimizer.state_dict())
    new_lookahead.load_state_dict(lookahead.state_dict())
    for i in range(7, 13):
        new_optimizer.zero_grad()
        (second(torch.full((1, 2), float(i + 1))).sum() - 1).square().backward()
        new_optimizer.step()
    assert torch.equal(second.weight, whole.weight)


def test_lookahead_refuses_another_models_state():
    _, _, lookahead = _linear_with_lookahead()
    other = nn.Linear(3, 1)
    state = Lookahead(torch.optim.SGD(other.parameters(), lr=0.1)).state_dict()
    with pytest.raises(ValueError, match="another model"):
        lookahead.load_state_dict(state)
