"""Captioning objectives: what the loss sees and what it must not see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import get_pretrain_cfg
from pretrain.methods.captioning.model import reverse_captions, token_labels
from pretrain.methods.captioning.textual_head import Words, word_places
from pretrain.methods.classification.classifier import label_loss
from pretrain.methods.method import build_method
from tests.pretrain import recompute
from virtex_d2.engine.errors import InputError

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
    return build_method(small_config(), VOCAB).eval()


@given(st.lists(st.lists(st.integers(4, VOCAB - 1), max_size=10), min_size=1, max_size=4))
@settings(max_examples=50)
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


def packed_states(head, batch: dict, visual_tokens: torch.Tensor, at_once=None):
    """Hidden states of all words of all captions and of what fills them up, and where they are."""
    shape, lengths = tuple(batch["caption_tokens"].shape), batch["caption_lengths"]
    words = Words(shape, lengths, word_places(lengths, shape[1]))
    embedded = head.embedding(words.pack(batch["caption_tokens"]), words.positions)
    return head.hidden_states(embedded, visual_tokens, words, at_once), words


def test_a_position_does_not_see_the_tokens_behind_it(bicaptioner):
    batch = caption_batch([[5, 6, 7, 8]])
    tokens = batch["caption_tokens"].clone()
    tokens[0, 3] = 30
    with torch.no_grad():
        visual = bicaptioner.textual.project(bicaptioner.visual(batch["image"]))
        before, _ = packed_states(bicaptioner.textual, batch, visual)
        after, _ = packed_states(bicaptioner.textual, {**batch, "caption_tokens": tokens}, visual)
    torch.testing.assert_close(before[:3], after[:3])
    assert not torch.allclose(before[3], after[3])


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("layers", [1, 2])
def test_words_without_padding_have_the_states_that_torchs_decoder_gives_them(norm, layers):
    """<unk>, whose piece is padding's, stands within a caption, too."""
    cfg = small_config()
    cfg.MODEL.TEXTUAL.NORM, cfg.MODEL.TEXTUAL.NUM_LAYERS = norm, layers
    torch.manual_seed(0)
    head = build_method(cfg, VOCAB).eval().textual
    batch = caption_batch([[5, 6, 7], [], [8, 0, 9, 10, 11, 12, 13, 14, 15, 16], [9]])
    visual_tokens = torch.randn(4, 5, 64)
    packed, words = packed_states(head, batch, visual_tokens)
    count = int(words.lengths.sum())
    dense = recompute.hidden_states(head, visual_tokens, batch["caption_tokens"])
    torch.testing.assert_close(packed[:count], words.pack(dense)[:count], rtol=1e-4, atol=1e-5)
    packed[:count].square().sum().backward()
    gradients = [p.grad.clone() for p in head.transformer.parameters()]
    head.zero_grad()
    dense = recompute.hidden_states(head, visual_tokens, batch["caption_tokens"])
    words.pack(dense)[:count].square().sum().backward()
    for found, parameter in zip(gradients, head.transformer.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-4)


def random_captions(count: int, seed: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 11, (count,), generator=random).tolist()
    return [torch.randint(4, VOCAB, (n,), generator=random).tolist() for n in lengths]


