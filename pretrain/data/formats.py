"""Annotations in any of `FORMATS` -> packed records of images and their captions.

A reader refuses a file whole, and names what is wrong with it; shards from the web alone
(`pretrain.data.shards`) may lack some of their samples.
"""

import csv
import io
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pretrain.data.records import (
    Path,
    Records,
    captions_in_text,
    near_name,
    packed,
    refuse,
    require_folder,
    text_lines,
)
from pretrain.data.shards import load_shards
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import read_json, read_text
from virtex_d2.engine.images import files_in, image_suffix, images_in

logger = logging.getLogger(__name__)

# A line's number, from 1, and its cells.
Row = tuple[int, list[str]]

# Names of columns, in lower case, by which a first row is known as a header.
IMAGE_COLUMNS = (
    *("image", "image_path", "image_name", "image_file", "img", "file", "file_name", "filename"),
    *("filepath", "path", "name"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "comment", "description")

# What all cells may be alike, and not be meant to.
_WRAPPERS = {
    "in quotes": re.compile(
        "([\"']).*\\1|[\u201c\u2018\u00ab].*[\u201d\u2019\u00bb]", re.S
    ).fullmatch,
    "in brackets": re.compile(r"\[.*\]|\(.*\)|\{.*\}|<.*>", re.S).fullmatch,
    "a number": str.isdigit,
    "behind ./": re.compile(r"\./").match,
}

# Flickr8k.token.txt and results_20130124.token: image, "#", the caption's number, tab, caption.
_TOKEN_LINE = re.compile(r"(?P<image>[^\t#]+)#\d+\t(?P<caption>.*)", re.DOTALL)
# Flickr30k's results.csv: image, number and caption between bars. The published file lacks the
# second bar in one line.
_BAR_LINE = re.compile(r"(?P<image>[^|]+)\|\s*\d+\s*(?:\||\s)(?P<caption>.*)", re.DOTALL)
_BAR_HEADER = re.compile(r"image_name\s*\|")

# What an image of Karpathy's splits is known by: the first that is given.
_KARPATHY_IDS = ("cocoid", "imgid", "filename")


@dataclass(frozen=True)
class Source:
    """Where captions and images are."""

    format: str  # a name in `FORMATS`
    captions: str  # the annotation file; for "folder" the folder of texts, for "webdataset" shards
    images: str = ""  # the folder that the annotations' image paths are relative to
    split: str = ""  # which part, in the formats of `SPLIT_FORMATS`
    index_dir: str = "."  # where an index of shards is kept
    max_skipped_share: float = 0.01  # the fraction of shards' samples that may be unusable
    # where captions are, in the formats of `KEYED_FORMATS`; "" is where they usually are
    caption_key: str = ""

    @property
    def name(self) -> str:
        """The path that tells it from others in messages."""
        return self.captions or self.images


IMAGES_ALONE = "images"  # a folder of images, of which nothing is said


def load_records(source: Source, key: str = "DATA.FORMAT") -> Records:
    """Read a source's annotations; `key` is the config key that names the format, for messages."""
    if source.format not in FORMATS:
        raise InputError(
            f"{key}: {source.format!r} is not one of {', '.join(FORMATS)}."
            + nearest(str(source.format), FORMATS)
        )
    if source.split and source.format not in SPLIT_FORMATS:
        raise InputError(
            f"{source.captions}: the split {source.split!r} was asked for, but the format "
            f"{source.format} has no splits, only {' and '.join(SPLIT_FORMATS)} have. Leave "
            "DATA.TRAIN_SPLIT or DATA.VAL_SPLIT empty."
        )
    if source.caption_key and source.format not in KEYED_FORMATS:
        raise InputError(
            f"{source.captions}: the key {source.caption_key!r} was asked for, but of the format "
            f"{source.format} no other is read. Those with keys are {', '.join(KEYED_FORMATS)}."
        )
    return FORMATS[source.format](source)


# COCO and Karpathy's splits: JSON


def load_coco_captions(path: Path, image_root: Path) -> Records:
    """Read a COCO captions file: `images` (id, file_name) and `annotations` (image_id, caption).

    Returns:
        Records in the order of `images`, captions in the order of `annotations`.
    """
    content = _read_annotations(path, "coco")
    images = _list_of(content, "images", path)
    annotations = _list_of(content, "annotations", path)
    refuse(
        path,
        _elements("images", images, _is_coco_image),
        "images lack an `id` (a number or text) or a `file_name` (text)",
        "Remove them or fill them in.",
    )
    refuse(
        path,
        [] if _all_captions(annotations) else _elements("annotations", annotations, _is_caption),
        "annotations lack a text in `caption` or an `image_id`",
        "Remove them or fill them in.",
    )
    names: dict[int | str, str] = {}
    repeated = []
    for image_id, name in ((as_id(image["id"]), image["file_name"]) for image in images):
        if image_id in names:
            repeated.append(f"{image_id} of {names[image_id]} and {name}")
        names[image_id] = name
    refuse(path, repeated, "image ids are given twice", "Give each image an id of its own.")

    captions: dict[int | str, list[str]] = defaultdict(list)
    for image_id, caption in map(itemgetter("image_id", "caption"), annotations):
        captions[image_id].append(caption)
    unknown = [image_id for image_id in captions if image_id not in names]
    refuse(
        path,
        map(json.dumps, unknown),
        "image ids of `annotations` are not in `images`",
        of_another_type(unknown, names) or "The file is cut short, or two files were mixed.",
    )
    refuse(
        path,
        [f"{name} (id {image_id})" for image_id, name in names.items() if image_id not in captions],
        "images have no caption",
        "Remove them from `images`.",
    )
    if not names:
        raise InputError(f"{path}: it lists no images.")
    files = list(names.values())
    return packed(list(names), files, [captions[image_id] for image_id in names], path, image_root)


def load_karpathy_captions(path: Path, image_root: Path, split: str) -> Records:
    """Read a file as dataset_coco.json (Karpathy and Fei-Fei, CVPR 2015).

    Args:
        image_root: the folder that `filepath`/`filename` is relative to.
        split: names of splits joined by "+", for example "train+restval".

    Returns:
        Records of the splits in the file's order. The id is `cocoid`, else `imgid`, else the name.
    """
    images = _list_of(_read_annotations(path, "karpathy"), "images", path)
    refuse(
        path,
        _elements("images", images, _is_karpathy_image),
        "images lack a `filename`, a `split` or a text in each `sentences[].raw`",
        "Remove them or fill them in. Is it a file of Karpathy's splits?",
    )
    found = Counter(image["split"] for image in images)
    wanted = split.split("+")
    if absent := [name for name in wanted if name not in found]:
        listed = ", ".join(f"{name} ({count} images)" for name, count in found.items())
        raise InputError(
            f"{path}: the split {absent[0]!r} has no images; the file has {listed or 'none'}. "
            "Name one of these as DATA.TRAIN_SPLIT or DATA.VAL_SPLIT, or several joined by '+'."
        )
    images = [image for image in images if image["split"] in wanted]
    ids = [
        next(i for i in map(as_id, map(image.get, _KARPATHY_IDS)) if i is not None)
        for image in images
    ]
    refuse(
        path,
        [str(image_id) for image_id, count in Counter(ids).items() if count > 1],
        "image ids are given twice",
        "Give each image an id (`cocoid`, else `imgid`) of its own.",
    )
    names = [os.path.join(image.get("filepath") or "", image["filename"]) for image in images]
    captions = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
    return packed(ids, names, captions, path, image_root)


def as_id(value: Any) -> int | str | None:
    """Read an id as JSON can write it, 96.0 for 96; None where it is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def of_another_type(unknown: Iterable[int | str], known: Iterable[int | str]) -> str:
    """Say what to do where ids are known but for their type; "" where they are not."""
    texts = {str(image_id): image_id for image_id in known}
    for image_id in unknown:
        if (other := texts.get(str(image_id).strip())) is not None:
            return (
                f"{json.dumps(image_id)} is not {json.dumps(other)}: one is a text, or has blanks. "
                "Write ids alike in both places."
            )
    return ""


def _read_annotations(path: Path, source_format: str) -> dict:
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(
            f"{error} It is read as DATA.FORMAT {source_format}; for tables that is csv or tsv."
        ) from error


def _list_of(content: dict, name: str, path: Path) -> list:
    if not isinstance(content.get(name), list):
        raise InputError(
            f"{path}: expected a list `{name}`, found the keys {sorted(content)[:10]}. Is it a "
            "captions file?"
        )
    return content[name]


def _elements(name: str, elements: list, is_right: Callable[[dict], bool]) -> list[str]:
    """Place and content of the elements that are wrong."""
    return [
        f"{name}[{index}] = {json.dumps(element)[:120]}"
        for index, element in enumerate(elements)
        if not (isinstance(element, dict) and is_right(element))
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not value.isspace()


def _is_coco_image(image: dict) -> bool:
    name = image.get("file_name")
    return as_id(image.get("id")) is not None and isinstance(name, str) and name != ""


def _is_caption(annotation: dict) -> bool:
    return as_id(annotation.get("image_id")) is not None and _is_text(annotation.get("caption"))


def _all_captions(annotations: list) -> bool:
    """Whether `_is_caption` holds for all: in a tenth of the time that asking each takes."""
    try:
        ids = set(map(type, map(itemgetter("image_id"), annotations)))
        return ids <= {int, str} and all(map(str.strip, map(itemgetter("caption"), annotations)))
    except (KeyError, TypeError):
        return False


def _is_karpathy_image(image: dict) -> bool:
    return (
        _is_text(image.get("filename"))
        and isinstance(image.get("filepath"), str | None)
        and _is_text(image.get("split"))
        and all(as_id(image[k]) is not None for k in _KARPATHY_IDS if image.get(k) is not None)
        and isinstance(image.get("sentences"), list)
        and len(image["sentences"]) > 0
        and all(isinstance(s, dict) and _is_text(s.get("raw")) for s in image["sentences"])
    )


# Tables: an image and a caption a row


def load_csv_captions(path: Path, image_root: Path, caption_key: str = "") -> Records:
    """Read rows of image path and caption, separated by commas.

    Cells that hold commas, quotes or line ends are in double quotes, a quote in them is doubled
    (RFC 4180). With a header line, the columns are found by their names and there may be others.

    Args:
        image_root: the folder that image paths are relative to.
        caption_key: the caption's column; "" is the one of a known name.

    Returns:
        A record for each image, in the order of first rows; its id is its path as in the table.
    """
    advice = (
        "A caption with commas must be in double quotes, right behind the comma before it; columns "
        "parted by tabs are the format tsv."
    )
    captions = _captions_of_table(path, _comma_rows(path), advice, image_root, caption_key)
    return _table_records(captions, path, image_root)


def load_tsv_captions(path: Path, image_root: Path, caption_key: str = "") -> Records:
    """Read as `load_csv_captions`, separated by tabs; quotes are characters like all others."""
    advice = "A caption cannot hold tabs, and columns parted by commas are the format csv."
    rows = ((number, line.split("\t")) for number, line in text_lines(path))
    captions = _captions_of_table(path, rows, advice, image_root, caption_key)
    return _table_records(captions, path, image_root)


def load_flickr_captions(
    path: Path, image_root: Path, split: str = "", caption_key: str = ""
) -> Records:
    """Read captions.txt, Flickr8k.token.txt, results_20130124.token or results.csv.

    Args:
        split: a text file that names the images to take, one a line, with or without suffix (such
            as Flickr_8k.trainImages.txt); "" takes all.
        caption_key: the caption's column, where commas part them; "" is one of a known name.

    Returns:
        A record for each image, in the order of the caption file; its id is its name.
    """
    first = next(text_lines(path), (0, ""))[1]
    if _BAR_HEADER.match(first) or _BAR_LINE.fullmatch(first):
        captions = _captions_by_line(path, _BAR_LINE, "image| number| caption")
    elif _TOKEN_LINE.fullmatch(first):
        captions = _captions_by_line(path, _TOKEN_LINE, "image#number<TAB>caption")
    else:
        rows = _with_unquoted_commas(path, caption_key)
        captions = _captions_of_table(
            path, rows, "Expected image,caption.", image_root, caption_key
        )
    if captions and split:
        captions = _images_of_split(captions, path, split)
    return _table_records(captions, path, image_root)


def _table_records(captions: dict[str, list[str]], path: Path, image_root: Path) -> Records:
    if not captions:
        raise InputError(f"{path}: it lists no images: expected rows of image path and caption.")
    names = list(captions)
    return packed(names, names, list(captions.values()), path, image_root)


def _comma_rows(path: Path) -> Iterator[Row]:
    """Yield (line number, cells) of the rows that are not empty."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {line}: the row that begins here is not CSV: {error}. A cell in double "
            "quotes ends with one, and a quote in it is doubled."
        ) from error


