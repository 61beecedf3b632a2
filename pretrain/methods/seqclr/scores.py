"""How well words are read: accuracy, at most one edit, character error rate, edit distance."""

from collections.abc import Iterable
from dataclasses import dataclass

from detectron2.config import CfgNode
from rapidfuzz.distance import Levenshtein

from virtex_d2.engine.errors import InputError, nearest


def add_score_config(cfg: CfgNode) -> None:
    """Add the group EVAL: what is compared, of a label and of what is read."""
    cfg.EVAL = type(cfg)()
    # "lower", or "keep".
    cfg.EVAL.CASE = "lower"
    # Letters that count; all others are removed from both. Empty: all count.
    cfg.EVAL.CHARSET = "0123456789abcdefghijklmnopqrstuvwxyz"


def check_scores(cfg: CfgNode) -> None:
    """Refuse values of EVAL that cannot be."""
    case, known = cfg.EVAL.CASE, ("lower", "keep")
    if case not in known:
        raise InputError(f"EVAL.CASE: {case!r} is not one of lower, keep." + nearest(case, known))
    if case == "lower" and cfg.EVAL.CHARSET != cfg.EVAL.CHARSET.lower():
        raise InputError(
            f"EVAL.CHARSET {cfg.EVAL.CHARSET!r} has capital letters, and EVAL.CASE lower leaves "
            "none. Set EVAL.CASE keep, or leave them out."
        )


def with_case(text: str, case: str) -> str:
    """The text in lower case, or as it is."""
    return text.lower() if case == "lower" else text


def compared(text: str, cfg: CfgNode) -> str:
    """What of a text counts, by EVAL."""
    text, charset = with_case(text, cfg.EVAL.CASE), cfg.EVAL.CHARSET
    return "".join(letter for letter in text if letter in charset) if charset else text


@dataclass(frozen=True)
class WordScores:
    """Scores of a set of words.

    Attributes:
        words: how many.
        word_accuracy: the share that is read right.
        ed1: the share with at most one edit (insertion, deletion, substitution).
        cer: edits over the letters of all labels; NaN where there are none.
        one_minus_ned: mean of 1 - edits over the letters of the longer text, as at ICDAR 2019; 0
            where either is empty.
    """

    words: int
    word_accuracy: float
    ed1: float
    cer: float
    one_minus_ned: float


def score_words(pairs: Iterable[tuple[str, str]]) -> WordScores:
    """Score (label, what is read), of which all counts; at least one."""
    right = near = edits = letters = words = 0
    similarity = 0.0
    for truth, read in pairs:
        distance = Levenshtein.distance(truth, read)
        words += 1
        right += distance == 0
        near += distance <= 1
        edits += distance
        letters += len(truth)
        longer = max(len(truth), len(read))
        similarity += 1 - distance / longer if longer else 0.0
    cer = edits / letters if letters else float("nan")
    return WordScores(words, right / words, near / words, cer, similarity / words)