@pytest.mark.parametrize("objective", ["bicaptioning", "captioning", "masked_lm"])
@pytest.mark.parametrize(("count", "norm"), [(5, "post"), (14, "pre")])
def test_what_fills_words_up_to_a_multiple_changes_no_loss_and_no_gradient(
    monkeypatch, objective, count, norm
):
    """Some rows are read at once, targets are smoothed; one caption holds <unk>."""
    cfg = small_config(objective)
    cfg.MODEL.TEXTUAL.DROPOUT, cfg.MODEL.TEXTUAL.NORM = 0.0, norm
    if objective != "masked_lm":
        cfg.MODEL.CAPTIONING.LABEL_SMOOTHING = 0.1
    torch.manual_seed(0)
    model = build_method(cfg, VOCAB).double()
    captions = random_captions(count, seed=count)
    captions[0] = [5, 0, 6]
    batch = masked_batch(captions, hidden=1) | {"parallel": torch.arange(count) % 3 == 0}
    batch["image"] = batch["image"][:, :, :32, :32].double()
    found = []
    for rows in (1, 64):
        monkeypatch.setattr("pretrain.methods.captioning.textual_head.ROWS", rows)
        model.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
        found.append((losses, [p.grad.clone() for p in model.parameters()]))
    given = model({**batch, **model.places(batch)})  # made on the host beforehand
    (exact, gradients), (filled, others) = found
    for name in exact:
        torch.testing.assert_close(filled[name], exact[name], rtol=1e-12, atol=0)
        torch.testing.assert_close(given[name], exact[name], rtol=1e-12, atol=0)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_batches_of_other_captions_give_products_of_the_same_few_shapes():
    torch.manual_seed(0)
    for objective, most in (("bicaptioning", 2), ("masked_lm", 2)):
        model = build_method(small_config(objective), VOCAB)
        rows = set()
        model.textual.output.register_forward_hook(
            lambda _, given, __, rows=rows: rows.add(given[0].shape[0])
        )
        for seed in range(12):
            model(masked_batch(random_captions(14, seed), hidden=1))
        assert len(rows) <= most, objective


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
    model = build_method(cfg, VOCAB)
    sum(model(caption_batch([[5, 6], [7, 8, 9]])).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_captioner_learns_to_tell_two_images_apart():
    torch.manual_seed(0)
    cfg = small_config("captioning")
    cfg.MODEL.TEXTUAL.DROPOUT = 0.0
    model = build_method(cfg, VOCAB)
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
        build_method(cfg, VOCAB)


# The other tasks


def masked_batch(captions: list[list[int]], hidden: int = 2, length: int = 12) -> dict:
    """Word `hidden` of every caption is [MASK]."""
    batch = caption_batch(captions, length)
    batch["masked_tokens"] = batch["caption_tokens"].clone()
    batch["masked_labels"] = torch.zeros_like(batch["caption_tokens"])
    batch["masked_tokens"][:, hidden] = 3
    batch["masked_labels"][:, hidden] = batch["caption_tokens"][:, hidden]
    return batch


@pytest.fixture(scope="module")
def masked_model():
    torch.manual_seed(0)
    return build_method(small_config("masked_lm"), VOCAB).eval()


def test_masked_words_are_predicted_from_both_sides_and_not_from_themselves(masked_model):
    def loss(*caption: int, length: int = 12, tokens: list[int] | None = None) -> float:
        batch = masked_batch([list(caption)], length=length)
        if tokens is not None:
            batch["masked_tokens"][0, : len(tokens)] = torch.tensor(tokens)
        with torch.no_grad():
            return masked_model(batch)["loss_masked_lm"].item()

    whole = loss(5, 6, 7, 8)
    assert loss(5, 6, 7, 8, length=9) == pytest.approx(whole, rel=1e-5), "padding is read"
    assert loss(9, 6, 7, 8) != pytest.approx(whole, rel=1e-5), "the words before are not read"
    assert loss(5, 6, 7, 9) != pytest.approx(whole, rel=1e-5), "the words behind are not read"


def test_captions_with_nothing_to_hide_cost_nothing(masked_model):
    batch = masked_batch([[5, 6, 7]])
    batch["masked_labels"].zero_()
    loss = masked_model(batch)["loss_masked_lm"]
    assert loss.item() == 0
    assert masked_model.count(batch) == 0
    loss.backward()  # one process of many may have such a batch


def test_label_loss_is_the_mean_over_labels_then_over_labelled_rows():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [4.0, 4.0, 4.0]])
    labels = torch.tensor([[True, False, True], [False, True, False], [False] * 3])
    log_probs = logits.log_softmax(1)
    expected = -((log_probs[0, 0] + log_probs[0, 2]) / 2 + log_probs[1, 1]) / 2
    torch.testing.assert_close(label_loss(logits, labels), expected)
    assert label_loss(logits, torch.zeros_like(labels)).item() == 0


def test_token_labels_are_the_words_once_and_no_special_piece():
    batch = caption_batch([[5, 6, 5], [7]])
    labels = token_labels(batch["caption_tokens"], VOCAB)
    assert [row.nonzero()[:, 0].tolist() for row in labels] == [[5, 6], [7]]


def test_multilabel_classification_reads_the_labels_and_counts_labelled_images():
    torch.manual_seed(0)
    model = build_method(small_config("multilabel_classification"), 3).eval()
    batch = caption_batch([[5], [6], [7]])
    batch["labels"] = torch.tensor([[0, 2], [1, -1], [-1, -1]])
    logits = model.textual(model.visual(batch["image"]))
    expected = label_loss(
        logits, torch.tensor([[True, False, True], [False, True, False], [False] * 3])
    )
    torch.testing.assert_close(model(batch)["loss_classification"], expected)
    assert model.count(batch) == 2