def _captions_of_table(
    path: Path, rows: Iterable[Row], advice: str, image_root: Path, caption_key: str
) -> dict[str, list[str]]:
    """Captions of each image, in the order of the rows; a header line names the columns."""
    image_column, caption_column, num_columns = 0, 1, 2
    captions: dict[str, list[str]] = {}
    for place, (line, cells) in enumerate(rows):
        if place == 0:
            if header := _header_columns(path, cells, caption_key):
                (image_column, caption_column), num_columns = header, len(cells)
                continue
            _check_first_row(path, cells, image_root)
        if len(cells) != num_columns:
            raise InputError(
                f"{path}, line {line}: expected {num_columns} columns, found {len(cells)}: "
                f"{str(cells)[:120]}. {advice}"
            )
        _add_caption(captions, path, line, cells[image_column], cells[caption_column])
    _warn_of_wrappers(path, captions)
    return captions


def _header_columns(path: Path, cells: list[str], caption_key: str) -> tuple[int, int] | None:
    """The columns of image and caption, where the row is a header."""
    names = [cell.strip().lower() for cell in cells]
    images = [names.index(name) for name in IMAGE_COLUMNS if name in names]
    known = (caption_key.strip().lower(),) if caption_key else CAPTION_COLUMNS
    captions = [column for column, name in enumerate(names) if name in known]
    if caption_key and not captions:
        raise InputError(
            f"{path}: no column is called {caption_key!r} (DATA.CAPTION_KEY), only {cells}."
        )
    if images and len(captions) > 1:
        raise InputError(
            f"{path}: each of its columns {', '.join(cells[c] for c in captions)} can be the "
            "caption. Name the one to read as DATA.CAPTION_KEY, or rename the others."
        )
    return (images[0], captions[0]) if images and captions else None


