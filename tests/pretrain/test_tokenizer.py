"""The tokenizer: what it accepts, keeps and refuses; how it fits its captions."""

import logging
import pickle
import unicodedata

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import get_pretrain_cfg
from pretrain.data.records import CaptionRecord
from pretrain.methods.captioning.samples import load_or_train_tokenizer
from pretrain.methods.captioning.tokenizer import (
    SPECIAL_PIECES,
    Tokenizer,
    merge_warning,
    normalize_caption,
    summarise,
    train_tokenizer,
)
from virtex_d2.engine.errors import InputError

CAPTIONS = [
    "A man rides a horse on the left.",
    "Two dogs, one of them brown, sit beside the man.",
    "A café table with three cups; nobody is near.",
    "The horse jumps over a wooden fence.",
] * 3
LETTERS = sorted({char for caption in CAPTIONS for char in normalize_caption(caption)})
# characters() alone would leave out the halves of surrogate pairs, which JSON can hold
ANY_TEXT = st.text(st.characters() | st.characters(categories=["Cs"]))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(CAPTIONS, 90, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_file) -> Tokenizer:
    return Tokenizer(model_file)


def test_special_pieces_come_first_and_the_size_is_as_asked(tokenizer, model_file):
    assert (tokenizer.pad_id, tokenizer.sos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 90
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert tuple(pieces.id_to_piece([0, 1, 2, 3])) == SPECIAL_PIECES
    assert pieces.unk_id() == 0


@given(words=st.lists(st.text(st.sampled_from(LETTERS), max_size=8), max_size=8))
def test_text_of_known_letters_comes_back(tokenizer, words):
    text = " ".join(words)
    assert tokenizer.decode(tokenizer.encode(text)) == normalize_caption(text)


@given(text=ANY_TEXT)
def test_any_text_gives_pieces_and_never_a_control_piece(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(i == 0 or 3 < i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode(normalize_caption(text)) == ids


@given(text=ANY_TEXT)
def test_normalised_text_stays_as_it_is(text):
    for strip in (False, True):
        once = normalize_caption(text, strip)
        assert normalize_caption(once, strip) == once
        assert once == once.lower() == " ".join(once.split())
    assert not any(unicodedata.combining(char) for char in once)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  A\tCafé \n", "a cafe"),
        ("\uff26\uff35\uff2c\uff2c \ufb01t \u00bd", "full fit 1\u20442"),
        ("\u0130stanbul \u210c", "istanbul h"),
        ("Straße Ångström", "straße angstrom"),
        ("half \ud83d a pair", "half a pair"),
    ],
)
def test_virtexs_normalisation_lowers_decomposes_and_strips_accents(text, normal):
    assert normalize_caption(text, strip_accents=True) == normal


def test_words_that_spell_special_pieces_are_ordinary_text(tokenizer):
    assert not {1, 2, 3} & set(tokenizer.encode("[SOS] [EOS] [MASK] <unk>"))


def test_decoding_leaves_special_pieces_out(tokenizer):
    ids = tokenizer.encode("a horse")
    assert tokenizer.decode([1, *ids[:1], 3, *ids[1:], 2, 0, 0]) == "a horse"


def test_the_same_captions_give_the_same_bytes(model_file, tmp_path):
    train_tokenizer(iter(CAPTIONS), 90, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model_file.read_bytes()


def test_case_and_unicode_form_make_no_difference_to_training(model_file, tmp_path):
    shouted = [caption.upper().replace("CAFÉ", "CAFE\u0301") for caption in CAPTIONS]
    train_tokenizer(shouted, 90, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model_file.read_bytes()


SCRIPTS = {
    "Kana": ["ガラスのびん", "カラスのひん", "かぎ", "かき"],
    "Hangul": ["빨간 공이 있다", "개가 앉아 있다"],
    "Devanagari": ["क्या बिल्ली कुर्सी पर है", "मेज़ पर गेंद"],
    "Thai": ["น้ำอยู่ในแก้ว", "ม้าสีขาว", "มาสีขาว"],
    "Vietnamese": ["ma", "má", "mà", "mả", "mã", "mạ"],
    "German": ["schöne Häuser", "schone Hauser", "grüne Mütze"],
    "Arabic": ["كَتَبَ", "كتب"],
    "Hebrew": ["שָׁלוֹם", "שלום"],
    "Cyrillic": ["йод и ёлка", "иод и елка"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_captions_of_every_script_keep_their_letters(tmp_path, script):
    captions = SCRIPTS[script]
    assert len({normalize_caption(caption) for caption in captions}) == len(captions)
    letters = {char for caption in captions for char in normalize_caption(caption)}
    train_tokenizer(captions, len(letters) + 5, tmp_path / "t.model")
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert not tokenizer.strips_accents
    for caption in captions:
        decoded = tokenizer.decode(tokenizer.encode(unicodedata.normalize("NFD", caption)))
        assert decoded == unicodedata.normalize("NFC", caption.lower())


def test_a_vocabulary_says_itself_whether_captions_lose_their_accents(tmp_path):
    """Of 0.1.0's files and VirTex's own none says anything: they strip."""
    for strip, read in ((True, "cafe"), (False, "café")):
        train_tokenizer(CAPTIONS, 90, tmp_path / "t.model", strip)
        tokenizer = Tokenizer(tmp_path / "t.model")
        assert tokenizer.strips_accents is strip
        assert pickle.loads(pickle.dumps(tokenizer)).strips_accents is strip
        assert tokenizer.decode(tokenizer.encode("Café")) == read
    hangul = ["빨간 공이 있다"] * 3
    train_tokenizer(hangul, 24, tmp_path / "t.model", strip_accents=True)
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode(hangul[0])) == hangul[0], "NFC, whatever was learned"


def test_a_run_uses_a_vocabulary_as_it_was_learned_and_refuses_to_strip_what_it_kept(
    tmp_path, caplog
):
    caplog.set_level(logging.INFO, "pretrain.methods.captioning.samples")
    cfg = get_pretrain_cfg()
    cfg.OUTPUT_DIR, cfg.DATA.VOCAB_SIZE = str(tmp_path), 90
    records = [CaptionRecord(0, "a.jpg", tuple(CAPTIONS))]
    assert not load_or_train_tokenizer(cfg, records).strips_accents
    kept = tmp_path / "kept.model"
    (tmp_path / "tokenizer.model").rename(kept)
    cfg.DATA.STRIP_ACCENTS = True
    records.append(CaptionRecord(1, "b.jpg", ("a cafe",)))
    assert load_or_train_tokenizer(cfg, records).strips_accents
    assert "1 words become the same as others: cafe = café" in caplog.text
    cfg.DATA.TOKENIZER = str(kept)
    with pytest.raises(InputError, match=r"STRIP_ACCENTS True: .*kept\.model was learned from"):
        load_or_train_tokenizer(cfg, [])
    cfg.DATA.TOKENIZER, cfg.DATA.STRIP_ACCENTS = str(tmp_path / "tokenizer.model"), False
    assert load_or_train_tokenizer(cfg, []).strips_accents
    assert caplog.text.endswith("assumed to be learned without accents: captions lose theirs.\n")


@pytest.mark.parametrize(
    "long",
    ["an unusual zq jar with a wxk label " * 150, "zqwxk" * 1000, "ж" * 70_000, "🐕🐈" * 2000],
)
def test_captions_above_sentencepieces_limit_are_learned_from(tmp_path, long):
    """SentencePiece passes over what has more than 4192 bytes without a word."""
    train_tokenizer([*CAPTIONS, long], 90, tmp_path / "t.model")
    assert Tokenizer.pad_id not in Tokenizer(tmp_path / "t.model").encode(long)
    train_tokenizer([long], len(set(long)) + 5, tmp_path / "t.model")


def test_a_vocabulary_that_is_too_large_is_refused_with_the_largest_possible(tmp_path):
    output = tmp_path / "tokenizer.model"
    with pytest.raises(
        InputError, match=r"DATA\.VOCAB_SIZE 5000.*no more than \d+ pieces"
    ) as caught:
        train_tokenizer(CAPTIONS, 5000, output)
    assert list(tmp_path.iterdir()) == []
    largest = int(str(caught.value).split("no more than ")[1].split()[0])
    train_tokenizer(CAPTIONS, largest, output)
    assert Tokenizer(output).vocab_size == largest
    with pytest.raises(InputError, match=f"no more than {largest} pieces"):
        train_tokenizer(CAPTIONS, largest + 1, output)


def test_a_vocabulary_that_is_too_small_is_refused_with_the_smallest_possible(tmp_path):
    """Guards against the advice to make it smaller still."""
    output = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match=r"DATA\.VOCAB_SIZE 10.*need \d+ pieces") as caught:
        train_tokenizer(CAPTIONS, 10, output)
    smallest = int(str(caught.value).split("need ")[1].split()[0])
    train_tokenizer(CAPTIONS, smallest, output)
    assert Tokenizer(output).vocab_size == smallest


@pytest.mark.parametrize(
    ("captions", "size", "message"),
    [([], 50, "no caption with text"), ([" "], 50, "no caption with text"), (["a"], -1, "-1")],
)
def test_a_training_that_cannot_be_is_refused(tmp_path, captions, size, message):
    with pytest.raises(InputError, match=message):
        train_tokenizer(captions, size, tmp_path / "tokenizer.model")


def test_a_failed_training_leaves_the_old_file(tmp_path):
    output = tmp_path / "tokenizer.model"
    output.write_bytes(b"old")
    with pytest.raises(InputError):
        train_tokenizer(CAPTIONS, 5000, output)
    assert output.read_bytes() == b"old"


@pytest.mark.parametrize("content", [None, b"", b"text", "cut"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, model_file, content):
    path = tmp_path / "other.model"
    if content is not None:
        path.write_bytes(model_file.read_bytes()[:100] if content == "cut" else content)
    with pytest.raises(InputError, match=r"other\.model"):
        Tokenizer(path)


def test_a_tokenizer_with_other_special_pieces_is_refused(tmp_path):
    """SentencePiece's own order (<unk>, <s>, </s>) would train, on wrong tokens."""
    prefix = tmp_path / "plain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_prefix=str(prefix), vocab_size=50, minloglevel=2
    )
    with pytest.raises(InputError, match=r"\[SOS\].*found <unk>, <s>, </s>"):
        Tokenizer(f"{prefix}.model")


@pytest.mark.parametrize("names", [("[SOS]", "[EOS]", "[MASK]"), ("<start>", "<end>", "<hidden>")])
def test_vocabularies_of_virtex_load_whatever_their_special_pieces_are_called(tmp_path, names):
    """Trained as VirTex's own script does: <unk> 0, no <s>, </s> and padding, three controls."""
    prefix = tmp_path / "coco_50"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_prefix=str(prefix),
        vocab_size=90,
        model_type="bpe",
        character_coverage=1.0,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        control_symbols=list(names),
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = Tokenizer(f"{prefix}.model")
    assert tokenizer.pieces(range(4)) == ["<unk>", *names]
    ids = tokenizer.encode(CAPTIONS[0])
    assert min(ids) > tokenizer.mask_id
    assert tokenizer.decode([1, *ids, 2]) == normalize_caption(CAPTIONS[0])


def test_pieces_say_where_words_begin(tokenizer):
    pieces = tokenizer.pieces(tokenizer.encode("a horse"))
    assert "".join(pieces) == "\u2581a\u2581horse"


def test_it_travels_to_worker_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])


@settings(max_examples=30)
@given(ids=st.lists(st.integers(0, 89)))
def test_any_ids_decode_to_text(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


COUNTED = ["a dog", "a dog and a cat", "a bird " * 20] * 200


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_tokenizer(COUNTED, 15, path)  # a piece for each letter
    return Tokenizer(path)


def test_a_summary_counts_tokens_as_the_model_reads_them(counting):
    summary = summarise(counting, COUNTED)
    lengths = sorted(len(counting.encode(caption)) + 2 for caption in COUNTED[:3])
    assert (summary.captions, summary.pieces) == (600, 15)
    assert summary.mean_tokens == pytest.approx(sum(lengths) / 3)
    assert summary.max_tokens == summary.p95_tokens == lengths[-1]
    assert summary.share_too_long == pytest.approx(1 / 3)
    assert summary.unknown_tokens == 0
    assert any("33.33%" in line for line in summary.lines())


def test_characters_that_the_vocabulary_lacks_are_counted(counting):
    assert summarise(counting, ["a \u72ac", "a dog"]).unknown_tokens == 1


def test_pieces_that_are_hardly_seen_are_warned_of(counting):
    assert summarise(counting, COUNTED).warning() == ""
    few = summarise(counting, COUNTED[:2])
    assert few.share_seldom == 1
    assert few.share_unused == pytest.approx(3 / 11)  # b, i, r
    assert "100% of the 15 pieces occur fewer than 100 times in these 2 captions" in few.warning()


def test_words_that_stripped_accents_merge_are_named():
    words = merge_warning(["Má mà", "か が", "ma", "one two"])
    assert "2 words" in words
    assert "ma = mà = má" in words
    assert "か = が" in words
    assert merge_warning(["Café and a Cafe\u0301", "one"]) == ""
