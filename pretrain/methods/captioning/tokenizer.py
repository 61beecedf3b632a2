"""SentencePiece BPE as VirTex uses it: train, encode, decode; how well it fits its captions."""

import hashlib
import io
import os
import re
import textwrap
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import sentencepiece

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path

SPECIAL_PIECES = ("<unk>", "[SOS]", "[EOS]", "[MASK]")

# Behind a model where captions kept their accents: a ModelProto with normalizer_spec (3) and name
# (1), which is merged in and which SentencePiece does not read. No piece can be so long.
_ACCENTS_KEPT = b"NFC, lower case, accents kept"
_ACCENTS_MARK = bytes([0x1A, len(_ACCENTS_KEPT) + 2, 0x0A, len(_ACCENTS_KEPT)]) + _ACCENTS_KEPT
LONGEST = 30  # tokens that VirTex keeps of a caption, [SOS] and [EOS] included
# A rule of thumb: the embedding of a piece that is seen more seldom is hardly trained.
SELDOM = 100
MOST = 0.5  # share of such pieces that makes a vocabulary too large

_LONGEST_PART = 1000  # characters, of 4 bytes at most: SentencePiece passes over what has > 4192


def normalize_caption(caption: str, strip_accents: bool = False) -> str:
    """Make NFC, lower case, single spaces; `strip_accents` is NFKD without combining marks (VirTex,
    released code), which leaves English alone as it is."""
    if strip_accents:
        decomposed = unicodedata.normalize("NFKD", caption)
        plain = "".join(char for char in decomposed if not unicodedata.combining(char)).lower()
    else:
        plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", caption).lower())
    # JSON can hold halves of surrogate pairs, which are no text: SentencePiece refuses them
    whole = plain.encode("utf-8", "ignore").decode("utf-8")
    return " ".join(whole.split())


