"""The network's sizes: those of the released files, told from names and shapes or refused."""

import dataclasses

import pytest
import torch

from pretrain.methods.ipt.network import IPT, MEAN, Sizes, build_ipt, sizes_of
from virtex_d2.engine.errors import InputError

TINY = Sizes((2, 1), features=4, patch=12, layers=2, heads=2)


def count(network: IPT) -> int:
    return sum(p.numel() for p in network.parameters()) + 24  # and two mean colours


@pytest.mark.parametrize(
    ("scales", "parameters", "entries"),
    [
        ((1,), 115_312_731, 313),
        ((2,), 115_460_443, 315),
        ((3,), 115_645_083, 315),
        ((4,), 115_608_155, 317),
        ((2, 3, 4, 1, 1, 1), 118_892_394, 381),
    ],
)
def test_the_released_sizes(scales, parameters, entries):
    with torch.device("meta"):
        network = IPT(Sizes(scales))
    state = network.state_dict()
    assert (count(network), len(state)) == (parameters, entries)
    assert sizes_of(state, "IPT.pt") == Sizes(scales)
    assert state["body.encoder.layers.11.self_attn.in_proj_weight"].shape == (1728, 576)


@pytest.mark.parametrize(
    "sizes",
    [
        dataclasses.replace(TINY, scales=(3, 8, 4, 1)),
        dataclasses.replace(TINY, positions="none"),
        dataclasses.replace(TINY, mlp=False),
        dataclasses.replace(TINY, layers=1, patch=9, features=2, heads=1),
    ],
)
def test_sizes_are_told_from_a_state_and_the_network_is_rebuilt_from_it(sizes):
    network = IPT(sizes).eval()
    state = network.state_dict()
    assert sizes_of(state, "file", sizes.heads) == sizes
    again = build_ipt(state, sizes, "file")
    x = torch.rand(2, 3, sizes.patch, sizes.patch) * 255
    for task, scale in enumerate(sizes.scales):
        found = again(x, task)
        assert torch.equal(found, network(x, task))
        assert found.shape == (2, 3, scale * sizes.patch, scale * sizes.patch)


def test_the_embedding_is_that_of_the_task():
    network = IPT(dataclasses.replace(TINY, scales=(1, 1))).eval()
    state = network.state_dict()
    for name in state:
        if name.startswith(("head.1.", "tail.1.")):
            state[name] = state[name.replace(".1.", ".0.", 1)]
    network.load_state_dict(state)
    x = torch.rand(1, 3, 12, 12) * 255
    assert not torch.allclose(network(x, 0), network(x, 1))
    with torch.no_grad():
        network.body.query_embed.weight[1] = network.body.query_embed.weight[0]
    assert torch.equal(network(x, 0), network(x, 1))


def test_levels_are_not_rounded_by_autocast():
    network = IPT(TINY).eval()
    with torch.no_grad():
        for parameter in network.tail.parameters():
            parameter.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(torch.zeros(1, 3, 12, 12), 1)
    assert found.dtype == torch.float32
    assert found[0, :, 3, 4].tolist() == pytest.approx([255 * mean for mean in MEAN], rel=1e-6)


def test_patches_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected \(N, 3, 12, 12\), found \(1, 3, 12, 15\)"):
        IPT(TINY)(torch.zeros(1, 3, 12, 15), 0)


def without(*prefixes):
    def change(state):
        for name in [name for name in state if name.startswith(prefixes)]:
            del state[name]

    return change


def replaced(name, tensor):
    def change(state):
        state[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("head."), r"is no checkpoint of IPT: head.0.0.weight is missing"),
        (replaced("head.0.0.weight", torch.zeros(4)), r"head.0.0.weight has shape \(4,\), where 4"),
        (without("head.0."), r"head.0.0.weight is missing"),
        (without("head.1."), "1 heads, 2 tails, .* 2 task embeddings; expected as many"),
        (without("body.decoder.layers.1."), "2 encoder layers, 1 decoder layers"),
        (without("body.encoder.layers.0."), r"have the numbers \[1\], expected all from 0 on"),
        (without("body.encoder.", "body.decoder."), "layers and heads must be 1 or more"),
        (
            replaced("body.position_encoding.pe.weight", torch.zeros(15, 36)),
            "15 positions are no square",
        ),
        (
            without("body.position", "body.linear", "body.mlp", "body.query"),
            "size of its patches cannot be told",
        ),
        (replaced("tail.0.0.0.weight", 3), "tail.0.0.0.weight is missing"),
    ],
)
def test_a_state_whose_sizes_cannot_be_is_refused_by_name(change, message):
    state = IPT(TINY).state_dict()
    change(state)
    with pytest.raises(InputError, match=f"some.pt: .*{message}"):
        sizes_of(state, "some.pt", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": (3, 1)}, r"tail.0.0.0.weight has shape \(16, 4, 3, 3\), .* wants \(36, 4, 3"),
        ({"scales": (2,)}, "head.1.0.weight is not in the model"),
        ({"scales": (4, 1)}, "1 tensors differ|tail.0.0.2.weight is missing"),
        ({"layers": 3}, "body.encoder.layers.2.*is missing"),
        ({"layers": 1}, "body.encoder.layers.1.*is not in the model"),
        ({"positions": "none"}, "body.position_encoding.* is not in the model"),
    ],
)
def test_a_state_of_other_sizes_is_not_loaded(change, message):
    state = IPT(TINY).state_dict()
    with pytest.raises(InputError, match=f"some.pt: .*{message}.*Nothing was loaded"):
        build_ipt(state, dataclasses.replace(TINY, **change), "some.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 10}, "a patch of 10 pixels is no multiple of 3"),
        ({"heads": 5}, "36 channels of a token do not divide into 5 heads"),
        ({"features": 0}, "must be 1 or more"),
        ({"scales": (5,)}, r"scales \[5\] are not all of"),
        ({"scales": ()}, r"scales \[\] are not all of"),
        ({"positions": "twice"}, "positions 'twice' are none of once, every, none"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **change)
