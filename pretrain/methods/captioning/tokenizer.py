"""SentencePiece BPE as VirTex uses it: train, encode, decode."""

import hashlib
import io
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator

import sentencepiece

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path

SPECIAL_PIECES = ("<unk>", "[SOS]", "[EOS]", "[MASK]")

# Behind a model where captions kept their accents: a ModelProto with normalizer_spec (3) and name
# (1), which is merged in and which SentencePiece does not read. No piece can be so long.
_ACCENTS_KEPT = b"NFC, lower case, accents kept"
_ACCENTS_MARK = bytes([0x1A, len(_ACCENTS_KEPT) + 2, 0x0A, len(_ACCENTS_KEPT)]) + _ACCENTS_KEPT
_LONGEST_PART = 1000  # characters, of 4 bytes at most: SentencePiece passes over what has > 4192


def normalize_caption(caption: str, strip_accents: bool = False) -> str:
    """NFC, lower case, single spaces; `strip_accents` is NFKD without combining marks (VirTex,
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
