import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pretrain.methods.captioning.decoding import beam_search, nucleus_sampling
from pretrain.methods.captioning.textual_head import TextualHead
from tests.pretrain import recompute
from tests.pretrain.recompute import EOS, MASK, PAD, SOS
from virtex_d2.engine.errors import InputError


def random_head(seed=0, vocab=30, layers=1, heads=2, norm="post", length=8, width=16, bias=0.0):
    """A head whose words differ clearly in probability; float64, so that no order is a rounding."""
    torch.manual_seed(seed)
    head = TextualHead(6, vocab, width, layers, heads, 24, 0.3, length, norm)
    for name, parameter in head.named_parameters():
        if not name.endswith("norm.weight"):
            nn.init.normal_(parameter, std=0.4)
    with torch.no_grad():
        head.output.bias[EOS] += bias
    return head.double().eval()


def random_features(images, seed=0, height=2, width=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 6, height, width, generator=generator, dtype=torch.float64)


heads = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "vocab": st.integers(6, 40),
        "layers": st.integers(1, 3),
        "heads": st.sampled_from([1, 2, 4]),
        "norm": st.sampled_from(["post", "pre"]),
        "length": st.integers(1, 10),
        "bias": st.sampled_from([-4.0, 0.0, 2.0]),  # how early captions end
    }
)


@given(heads, st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=60)
def test_the_cache_changes_neither_captions_nor_their_probabilities(sizes, images, beams, data):
    head, features = random_head(**sizes), random_features(images, sizes["seed"])
    max_words = data.draw(st.integers(1, sizes["length"]))
    decoded = beam_search(head, features, beams, max_words)
    tokens, scores = recompute.beam_search(head, features, beams, max_words)
    assert [caption.tokens for caption in decoded] == [
        recompute.until_end(row) for row in tokens.tolist()
    ]
    assert [caption.logprob for caption in decoded] == pytest.approx(scores.tolist(), abs=1e-4)


