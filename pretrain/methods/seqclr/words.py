"""Sets of word images, with labels or without, in the layouts in which they are published.

What a file or folder is, its content says. A word is a `CaptionRecord` whose only caption is its
label; one without a label has no caption. docs/seqclr.md lists the layouts.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from pretrain.data.records import (
    CaptionRecord,
    JoinedRecords,
    MixedRecords,
    Path,
    Records,
    packed,
    refuse,
    take_fraction,
    text_lines,
)
from pretrain.methods.seqclr.lmdb_words import find_databases, read_lmdb
from pretrain.methods.seqclr.located_words import is_matlab, is_xml, read_matlab, read_xml
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import require_file
from virtex_d2.engine.images import image_suffix, images_in, read_image

logger = logging.getLogger(__name__)

# What lists of words end in: a folder that holds one is not read as images without labels.
_LISTS = (".txt", ".mat", ".xml", ".json", ".jsonl", ".csv", ".tsv")

# IAM (Marti and Bunke, IJDAR 2002), words.txt: id, segmentation, gray level, box, tag, word. Its
# header describes ten fields, its lines have nine.
_IAM = re.compile(
    r"(?P<id>[a-z]\d\d-\d{3}[a-z]?-\d\d-\d\d) (?:ok|er|err) (?:-?\d+ ){5}\S+ (?P<label>.+)"
)
_IAM_ID = re.compile(r"[a-z]\d\d-\d{3}[a-z]?(?:-\d\d){0,2}")
# ICDAR's task of cropped words, 2013 and later: name, "word", in which quotes are escaped.
_ICDAR = re.compile(r'(?P<image>[^,]+\.\w+), ?"(?P<label>.*)"\s*')
# MJSynth (Jaderberg et al., 2014): number, word and the word's place in the lexicon, which some of
# its lists repeat behind the path.
_MJSYNTH = re.compile(
    r"(?P<image>\S*?\d+_(?P<label>[^_/\s]+)_(?P<place>\d+)\.jpg)(?: (?P<again>\d+))?\s*"
)
# CVL (Kleber et al., ICDAR 2013): writer, text, line, word, label.
_CVL = re.compile(r"\d{4}-\d+-\d+-\d+-(?P<label>.*)\.tif", re.DOTALL)


@dataclass(frozen=True)
class WordSet:
    """One set of words.

    Attributes:
        name: the path that tells it from others.
        layout: what it was read as.
        records: the words; each has one caption, its label, or none.
    """

    name: str
    layout: str
    records: Records

    @property
    def num_labelled(self) -> int:
        return self.records.num_captions


class JoinedSets(JoinedRecords):
    """The words of several sets, one set after the other; `names` are the sets'."""

    def __init__(self, sets: Sequence[WordSet]):
        super().__init__([each.records for each in sets])
        self.names = tuple(each.name for each in sets)


# name of the image relative to its folder, label or ""
_Rows = list[tuple[str, str]]


def read_words(path: Path, other: Path = "") -> list[WordSet]:
    """Read a file or folder of words.

    Args:
        path: a list, a MATLAB or XML file, a folder with LMDBs in it, or one of images.
        other: the folder that the list's paths are relative to (default: the list's own), or a list
            of the ids to take.

    Returns:
        The set; of a folder with several LMDBs one for each.
    """
    path, other = os.fspath(path), os.fspath(other)
    if other and not os.path.exists(other):
        raise InputError(f"{other}: neither a folder of images nor a list of ids is there.")
    if not os.path.isdir(path):
        require_file(path)
        found = [_read_file(path, other)]
    elif databases := find_databases(path):
        found = [WordSet(each, "lmdb", read_lmdb(each)) for each in databases]
    else:
        found = [_read_folder(path)]
    takes_other = found[0].layout in ("list", "json lines", "icdar", "mjsynth", "iam")
    if other and not takes_other:
        raise InputError(
            f"{other}: {path} is a set of the layout {found[0].layout}, which has no images in "
            "another folder and no ids to choose from. Give the path alone."
        )
    for each in found:
        if not len(each.records):
            raise InputError(f"{each.name}: there is no word in it (read as {each.layout}).")
    return found


def _read_folder(folder: str) -> WordSet:
    """Images without labels, or CVL's, which have them in their names."""
    lists = sorted(name for name in os.listdir(folder) if name.lower().endswith(_LISTS))
    if lists:
        raise InputError(
            f"{folder}: holds the lists {', '.join(lists[:5])}. Name one of them, whose labels are "
            "then read, or a folder with nothing but images, which have none."
        )
    names = images_in(folder)
    matches = [_CVL.fullmatch(os.path.basename(name)) for name in names]
    if all(matches):
        splits = sorted({part for name in names for part in name.split("/")[:-1]})
        both = {"trainset", "testset"} <= set(splits)
        if both:
            raise InputError(f"{folder}: holds CVL's trainset and testset. Name one of the two.")
        rows = [(name, match["label"].strip()) for name, match in zip(names, matches)]
        return _set("cvl", folder, folder, rows, names)
    return _set("images", folder, folder, [(name, "") for name in names], names)


