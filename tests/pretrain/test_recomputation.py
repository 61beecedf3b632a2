"""What is computed again is what was computed, and less is kept."""

import copy

import pytest
import torch

from pretrain.backbone import VisualBackbone
from virtex_d2.engine.errors import InputError

# Of activations, the share that may be left.
KEPT = {"norms": 0.9, "blocks": 0.4}


@pytest.fixture(params=["resnet18", "resnet50"])
def plain(request) -> VisualBackbone:
    torch.manual_seed(0)
    return VisualBackbone(request.param, zero_init_residual=False).double()


@pytest.fixture(params=KEPT)
def backbones(request, plain) -> tuple[VisualBackbone, VisualBackbone]:
    recomputing = copy.deepcopy(plain)
    recomputing.recompute = request.param
    return plain, recomputing


def images(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=generator)


def test_features_gradients_and_running_statistics_are_the_same_to_the_bit(backbones):
    for turn in range(2):  # statistics of the first turn are in the second's
        outputs = [backbone(images(turn)) for backbone in backbones]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        for output in outputs:
            output.square().mean().backward()
    plain, recomputing = backbones
    for (name, mine), theirs in zip(recomputing.named_parameters(), plain.parameters()):
        assert torch.equal(mine.grad, theirs.grad), name
    for (name, mine), theirs in zip(recomputing.named_buffers(), plain.buffers()):
        assert torch.equal(mine, theirs), name


def test_less_is_kept_for_the_backward_pass(backbones):
    plain, recomputing = (kept_bytes(backbone) for backbone in backbones)
    assert recomputing < KEPT[backbones[1].recompute] * plain


def kept_bytes(backbone: VisualBackbone) -> int:
    """Of activations, which a larger batch has more of."""
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in backbone.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = backbone(images())
    assert features.requires_grad
    return sum(kept.values())


def test_evaluation_is_that_of_the_plain_backbone(backbones):
    plain, recomputing = (backbone.eval() for backbone in backbones)
    with torch.no_grad():
        assert torch.equal(plain(images()), recomputing(images()))


def test_what_cannot_be_computed_again_is_refused():
    with pytest.raises(InputError, match="'block'"):
        VisualBackbone("resnet18", recompute="block")