@given(heads, st.integers(1, 4), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
@settings(max_examples=40)
def test_samples_have_the_probability_that_the_model_gives_them(sizes, images, top_p, temperature):
    head, features = random_head(**sizes), random_features(images, sizes["seed"])
    generator = torch.Generator().manual_seed(sizes["seed"])
    for index, caption in enumerate(
        nucleus_sampling(head, features, generator, top_p, temperature)
    ):
        memory, expected = head.project(features[index : index + 1]), 0.0
        for place, token in enumerate(caption.tokens):
            prefix = torch.tensor([[SOS, *caption.tokens[:place]]])
            with torch.no_grad():
                log_probs = recompute.next_log_probs(head, memory, prefix)[0]
            expected += log_probs[token].item()
            probs = (log_probs / temperature).softmax(-1)
            # words that are more probable than this one do not fill the nucleus yet
            assert probs[probs > probs[token]].sum() < top_p + 1e-9
        assert caption.logprob == pytest.approx(expected, abs=1e-4)


@given(heads, st.integers(1, 5))
@settings(max_examples=30)
def test_specials_and_repeated_words_are_never_produced(sizes, beams):
    head, features = random_head(**sizes), random_features(2)
    captions = beam_search(head, features, beams)
    captions += nucleus_sampling(head, features, torch.Generator().manual_seed(1), 1.0, 5.0)
    for caption in captions:
        assert not {PAD, SOS, MASK} & set(caption.tokens)
        assert EOS not in caption.tokens[:-1]
        assert all(a != b for a, b in zip(caption.tokens, caption.tokens[1:]))
        assert 1 <= len(caption.tokens) <= sizes["length"]


def test_a_beam_finds_what_greedy_decoding_misses():
    better = 0
    for seed in range(20):
        head, features = random_head(seed), random_features(1, seed)
        greedy, beam = (beam_search(head, features, size)[0].logprob for size in (1, 5))
        better += beam > greedy + 1e-6
    assert better >= 5


def test_sampling_is_the_same_for_a_seed_and_for_any_batch_size():
    head, features = random_head(bias=-2.0), random_features(5)

    def sample(*batches):
        generator = torch.Generator().manual_seed(7)
        return [
            caption.tokens
            for batch in batches
            for caption in nucleus_sampling(head, batch, generator, top_p=0.95)
        ]

    together = sample(features)
    assert together == sample(features)
    assert together == sample(features[:2], features[2:3], features[3:])
    assert together != [
        caption.tokens
        for caption in nucleus_sampling(head, features, torch.Generator().manual_seed(8), 0.95)
    ]


def test_a_small_nucleus_or_temperature_is_greedy_decoding():
    head, features = random_head(3), random_features(4)
    greedy = [caption.tokens for caption in beam_search(head, features, 1)]
    for top_p, temperature in ((1e-6, 1.0), (1.0, 1e-4)):
        generator = torch.Generator().manual_seed(0)
        sampled = nucleus_sampling(head, features, generator, top_p, temperature)
        assert [caption.tokens for caption in sampled] == greedy


def test_samples_follow_the_distribution():
    head = random_head(5, vocab=7, length=1)
    features = random_features(1).expand(4000, -1, -1, -1)
    sampled = nucleus_sampling(head, features, torch.Generator().manual_seed(0), top_p=1.0)
    counts = torch.zeros(7)
    for caption in sampled:
        counts[caption.tokens[0]] += 1
    with torch.no_grad():
        memory = head.project(features[:1])
        expected = recompute.next_log_probs(head, memory, torch.tensor([[SOS]]))[0].softmax(-1)
    torch.testing.assert_close(counts / 4000, expected.float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_attention_is_the_last_layers_over_the_image_at_each_word(norm):
    head, features = random_head(layers=2, norm=norm, bias=-9.0), random_features(3)
    seen = []
    image_attention = head.transformer.layers[-1].multihead_attn
    image_attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    for decoded in (
        beam_search(head, features, 4, with_attention=True),
        nucleus_sampling(head, features, torch.Generator().manual_seed(0), with_attention=True),
    ):
        for index, caption in enumerate(decoded):
            prefix = torch.tensor([[SOS, *caption.tokens[:-1]]])
            seen.clear()
            with torch.no_grad():
                recompute.hidden_states(head, head.project(features[index : index + 1]), prefix)
                _, weights = image_attention(*seen[0], need_weights=True)  # (1, T, S)
            expected = weights[0].unflatten(-1, (2, 3)).float()
            torch.testing.assert_close(caption.attention, expected, rtol=1e-4, atol=1e-6)


def test_decoding_ignores_dropout_and_leaves_the_model_as_it_is():
    head, features = random_head(), random_features(2)
    expected = [caption.tokens for caption in beam_search(head, features)]
    head.train()
    assert [caption.tokens for caption in beam_search(head, features)] == expected
    assert head.training


def test_decoding_works_in_float32_and_under_autocast():
    head, features = random_head().float(), random_features(3).float()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            decoded = beam_search(head, features, with_attention=True)
        for caption in decoded:
            assert -1000 < caption.logprob < 0
            assert caption.attention.dtype == torch.float32
            sums = caption.attention.sum((1, 2))
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=0.02)


def test_no_images_give_no_captions():
    head = random_head()
    assert beam_search(head, random_features(0)) == []
    assert nucleus_sampling(head, random_features(0), torch.Generator()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam_size": 0}, "Beam size 0"),
        ({"max_words": 9}, "9 words a caption: the model has 8 positions"),
        ({"max_words": 0}, "0 words a caption"),
        ({"top_p": 0.0}, "Top-p 0.0"),
        ({"top_p": 1.1}, "Top-p 1.1"),
        ({"temperature": 0.0}, "Temperature 0.0"),
        ({"temperature": float("nan")}, "Temperature nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    head, features = random_head(), random_features(1)
    sampling = {"top_p", "temperature"} & arguments.keys()
    with pytest.raises(InputError, match=message):
        if sampling:
            nucleus_sampling(head, features, torch.Generator(), **arguments)
        else:
            beam_search(head, features, **arguments)