def _read_file(path: str, other: str) -> WordSet:
    if is_matlab(path):
        return WordSet(path, *read_matlab(path))
    if is_xml(path):  # which says itself how it is encoded
        return WordSet(path, *read_xml(path))
    lines = [line for _, line in text_lines(path)]
    if not lines:
        raise InputError(
            f"{path}: is empty; expected a list of words, an image and a label a line."
        )
    content = [line for line in lines if not line.startswith("#")]
    if content and _IAM.fullmatch(content[0]):
        return _read_iam(path, other)
    if other and not os.path.isdir(other):
        raise InputError(
            f"{other}: expected the folder of the images of {path}; only IAM's words.txt takes a "
            "list of ids."
        )
    root = other or os.path.dirname(path)
    if lines[0].lstrip().startswith("{"):
        return _set("json lines", path, root, _json_rows(path))
    if _ICDAR.fullmatch(lines[0]):
        return _set("icdar", path, root, _icdar_rows(path))
    if all(map(_MJSYNTH.fullmatch, lines)):
        return _set("mjsynth", path, root, _mjsynth_rows(path))
    return _set("list", path, root, _list_rows(path))


def _set(
    layout: str, path: str, root: str, rows: _Rows, ids: Sequence[str] | None = None
) -> WordSet:
    """Pack rows of images, all of which must be on the disk."""
    names = [name for name, _ in rows]
    labels = [[label.strip()] if label.strip() else [] for _, label in rows]
    return WordSet(path, layout, packed(ids or names, names, labels, path, root or "."))


# Lists


def _list_rows(path: str) -> _Rows:
    """Lines of path and label behind a tab or, where no line has a tab, the first blank."""
    lines = list(text_lines(path))
    separator = "\t" if any("\t" in line for _, line in lines) else None
    rows = []
    for _, line in lines:
        name, *label = line.strip("\n").split(separator, 1)
        rows.append((name.strip(), label[0] if label else ""))
    found = [name for name, _ in rows[:1] if not image_suffix(name)]
    if found:
        raise InputError(
            f"{path}: its first line is {lines[0][1][:80]!r}: expected the path of an image, then "
            "a tab or a blank and the label. It is in none of the layouts that are known."
        )
    return rows


def _json_rows(path: str) -> _Rows:
    rows = []
    for number, line in text_lines(path):
        try:
            entry = json.loads(line)
            name, label = entry["filename"], entry.get("text", "")
            if not (isinstance(name, str) and name and isinstance(label, str)):
                raise TypeError("one of them is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: expected JSON with the texts `filename` and `text`, found "
                f"{line[:80]!r} ({error}). Mend or remove the line."
            ) from error
        rows.append((name, label))
    return rows


def _icdar_rows(path: str) -> _Rows:
    rows = []
    for number, line in text_lines(path):
        match = _ICDAR.fullmatch(line)
        if not match:
            raise InputError(
                f'{path}, line {number}: expected word_1.png, "word" as in its first line, found '
                f"{line[:80]!r}. Mend or remove the line."
            )
        rows.append((match["image"].strip(), re.sub(r"\\(.)", r"\1", match["label"])))
    return rows


def _mjsynth_rows(path: str) -> _Rows:
    rows = []
    for number, line in text_lines(path):
        match = _MJSYNTH.fullmatch(line)
        if match["again"] and match["again"] != match["place"]:
            raise InputError(
                f"{path}, line {number}: the path says that its word is number {match['place']} of "
                f"the lexicon, the line {match['again']}: {line[:80]!r}. Is it MJSynth's own list?"
            )
        rows.append((match["image"].removeprefix("./"), match["label"]))
    return rows


# IAM


def _read_iam(path: str, split: str) -> WordSet:
    """Read words.txt; `split` lists forms, lines or words to take, by their ids."""
    if split and os.path.isdir(split):
        raise InputError(
            f"{split}: expected a list of IAM's ids; its images are found beside {path}."
        )
    rows: dict[str, str] = {}
    for number, line in text_lines(path):
        if line.startswith("#"):
            continue
        match = _IAM.fullmatch(line)
        if not match:
            raise InputError(
                f"{path}, line {number}: expected the nine fields of IAM's words.txt (id, ok or "
                f"err, gray level, x, y, w, h, tag, word), found {line[:80]!r}. Mend or remove the "
                "line."
            )
        rows[match["id"]] = match["label"]
    if split:
        rows = _iam_split(rows, path, split)
    folder = os.path.dirname(path)
    roots = [os.path.join(at, "words") for at in (folder, os.path.join(folder, ".."))]
    root = next(filter(os.path.isdir, roots), None)
    if root is None:
        raise InputError(
            f"{path}: expected IAM's images in the folder {roots[0]} or {roots[1]}, found neither."
        )
    named = []
    for word, label in rows.items():
        form, part = word.split("-")[:2]
        named.append((f"{form}/{form}-{part}/{word}.png", label))
    return _set("iam", path, root, named, list(rows))