def test_backward_captioning_is_the_backward_half_of_bicaptioning(bicaptioner):
    model = build_method(small_config("backward_captioning"), VOCAB).eval()
    state = bicaptioner.state_dict()
    own = {
        name: state[name.replace("textual.", "backward_textual.", 1)]
        if name.startswith("textual.")
        else state[name]
        for name in model.state_dict()
    }
    model.load_state_dict(own)
    batch = caption_batch([[5, 6, 7], [8, 9, 10, 11]])
    losses = model(batch)
    assert list(losses) == ["loss_captioning_backward"]
    both = bicaptioner(batch)["loss_captioning_backward"]
    torch.testing.assert_close(losses["loss_captioning_backward"], both)


# Additions to captioning


def test_a_row_that_is_read_at_once_sees_all_of_its_words_and_others_none_behind_them():
    """Of equal words, as [MASK]s are, the states depend on position and length alone."""
    cfg = small_config("captioning")
    torch.manual_seed(0)
    head = build_method(cfg, VOCAB).eval().textual
    batch = caption_batch([[5, 6, 7], [8, 9, 10], [8, 9]])
    batch["caption_tokens"][:2, :5] = 3
    visual_tokens = torch.randn(1, 4, 64).expand(3, 4, 64)
    states, _ = packed_states(head, batch, visual_tokens, at_once=torch.tensor([True, True, False]))
    first, second, causal, _ = states.split([5, 5, 4, len(states) - 14])  # and what fills up
    torch.testing.assert_close(first, second)
    plain, _ = packed_states(head, batch, visual_tokens)
    torch.testing.assert_close(causal, plain[10:14])
    assert not torch.allclose(first[0], plain[0])  # which sees itself alone
    batch["caption_tokens"][0, 4] = 20
    changed, _ = packed_states(head, batch, visual_tokens, torch.tensor([True, True, False]))
    assert not torch.allclose(changed[0], states[0])
    torch.testing.assert_close(changed[5:14], states[5:14])


@pytest.mark.parametrize("parallel", [[False, False], [True, True], [True, False]])
def test_any_share_of_a_batch_may_be_predicted_at_once(parallel):
    cfg = small_config()
    cfg.MODEL.TEXTUAL.DROPOUT = 0.0
    torch.manual_seed(0)
    model = build_method(cfg, VOCAB).train()
    batch = {**caption_batch([[5, 6, 7], [8, 9, 10]]), "parallel": torch.tensor(parallel)}
    losses = model(batch)
    plain = model({key: value for key, value in batch.items() if key != "parallel"})
    for name in plain:
        same = losses[name].item() == pytest.approx(plain[name].item(), rel=1e-4)
        assert same == (not any(parallel)), name
    model.eval()  # validation asks for the next word whatever the mode
    evaluated = model(batch)
    del batch["parallel"]
    assert evaluated == model(batch)


def test_additions_change_training_and_leave_validation_comparable():
    batch = caption_batch([[5, 6, 7], [8, 9, 10]])
    losses = {}
    for weight, smoothing in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.2)):
        cfg = small_config()
        cfg.MODEL.TEXTUAL.DROPOUT = 0.0
        cfg.MODEL.CAPTIONING.CLASSIFICATION_WEIGHT = weight
        cfg.MODEL.CAPTIONING.LABEL_SMOOTHING = smoothing
        torch.manual_seed(0)
        model = build_method(cfg, VOCAB)
        losses[weight, smoothing] = (model.train()(batch), model.eval()(batch))
    plain, with_labels, smoothed = losses.values()
    assert set(with_labels[0]) - set(plain[0]) == {"loss_classification"}
    assert smoothed[0]["loss_captioning_forward"] != plain[0]["loss_captioning_forward"]
    assert plain[1].keys() == with_labels[1].keys()
    for name, value in plain[1].items():
        torch.testing.assert_close(smoothed[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "key", "value", "message"),
    [
        ("masked_lm", "PARALLEL_SHARE", 0.5, "is for captioning"),
        ("bicaptioning", "PARALLEL_SHARE", 1.5, "PARALLEL_SHARE 1.5"),
        ("bicaptioning", "LABEL_SMOOTHING", -0.1, "LABEL_SMOOTHING -0.1"),
    ],
)
def test_additions_that_cannot_be_are_refused(objective, key, value, message):
    cfg = small_config(objective)
    cfg.MODEL.CAPTIONING[key] = value
    with pytest.raises(InputError, match=message):
        build_method(cfg, VOCAB)