class Tokenizer:
    """A trained vocabulary. `<unk>` is piece 0 and also the padding.

    Attributes:
        strips_accents: whether captions lose their accents, as they did when it was learned.
    """

    pad_id, sos_id, eos_id, mask_id = range(4)

    def __init__(self, model_file: str | os.PathLike):
        if not os.path.isfile(model_file):
            raise InputError(f"{model_file}: expected a SentencePiece model, found no file there.")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"{model_file}: it is not a SentencePiece model, or cut short ({error})."
            ) from error
        self.strips_accents = _ACCENTS_KEPT not in self._model.serialized_model_proto()
        found = self.pieces(range(min(4, self._model.vocab_size())))
        # by kind, not by name: vocabularies of older models have other names in the same places
        kinds = [self._model.is_unknown(0), *map(self._model.is_control, range(1, len(found)))]
        if len(found) < 4 or not all(kinds):
            raise InputError(
                f"{model_file}: expected the pieces {', '.join(SPECIAL_PIECES)} first, found "
                f"{', '.join(found)}. It was made for another model."
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces, the four special ones included."""
        return self._model.vocab_size()

    @property
    def sha256(self) -> str:
        """Of the model: what tells two vocabularies of one size apart."""
        return hashlib.sha256(self._model.serialized_model_proto()).hexdigest()

    def encode(self, caption: str) -> list[int]:
        """Piece ids of a caption, without [SOS] and [EOS]."""
        return self._model.encode(normalize_caption(caption, self.strips_accents))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each piece; "\u2581" stands where a word begins."""
        return self._model.id_to_piece(list(map(int, ids)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of piece ids, in NFC; special pieces leave nothing."""
        text = self._model.decode([i for i in map(int, ids) if i > self.mask_id])
        return unicodedata.normalize("NFC", text)


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, output: str | os.PathLike, strip_accents: bool = False
) -> None:
    """Train BPE on captions and write the model to `output`, atomically.

    The same captions in the same order give the same file. `strip_accents` as in
    `normalize_caption`; the file says which.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_parts(captions, strip_accents),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=list(SPECIAL_PIECES[1:]),
            # captions are normalised already, by a function that is the same at encoding
            normalization_rule_name="identity",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_training_message(vocab_size, str(error))) from error
    with atomic_path(output) as temporary:
        temporary.write_bytes(model.getvalue() + (b"" if strip_accents else _ACCENTS_MARK))


def _parts(captions: Iterable[str], strip_accents: bool) -> Iterator[str]:
    """Normalised captions, those that SentencePiece would not learn from in several parts."""
    for caption in captions:
        text = normalize_caption(caption, strip_accents)
        if len(text) <= _LONGEST_PART:
            yield text
        else:
            yield from textwrap.wrap(text, _LONGEST_PART, break_on_hyphens=False)


def _training_message(vocab_size: int, reason: str) -> str:
    """SentencePiece's reason in terms of the config; as it is, where the words are unknown."""
    if largest := re.search(r"too high.*<= (\d+)", reason):
        advice = f"the training captions have no more than {largest[1]} pieces; use at most that."
    elif smallest := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        advice = f"the captions' characters alone need {smallest[1]} pieces; use at least that."
    elif "sentences_.empty" in reason:
        advice = "there is no caption with text to train a tokenizer on."
    else:
        advice = f"no tokenizer of that size can be trained ({reason.strip()})."
    return f"DATA.VOCAB_SIZE {vocab_size}: {advice}"


@dataclass(frozen=True)
class VocabularySummary:
    """A vocabulary on its captions. A caption's tokens are its pieces, [SOS] and [EOS].

    Attributes:
        captions: their number.
        pieces: of the vocabulary, special ones included.
        mean_tokens, p95_tokens, max_tokens: tokens a caption; the second is the 95th percentile.
        share_too_long: of captions with more than `LONGEST` tokens.
        unknown_tokens: <unk> in all captions.
        share_seldom: share of the pieces, special ones aside, that occur fewer than `SELDOM` times.
        share_unused: share of the same that never occur.
    """

    captions: int
    pieces: int
    mean_tokens: float
    p95_tokens: float
    max_tokens: int
    share_too_long: float
    unknown_tokens: int
    share_seldom: float
    share_unused: float

    def lines(self) -> list[str]:
        """Write the summary for people."""
        return [
            f"captions                     {self.captions}",
            f"pieces                       {self.pieces}",
            f"tokens a caption             {self.mean_tokens:.1f} on average, 95 % up to "
            f"{self.p95_tokens:.0f}, at most {self.max_tokens} ([SOS] and [EOS] included)",
            f"captions above {LONGEST} tokens     {self.share_too_long:.2%}",
            f"unknown tokens               {self.unknown_tokens}",
            f"pieces seen < {SELDOM} times      {self.share_seldom:.1%}",
            f"pieces never seen            {self.share_unused:.1%}",
        ]

    def warning(self) -> str:
        """Say what speaks against so many pieces; "" where nothing does."""
        if self.share_seldom < MOST:
            return ""
        return (
            f"{self.share_seldom:.0%} of the {self.pieces} pieces occur fewer than {SELDOM} times "
            f"in these {self.captions} captions: their embeddings will hardly be trained. A "
            "smaller --vocab-size suits so few captions better."
        )


def summarise(tokenizer: Tokenizer, captions: Iterable[str]) -> VocabularySummary:
    """Count what the tokenizer makes of captions, of which there is at least one."""
    counts: Counter[int] = Counter()
    lengths = []
    for caption in captions:
        ids = tokenizer.encode(caption)
        counts.update(ids)
        lengths.append(len(ids) + 2)
    tokens = np.array(lengths)
    seen = np.array([counts[i] for i in range(len(SPECIAL_PIECES), tokenizer.vocab_size)])
    return VocabularySummary(
        captions=len(tokens),
        pieces=tokenizer.vocab_size,
        mean_tokens=float(tokens.mean()),
        p95_tokens=float(np.percentile(tokens, 95)),
        max_tokens=int(tokens.max()),
        share_too_long=float((tokens > LONGEST).mean()),
        unknown_tokens=counts[Tokenizer.pad_id],
        share_seldom=float((seen < SELDOM).mean()),
        share_unused=float((seen == 0).mean()),
    )


def merge_warning(captions: Iterable[str]) -> str:
    """Say which words become one where accents are stripped; "" where none do."""
    forms = defaultdict(list)
    for word in sorted({word for text in captions for word in normalize_caption(text).split()}):
        forms[normalize_caption(word, strip_accents=True)].append(word)
    merged = [" = ".join(words) for words in forms.values() if len(words) > 1]
    if not merged:
        return ""
    return (
        f"Without accents {len(merged)} words become the same as others: {', '.join(merged[:10])}. "
        "DATA.STRIP_ACCENTS False keeps them apart."
    )