def _check_first_row(path: Path, cells: list[str], image_root: Path) -> None:
    """Say what a first row is that is neither a known header nor an image with its caption."""
    found = f"{path}: its first row is {str(cells)[:120]}"
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(cells) == 1 and separator in cells[0]:
            raise InputError(
                f"{found}: the columns are parted by {name}. Part them by commas (csv) or tabs "
                "(tsv), as DATA.FORMAT says."
            )
    if os.path.exists(os.path.join(image_root, cells[0].strip())):
        return
    if len(cells) == 2 and "://" in cells[1] and not image_suffix(cells[0]):
        raise InputError(
            f"{found}: captions before addresses are Conceptual Captions' layout. Download the "
            "images (img2dataset writes shards for DATA.FORMAT webdataset), and give rows of image "
            "path and caption."
        )
    names = {cell.strip().lower() for cell in cells}
    unlike = not image_suffix(cells[0]) and not near_name(cells[0].strip(), image_root)
    if names & {*IMAGE_COLUMNS, *CAPTION_COLUMNS} or (len(cells) > 1 and unlike):
        raise InputError(
            f"{found}: if that is a header, it is not understood; if not, {cells[0]!r} is not in "
            f"{image_root}. A header names the image's column ({', '.join(IMAGE_COLUMNS)}) and the "
            f"caption's ({', '.join(CAPTION_COLUMNS)}, or what DATA.CAPTION_KEY says)."
        )


