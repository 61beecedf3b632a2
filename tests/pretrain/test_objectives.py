"""Captioning objectives: what the loss sees and what it must not see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import get_pretrain_cfg
from pretrain.objectives import build_objective, reverse_captions
from virtex_d2.runtime.errors import InputError

VOCAB = 40


def small_config(objective: str = "bicaptioning"):
    cfg = get_pretrain_cfg()
    cfg.MODEL.OBJECTIVE = objective
    cfg.MODEL.VISUAL.NAME = "resnet18"
    cfg.MODEL.TEXTUAL.HIDDEN_SIZE = 64
    cfg.MODEL.TEXTUAL.MAX_LENGTH = 12
    return cfg


def caption_batch(captions: list[list[int]], length: int = 12, image_size: int = 64) -> dict:
    tokens = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, words in enumerate(captions):
        tokens[row, : len(words) + 2] = torch.tensor([1, *words, 2])
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(len(captions), 3, image_size, image_size, generator=generator),
        "caption_tokens": tokens,
        "caption_lengths": torch.tensor([len(words) + 2 for words in captions]),
    }


@pytest.fixture(scope="module")
def bicaptioner():
    torch.manual_seed(0)
    return build_objective(small_config(), VOCAB).eval()


@given(st.lists(st.lists(st.integers(4, VOCAB - 1), max_size=10), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_reversing_keeps_padding_behind_and_is_its_own_inverse(captions):
    batch = caption_batch(captions)
    tokens, lengths = batch["caption_tokens"], batch["caption_lengths"]
    mirrored = reverse_captions(tokens, lengths)
    for row, words in enumerate(captions):
        assert mirrored[row].tolist() == [2, *words[::-1], 1] + [0] * (10 - len(words))
    assert torch.equal(reverse_captions(mirrored, lengths), tokens)


def test_loss_ignores_how_much_padding_a_batch_has(bicaptioner):
    captions = [[5, 6, 7], [8, 9, 10, 11]]
    with torch.no_grad():
        narrow = bicaptioner(caption_batch(captions, length=6))
        wide = bicaptioner(caption_batch(captions, length=12))
    for name in narrow:
        torch.testing.assert_close(narrow[name], wide[name], rtol=1e-5, atol=1e-6)


def test_a_position_does_not_see_the_tokens_behind_it(bicaptioner):
    batch = caption_batch([[5, 6, 7, 8]])
    changed = batch["caption_tokens"].clone()
    changed[0, 3] = 30
    with torch.no_grad():
        visual = bicaptioner.textual.project(bicaptioner.visual(batch["image"]))
        before = bicaptioner.textual.hidden_states(visual, batch["caption_tokens"])
        after = bicaptioner.textual.hidden_states(visual, changed)
    torch.testing.assert_close(before[0, :3], after[0, :3])
    assert not torch.allclose(before[0, 3], after[0, 3])


def test_the_two_directions_share_everything_but_their_decoder_layers(bicaptioner):
    forward = dict(bicaptioner.textual.named_parameters(remove_duplicate=False))
    backward = dict(bicaptioner.backward_textual.named_parameters(remove_duplicate=False))
    assert forward.keys() == backward.keys()
    for name in forward:
        assert (forward[name] is backward[name]) == ("transformer" not in name), name
    assert forward["output.weight"] is forward["embedding.words.weight"]


def test_every_parameter_of_the_backbone_gets_a_gradient():
    torch.manual_seed(0)
    cfg = small_config()
    cfg.MODEL.VISUAL.ZERO_INIT_RESIDUAL = False  # a zero scale stops the gradient of its branch
    model = build_objective(cfg, VOCAB)
    sum(model(caption_batch([[5, 6], [7, 8, 9]])).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_captioner_learns_to_tell_two_images_apart():
    torch.manual_seed(0)
    cfg = small_config("captioning")
    cfg.MODEL.TEXTUAL.DROPOUT = 0.0
    model = build_objective(cfg, VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch = caption_batch([[5, 6], [7, 8]], image_size=32)
    for _ in range(60):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # blind to the image, the first word costs ln 2 = 0.69: 0.23 a token at best
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.OBJECTIVE", "bicaptoning", "Did you mean 'bicaptioning'"),
        ("MODEL.VISUAL.NAME", "resnet51", "Did you mean 'resnet50'"),
        ("MODEL.TEXTUAL.ATTENTION_HEADS", 7, "ATTENTION_HEADS to a divisor"),
        ("MODEL.TEXTUAL.NORM", "both", "MODEL.TEXTUAL.NORM"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_key(key, value, message):
    cfg = small_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=message):
        build_objective(cfg, VOCAB)
