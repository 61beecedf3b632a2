import shutil
import sys
import unicodedata

import pytest

from pretrain.methods.captioning.metrics import PTB, SIMPLE, UNSPACED_NOTE, score_captions
from virtex_d2.engine.errors import InputError

pytest.importorskip("pycocoevalcap", reason="requirements-captions.txt is not installed")

REFERENCES = {
    1: ["A man's dog runs on the beach.", "a dog runs over sand"],
    2: ["Two red balls, and a blue one.", "two balls of red and a blue ball"],
    3: ["a plate of food", "food lies on a plate"],
}
PERFECT = {image_id: [texts[0]] for image_id, texts in REFERENCES.items()}
POOR = {1: ["a plate of food"], 2: [""], 3: ["a man's dog"]}
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """`program(text)`: a `java` of that shell script is all that the PATH has besides a shell's."""

    def put(text=None):
        if text is not None:
            (tmp_path / "java").write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / "java").chmod(0o755)
        for name in ("sh", "sleep"):
            (tmp_path / name).symlink_to(shutil.which(name))
        monkeypatch.setenv("PATH", str(tmp_path))

    return put


def test_without_java_the_rest_is_computed_and_labelled(program):
    program()
    perfect, poor = (score_captions(candidates, REFERENCES) for candidates in (PERFECT, POOR))
    assert perfect.tokenizer == SIMPLE
    assert list(perfect.scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert perfect.scores[name] == pytest.approx(1, abs=1e-6)
    assert all(poor.scores[name] < perfect.scores[name] for name in perfect.scores)
    assert list(perfect.missing) == ["METEOR", "SPICE"]
    assert "Java is not installed" in perfect.missing["METEOR"]


def test_case_and_punctuation_make_no_difference(program):
    program()
    shouted = {image_id: [f"  {text.upper()} !"] for image_id, (text,) in PERFECT.items()}
    assert score_captions(shouted, REFERENCES) == score_captions(PERFECT, REFERENCES)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 60", "the tokenizer failed: it was not done after 1 s"),
        ("echo 'no memory' >&2; exit 3", "the tokenizer failed: no memory"),
        ("exit 3", "the tokenizer failed: exit code 3"),
        ("exit 0", "the tokenizer failed: 3 captions went in, 0 came out"),
    ],
)
def test_a_java_that_hangs_or_fails_is_told_and_stops_nothing(program, script, reason):
    program(script)
    result = score_captions(PERFECT, REFERENCES, java_timeout=1)
    assert result.tokenizer == SIMPLE
    assert result.missing == {"METEOR": reason, "SPICE": reason}


def test_a_metric_whose_java_dies_is_told(program):
    """Guards against waiting for ever, as pycocoevalcap does."""
    program('case "$*" in *PTB*) cat;; *) exit 3;; esac'.replace("cat", shutil.which("cat")))
    result = score_captions(PERFECT, REFERENCES, java_timeout=60)
    assert result.tokenizer == PTB
    assert "its Java program failed" in result.missing["METEOR"]


UNSPACED = {
    "Han": (["桌子上有一个红球", "一只狗在树下"], ["桌子上有一个蓝球", "一只猫在树下"]),
    "Kana": (["ねこがすわっている", "カラスがいる"], ["ねこがたっている", "ガラスがいる"]),
    "Thai": (["แมวอยู่บนโต๊ะ", "ม้าสีขาว"], ["แมวอยู่ใต้โต๊ะ", "ม้าสีดำ"]),
    "Khmer": (["ឆ្មានៅលើតុ", "សេះពណ៌ស"], ["ឆ្មានៅក្រោមតុ", "សេះពណ៌ខ្មៅ"]),
    "Lao": (["ແມວຢູ່ເທິງໂຕະ", "ມ້າສີຂາວ"], ["ແມວຢູ່ໃຕ້ໂຕະ", "ມ້າສີດໍາ"]),
    "Myanmar": (["ကြောင်စားပွဲပေါ်မှာ", "မြင်းဖြူ"], ["ကြောင်စားပွဲအောက်မှာ", "မြင်းနက်"]),
}


@pytest.mark.parametrize("script", UNSPACED)
def test_scripts_without_spaces_are_scored_by_character_and_that_is_said(program, script):
    program()
    truth, nearly = UNSPACED[script]
    references = {number: [text] for number, text in enumerate(truth)}
    result = score_captions({n: [text] for n, text in enumerate(nearly)}, references)
    assert 0.4 < result.scores["BLEU-1"] < 1
    assert 0 < result.scores["CIDEr"] < 10
    assert result.note == UNSPACED_NOTE
    assert "for English alone" in result.missing["METEOR"]
    assert score_captions(references, references).scores["BLEU-1"] == pytest.approx(1, abs=1e-6)


def test_captions_are_compared_in_one_unicode_form_with_their_marks(program):
    program()
    texts = ["빨간 공이 있다", "schöne Häuser", "क्या बिल्ली कुर्सी पर है", "एक कत्ता"]
    references = {number: [text] for number, text in enumerate(texts)}
    forms = {n: [unicodedata.normalize("NFD", t)] for n, (t,) in references.items()}
    assert score_captions(forms, references).scores["BLEU-1"] == pytest.approx(1, abs=1e-6)
    unmarked = {**references, 3: ["एक कुत्ता"]}
    assert score_captions(unmarked, references).scores["BLEU-1"] < 0.95
    assert score_captions(references, references).note == ""


def test_cider_of_one_image_is_not_computed(program):
    """Every word is in each of its images: all weights are 0."""
    program()
    result = score_captions({1: PERFECT[1]}, {1: REFERENCES[1]})
    assert "CIDEr" not in result.scores
    assert "there is one" in result.missing["CIDEr"]


@needs_java
@pytest.mark.slow
def test_with_java_captions_are_tokenized_as_pycocoevalcap_does_and_meteor_counts(monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    from pretrain.methods.captioning.metrics import _ptb

    # nobody answers: SPICE's models, where they are not there, cannot be fetched
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    references = {
        **REFERENCES,
        4: ["caf\u00e9 (don't): it's 3-4 \u201cpm\u201d; U.S. e.g. x...", " "],
    }
    theirs = PTBTokenizer().tokenize(
        {key: [{"caption": text} for text in texts] for key, texts in references.items()}
    )
    assert _ptb(references, 60) == theirs
    result = score_captions(PERFECT, REFERENCES, java_timeout=60)
    assert result.tokenizer == PTB
    assert result.scores["METEOR"] > 0.9
    assert "SPICE" in result.scores or "cannot be reached" in result.missing["SPICE"]


def test_without_pycocoevalcap_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(InputError, match=r"requirements-captions\.txt"):
        score_captions(PERFECT, REFERENCES)
