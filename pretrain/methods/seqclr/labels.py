"""Which words of a set a decoder can be trained on: those with a label that it can write."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from detectron2.config import CfgNode

from pretrain.data.records import Records
from pretrain.methods.seqclr.decoders import Alphabet, frames_needed
from pretrain.methods.seqclr.encoder import num_frames
from pretrain.methods.seqclr.scores import compared, with_case
from pretrain.methods.seqclr.words import WordSet
from virtex_d2.engine.errors import InputError

logger = logging.getLogger(__name__)


def labelled_words(words: WordSet, max_share: float) -> WordSet:
    """Leave out words without a label, of which a share may be (DATA.MAX_SKIPPED_SHARE)."""
    records = words.records
    lacking = np.flatnonzero(np.diff(records.firsts) == 0)
    if not len(lacking):
        return words
    first = records[int(lacking[0])].file_name
    if len(lacking) == len(records):
        raise InputError(
            f"{words.name}: none of its {len(records)} words has a label (read as {words.layout}), "
            "and a decoder learns from labels. Name the set's list of labels; without one the set "
            "is for pretraining alone (tools/pretrain_net.py)."
        )
    if len(lacking) > max_share * len(records):
        raise InputError(
            f"{words.name}: {len(lacking)} of its {len(records)} words have an empty label or "
            f"none, the first is {first}; DATA.MAX_SKIPPED_SHARE {max_share} allows "
            f"{int(max_share * len(records))}. Label or remove them."
        )
    logger.warning(
        "%s: %d of %d words have no label and are left out; the first is %s.",
        words.name,
        len(lacking),
        len(records),
        first,
    )
    return _kept(words, np.diff(records.firsts) > 0)


def fitting_words(words: WordSet, cfg: CfgNode, train: bool) -> WordSet:
    """Refuse labels with other letters than the alphabet's, or longer than can be read.

    In training DECODER.UNFIT skip leaves such words out. In validation it keeps them, as errors;
    letters that EVAL.CHARSET removes are no reason.
    """
    own, records = cfg.DECODER, words.records
    alphabet, skip = Alphabet(own.ALPHABET), own.UNFIT == "skip"
    labels = [with_case(records.captions[i], own.CASE) for i in range(len(records))]
    counted = labels if train else [with_case(compared(t, cfg), own.CASE) for t in labels]
    unknown = [alphabet.unknown(text) for text in counted]
    strange = np.array(list(map(bool, unknown)))
    if strange.any() and not skip:
        letters = "".join(sorted(set().union(*unknown)))
        all_of_them = "".join(sorted({*own.ALPHABET, *letters}))
        where = f"{_example(records, labels, strange)}; these letters are {letters!r}"
        raise InputError(
            f"{words.name}: {_share(strange)} words have letters that DECODER.ALPHABET has not: "
            f"{where}. Set DECODER.ALPHABET to {all_of_them!r} (and DECODER.CASE keep where "
            "capitals count), or DECODER.UNFIT skip."
        )
    most, needed, why = _room(cfg)
    # the blank's frames are no letters: in validation a word may be too long and be read wrong
    long = np.array([needed(text) > most for text in counted])
    if long.any() and not skip:
        raise InputError(
            f"{words.name}: {_share(long)} words are longer than can be read: "
            f"{_example(records, labels, long)}; {why}. Raise it, or set DECODER.UNFIT skip."
        )
    unfit = strange | long
    if not unfit.any():
        return words
    logger.warning(
        "%s: %s words have letters outside of the alphabet, or are longer than can be read, and %s "
        "(DECODER.UNFIT skip): %s.",
        words.name,
        _share(unfit),
        "are left out" if train else "count as they are",
        _example(records, labels, unfit),
    )
    if not train:
        return words
    if unfit.all():
        raise InputError(
            f"{words.name}: none of its words can be learnt with DECODER.ALPHABET and {why}."
        )
    return _kept(words, ~unfit)


def _room(cfg: CfgNode) -> tuple[int, Callable[[str], int], str]:
    """How much a decoder can write, what of it a text needs, and which keys say so."""
    if cfg.DECODER.NAME == "attention":
        return (
            cfg.DECODER.MAX_LENGTH,
            len,
            f"DECODER.MAX_LENGTH is {cfg.DECODER.MAX_LENGTH} letters",
        )
    width = cfg.DATA.WORD_SIZE[1]
    why = (
        f"DATA.WORD_SIZE's width of {width} gives {num_frames(width)} frames, and CTC needs one "
        "for each letter and one more between two that are alike"
    )
    return num_frames(width), frames_needed, why


def _share(chosen: np.ndarray) -> str:
    return f"{int(chosen.sum())} of {len(chosen)}"


def _example(records: Records, labels: list[str], chosen: np.ndarray) -> str:
    first = int(chosen.argmax())
    return f"the first is {labels[first]!r} of {records[first].file_name}"


def _kept(words: WordSet, kept: np.ndarray) -> WordSet:
    """`kept`: (words,) bool; each word has one label or none."""
    records = words.records
    captions = np.repeat(kept, np.diff(records.firsts))
    return replace(words, records=records.select(np.flatnonzero(kept), captions))