def _iam_split(rows: dict[str, str], path: str, split: str) -> dict[str, str]:
    """The words whose id, line or form a list names; behind a comma or a blank may be more."""
    wanted = set()
    for number, line in text_lines(split):
        name = re.split(r"[,\s]", line.strip(), maxsplit=1)[0]
        if not _IAM_ID.fullmatch(name):
            raise InputError(
                f"{split}, line {number}: expected the id of one of IAM's forms, lines or words "
                f"(a01-000u-00-00), found {line[:80]!r}."
            )
        wanted.add(name)
    chosen, met = {}, set()
    for word, label in rows.items():
        parts = word.split("-")
        if named := {"-".join(parts[:count]) for count in (2, 3, 4)} & wanted:
            chosen[word] = label
            met |= named
    refuse(split, sorted(wanted - met), f"ids are not in {path}", "Are they IAM's?")
    return chosen


# Of a config


def open_words(
    cfg: CfgNode, train: bool, choose: Callable[[WordSet], WordSet] | None = None
) -> Sequence[CaptionRecord] | None:
    """What DATA.WORDS names, of that DATA.FRACTION; or all of DATA.VAL_WORDS.

    Args:
        cfg: of the run.
        train: which of both.
        choose: what becomes of each set, before fractions are taken.

    Returns:
        `JoinedSets`, or where there are weights `MixedRecords` of such;
        None where the key is empty, and other keys name the data.
    """
    entries = word_entries(cfg, train)
    if not entries:
        return None
    parts, weights = [], []
    for weight, path, other in entries:
        sets = read_words(path, other)
        if choose:
            sets = list(map(choose, sets))
        for each in sets:
            logger.info(
                "%s: %d words, %d with a label (read as %s).",
                each.name,
                len(each.records),
                each.num_labelled,
                each.layout,
            )
        if train:
            sets = [
                replace(
                    each,
                    records=take_fraction(
                        each.records, cfg.DATA.FRACTION, seed=cfg.DATA.SUBSET_SEED
                    ),
                )
                for each in sets
            ]
            if cfg.DATA.FRACTION < 1:
                taken = sum(len(each.records) for each in sets)
                logger.info("%s: of these, %d words (DATA.FRACTION).", path, taken)
        parts.append(sets)
        weights.append(weight)
    if None in weights:
        return JoinedSets([each for sets in parts for each in sets])
    return MixedRecords(list(map(JoinedSets, parts)), weights)


def word_entries(cfg: CfgNode, train: bool) -> list[tuple[float | None, str, str]]:
    """Weight (None where there are none), path and other path of DATA.WORDS or DATA.VAL_WORDS."""
    key = "DATA.WORDS" if train else "DATA.VAL_WORDS"
    given = cfg.DATA.WORDS if train else cfg.DATA.VAL_WORDS
    entries = []
    for number, entry in enumerate(given):
        parts = list(entry) if isinstance(entry, list | tuple) else [entry]
        weighted = bool(parts) and isinstance(parts[0], int | float)
        weight, paths = (parts[0], parts[1:]) if weighted else (None, parts)
        if len(paths) not in (1, 2) or not all(isinstance(p, str) and p for p in paths):
            raise InputError(
                f"{key}[{number}]: expected a path, or [path, folder of images or list of ids], "
                f"perhaps behind a weight, found {entry!r}."
            )
        entries.append((weight, *paths, *[""] * (2 - len(paths))))
    weights = [weight for weight, _, _ in entries]
    if any(w is not None for w in weights) and (None in weights or not train):
        raise InputError(
            f"{key}: weights {weights} are for all sets of DATA.WORDS, or for none of them."
        )
    captions = cfg.DATA.TRAIN_CAPTIONS or cfg.DATA.TRAIN_IMAGES or cfg.DATA.TRAIN_SOURCES
    if entries and (captions if train else cfg.DATA.VAL_CAPTIONS or cfg.DATA.VAL_IMAGES):
        raise InputError(
            f"{key} and the keys of captions and images ({'TRAIN' if train else 'VAL'}_CAPTIONS, "
            "..._IMAGES) both name data. Leave one of them empty."
        )
    return entries


def word_sets(records: Sequence[CaptionRecord]) -> Iterator[Records]:
    """The sets within what `open_words` gives."""
    if isinstance(records, Records):
        yield records
    for part in getattr(records, "parts", ()):
        yield from word_sets(part)


def word_pixels(word: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """An RGB image -> (3, H, W) uint8 of `size`, bicubic, whatever its aspect ratio."""
    height, width = size
    resized = word.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def some_pixels(
    records: Sequence[CaptionRecord], count: int, size: tuple[int, int]
) -> torch.Tensor:
    """`word_pixels` of that many words, spread over all: (N, 3, H, W) uint8.

    There may be fewer: what cannot be decoded is left out.
    """
    taken = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    pixels = []
    for number in taken.tolist():
        with contextlib.suppress(OSError):
            pixels.append(word_pixels(read_image(records[number].image_file()), size))
    if not pixels:
        raise InputError(
            f"{records[0].file_name}: cannot be decoded, and neither can any other of {len(taken)} "
            "words that were tried. Is the set whole?"
        )
    return torch.stack(pixels)