def _warn_of_wrappers(path: Path, captions: dict[str, list[str]]) -> None:
    """Say where all cells, which are taken as they are, have the same thing around them."""
    texts = [text.strip() for each in captions.values() for text in each]
    for what, cells in (("caption", texts), ("image path", list(captions))):
        for kind, matches in _WRAPPERS.items():
            if len(cells) > 1 and all(map(matches, cells)):
                logger.warning("%s: each %s is %s. It is read as it is.", path, what, kind)


def _add_caption(
    captions: dict[str, list[str]], path: Path, line: int, image: str, caption: str
) -> None:
    blank = "image path" if not image.strip() else "caption" if not caption.strip() else None
    if blank:
        raise InputError(
            f"{path}, line {line}: the {blank} is blank in {[image, caption]}. Remove the row or "
            "fill it in."
        )
    captions.setdefault(image.strip(), []).append(caption)


def _captions_by_line(path: Path, layout: re.Pattern, expected: str) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for place, (number, line) in enumerate(text_lines(path)):
        if place == 0 and _BAR_HEADER.match(line):
            continue
        match = layout.fullmatch(line)
        if not match:
            raise InputError(
                f"{path}, line {number}: expected '{expected}', found {line[:120]!r}. Mend or "
                "remove the line."
            )
        _add_caption(captions, path, number, match["image"], match["caption"].strip())
    return captions


