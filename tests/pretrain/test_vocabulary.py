import pytest

from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from pretrain.methods.captioning.vocabulary import merge_warning, summarise

CAPTIONS = ["a dog", "a dog and a cat", "a bird " * 20] * 200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_tokenizer(CAPTIONS, 15, path)  # a piece for each letter
    return Tokenizer(path)


def test_a_summary_counts_tokens_as_the_model_reads_them(tokenizer):
    summary = summarise(tokenizer, CAPTIONS)
    lengths = sorted(len(tokenizer.encode(caption)) + 2 for caption in CAPTIONS[:3])
    assert (summary.captions, summary.pieces) == (600, 15)
    assert summary.mean_tokens == pytest.approx(sum(lengths) / 3)
    assert summary.max_tokens == summary.p95_tokens == lengths[-1]
    assert summary.share_too_long == pytest.approx(1 / 3)
    assert summary.unknown_tokens == 0
    assert any("33.33%" in line for line in summary.lines())


def test_characters_that_the_vocabulary_lacks_are_counted(tokenizer):
    assert summarise(tokenizer, ["a \u72ac", "a dog"]).unknown_tokens == 1


def test_pieces_that_are_hardly_seen_are_warned_of(tokenizer):
    assert summarise(tokenizer, CAPTIONS).warning() == ""
    few = summarise(tokenizer, CAPTIONS[:2])
    assert few.share_seldom == 1
    assert few.share_unused == pytest.approx(3 / 11)  # b, i, r
    assert "100% of the 15 pieces occur fewer than 100 times in these 2 captions" in few.warning()


def test_words_that_stripped_accents_merge_are_named():
    words = merge_warning(["Má mà", "か が", "ma", "one two"])
    assert "2 words" in words
    assert "ma = mà = má" in words
    assert "か = が" in words
    assert merge_warning(["Café and a Cafe\u0301", "one"]) == ""
