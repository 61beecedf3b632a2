"""Look at sets of words before a decoder is trained on them."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.pool import ThreadPool

import numpy as np

from pretrain.data.records import CaptionRecord
from pretrain.methods.seqclr.decoders import frames_needed
from pretrain.methods.seqclr.encoder import num_frames
from pretrain.methods.seqclr.words import WordSet, read_words
from virtex_d2.engine.images import read_image

_NAMED = 5  # examples of a finding


@dataclass
class _Checked:
    """A set, and what was found in it."""

    words: WordSet
    labels: list[str]
    unlabelled: list[str] = field(default_factory=list)  # files
    too_long: list[str] = field(default_factory=list)  # label and file
    broken: list[str] = field(default_factory=list)  # file and reason
    images: dict[str, str] = field(default_factory=dict)  # hash of the pixels -> file

    @property
    def sound(self) -> bool:
        partly = self.labels and self.unlabelled
        return not (partly or self.too_long or self.broken)


def check_sets(
    train: Sequence[Sequence[str]], val: Sequence[Sequence[str]], width: int, workers: int
) -> tuple[list[str], bool]:
    """Check sets of words, training sets against evaluation sets, too.

    Args:
        train, val: [path] or [path, other] each, as of `read_words`.
        width: DATA.WORD_SIZE's, pixels.
        workers: threads that decode images; 0 decodes none.

    Returns:
        Lines to print, and whether nothing is wrong: words without label in a set that has labels,
        labels that CTC has too few frames for, broken images, images of training in an evaluation
        set. Words of training in an evaluation set, which all benchmarks have, are counted alone.
    """
    checked = [
        [_check(words, width, workers) for given in entries for words in read_words(*given)]
        for entries in (train, val)
    ]
    lines = [line for each in (*checked[0], *checked[1]) for line in (*_page(each, width), "")]
    sound = all(each.sound for part in checked for each in part)
    for first, second in product(*checked):
        told, shared = _leaks(first, second)
        lines += told
        sound = sound and not shared
    return lines, sound


def _check(words: WordSet, width: int, workers: int) -> _Checked:
    found = _Checked(words, [])
    for record in words.records:
        if not record.captions:
            found.unlabelled.append(record.file_name)
            continue
        (label,) = record.captions
        found.labels.append(label)
        if frames_needed(label) > num_frames(width):
            found.too_long.append(f"{label!r} of {record.file_name}")
    if workers:
        with ThreadPool(workers) as pool:
            for record, digest, reason in pool.imap(_decode, words.records, chunksize=32):
                if reason:
                    found.broken.append(f"{record.file_name}: {reason}")
                else:
                    found.images[digest] = record.file_name
    return found


def _decode(record: CaptionRecord) -> tuple[CaptionRecord, str, str]:
    try:
        pixels = np.asarray(read_image(record.image_file()))
    except OSError as error:
        return record, "", str(error)
    return record, hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest(), ""


def _page(found: _Checked, width: int) -> Iterator[str]:
    words, labels = found.words, found.labels
    count = len(words.records)
    yield f"{words.name} (read as {words.layout}): {count} words, {len(labels)} with a label"
    if labels:
        letters = Counter("".join(labels))
        yield f"  DECODER.ALPHABET {''.join(sorted(letters))!r}"
        rare = [f"{letter!r} {n}" for letter, n in sorted(letters.items()) if n < _NAMED]
        if rare:
            yield f"  letters that come fewer than {_NAMED} times: {', '.join(rare)}"
        lengths = sorted(map(len, labels))
        yield (
            f"  lengths: {lengths[0]} to {lengths[-1]} letters, median {lengths[len(lengths) // 2]}"
        )
        yield f"  {len(set(labels))} different labels"
        if found.unlabelled:
            yield _told("without a label", found.unlabelled)
    frames = num_frames(width)
    if found.too_long:
        yield _told(f"need more than the {frames} frames of {width} pixels", found.too_long)
    if found.broken:
        yield _told("cannot be decoded", found.broken)
    repeated = count - len(found.broken) - len(found.images)
    if found.images and repeated:
        yield f"  {repeated} images are there more than once, pixel by pixel"


def _told(what: str, which: Sequence[str]) -> str:
    more = f", and {len(which) - _NAMED} more" if len(which) > _NAMED else ""
    return f"  PROBLEM: {len(which)} {what}: {', '.join(which[:_NAMED])}{more}"


def _leaks(train: _Checked, val: _Checked) -> tuple[list[str], int]:
    """Lines about two sets, and how many images they share."""
    lines = []
    if train.labels and val.labels:
        known = set(train.labels)
        share = sum(label in known for label in val.labels)
        lines.append(
            f"{val.words.name}: {share} of {len(val.labels)} labels occur in {train.words.name}"
        )
        if strange := {*"".join(val.labels)} - {*"".join(train.labels)}:
            lines.append(f"  letters that {train.words.name} lacks: {''.join(sorted(strange))!r}")
    shared = [val.images[digest] for digest in val.images if digest in train.images]
    if shared:
        lines.append(_told(f"images are those of {train.words.name}", shared))
    return lines, len(shared)