def _with_unquoted_commas(path: Path, caption_key: str) -> Iterator[Row]:
    """Yield the rows of captions.txt, which does not quote every caption that has commas: what is
    more than its header's columns belongs to a caption that is the last of them."""
    last = 1
    for place, (line, cells) in enumerate(_comma_rows(path)):
        header = _header_columns(path, cells, caption_key) if place == 0 else None
        if header:
            last = len(cells) - 1 if header[1] == len(cells) - 1 else len(cells)
        elif last == 1 and len(cells) > 2 and cells[1].strip().isdigit():
            raise InputError(
                f"{path}, line {line}: expected image,caption, found three columns with a number "
                f"as the second: {str(cells)[:120]}. Write a header line that names the columns, "
                "such as image,number,caption."
            )
        yield line, cells[:last] + ([",".join(cells[last:])] if cells[last:] else [])


def _images_of_split(
    captions: dict[str, list[str]], path: Path, split: Path
) -> dict[str, list[str]]:
    wanted = {line.strip() for _, line in text_lines(split)}
    if not wanted:
        raise InputError(f"{split}: expected names of images, one a line, found none.")
    chosen = {}
    found = set()
    for image, texts in captions.items():
        if names := {image, os.path.splitext(image)[0]} & wanted:
            chosen[image] = texts
            found |= names
    refuse(
        split,
        sorted(wanted - found),
        f"of its {len(wanted)} images have no caption in {path}",
        "Remove them from the split, or name the split's own caption file.",
    )
    return chosen


# A folder: name.jpg and name.txt


def load_folder_captions(captions_root: Path, image_root: Path = "") -> Records:
    """Read name.jpg and name.txt, in the folder and the folders in it.

    Args:
        captions_root: the folder of the text files, a caption a line; blank lines count for none.
        image_root: the folder of the images; "" is the same.

    Returns:
        Records by name; the id is the image's path within the folder.
    """
    image_root = image_root or captions_root
    require_folder(captions_root, "name.txt for each name.jpg")
    require_folder(image_root, "the images")
    images: dict[str, str] = {}
    repeated = []
    for name in images_in(str(image_root), beside=("txt",)):
        stem = os.path.splitext(name)[0]
        if stem in images:
            repeated.append(f"{images[stem]} and {name}")
        images[stem] = name
    refuse(
        image_root, repeated, "images share a name", "Give each a name, and so a text, of its own."
    )
    found = (os.path.splitext(name) for name in files_in(str(captions_root)))
    texts = {stem: stem + suffix for stem, suffix in found if suffix.lower() == ".txt"}
    refuse(
        image_root,
        [name for stem, name in images.items() if stem not in texts],
        f"images have no text (name.txt in {captions_root})",
        "Write one for each or remove the images.",
    )
    refuse(
        captions_root,
        [name for stem, name in texts.items() if stem not in images],
        f"texts have no image in {image_root}",
        "Add the images or remove the texts.",
    )
    captions = [
        captions_in_text(read_text(os.path.join(captions_root, texts[stem]))) for stem in images
    ]
    refuse(
        captions_root,
        [texts[stem] for stem, lines in zip(images, captions) if not lines],
        "texts have no caption",
        "Write one a line, or remove text and image.",
    )
    return Records.of_files(list(images.values()), list(images.values()), captions, image_root)


def load_images(root: Path) -> Records:
    """Read all images of a folder and the folders in it; none has a caption."""
    require_folder(root, "the images")
    names = images_in(str(root))
    return Records.of_files(names, names, [()] * len(names), root)


# A reader for each format.
FORMATS: dict[str, Callable[[Source], Records]] = {
    "coco": lambda s: load_coco_captions(s.captions, s.images),
    "karpathy": lambda s: load_karpathy_captions(s.captions, s.images, s.split),
    "flickr": lambda s: load_flickr_captions(s.captions, s.images, s.split, s.caption_key),
    "csv": lambda s: load_csv_captions(s.captions, s.images, s.caption_key),
    "tsv": lambda s: load_tsv_captions(s.captions, s.images, s.caption_key),
    "folder": lambda s: load_folder_captions(s.captions, s.images),
    "webdataset": lambda s: load_shards(
        s.captions, s.index_dir, s.max_skipped_share, s.caption_key
    ),
    IMAGES_ALONE: lambda s: load_images(s.images),
}
# Those whose annotations hold several splits.
SPLIT_FORMATS = ("karpathy", "flickr")
# Those in which the caption's column or key can be named.
KEYED_FORMATS = ("flickr", "csv", "tsv", "webdataset")
