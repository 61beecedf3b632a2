"""Tables of an image and a caption a row, separated by commas or tabs."""

import csv
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator

from pretrain.data.checks import near_name, refuse_absent
from pretrain.data.records import Records
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_text
from virtex_d2.engine.images import image_suffix

logger = logging.getLogger(__name__)

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

# A line's number, from 1, and its cells.
Row = tuple[int, list[str]]


def load_csv_captions(
    path: str | os.PathLike, image_root: str | os.PathLike, caption_key: str = ""
) -> Records:
    """Read rows of image path and caption, separated by commas.

    Cells that hold commas, quotes or line ends are in double quotes, a quote in them is doubled
    (RFC 4180). With a header line, the columns are found by their names and there may be others.

    Args:
        path: the table.
        image_root: the folder that image paths are relative to.
        caption_key: the caption's column; "" is the one of a known name.

    Returns:
        A record for each image, in the order of first rows; its id is its path as in the table.
    """
    advice = (
        "A caption with commas must be in double quotes, right behind the comma before it; columns "
        "parted by tabs are the format tsv."
    )
    return _records(path, comma_rows(path), advice, image_root, caption_key)


def load_tsv_captions(
    path: str | os.PathLike, image_root: str | os.PathLike, caption_key: str = ""
) -> Records:
    """As `load_csv_captions`, separated by tabs; quotes are characters like all others."""
    advice = "A caption cannot hold tabs, and columns parted by commas are the format csv."
    return _records(path, tab_rows(path), advice, image_root, caption_key)


def comma_rows(path: str | os.PathLike) -> Iterator[Row]:
    """Rows that have anything in them, by the line on which they begin."""
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


def text_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, by their numbers; only \\n and \\r\\n end one."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def tab_rows(path: str | os.PathLike) -> Iterator[Row]:
    """Cells of the lines that are not blank."""
    return ((number, line.split("\t")) for number, line in text_lines(path))


def captions_of_table(
    path: str | os.PathLike,
    rows: Iterable[Row],
    advice: str,
    image_root: str | os.PathLike,
    caption_key: str = "",
) -> dict[str, list[str]]:
    """Captions of each image, in the order of the rows; a header line names the columns."""
    image_column, caption_column, num_columns = 0, 1, 2
    captions: dict[str, list[str]] = {}
    for place, (line, cells) in enumerate(rows):
        if place == 0:
            if header := header_columns(path, cells, caption_key):
                (image_column, caption_column), num_columns = header, len(cells)
                continue
            _check_first_row(path, cells, image_root)
        if len(cells) != num_columns:
            raise InputError(
                f"{path}, line {line}: expected {num_columns} columns, found {len(cells)}: "
                f"{str(cells)[:120]}. {advice}"
            )
        add_caption(captions, path, line, cells[image_column], cells[caption_column])
    _warn_of_wrappers(path, captions)
    return captions


def header_columns(
    path: str | os.PathLike, cells: list[str], caption_key: str = ""
) -> tuple[int, int] | None:
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


def _check_first_row(
    path: str | os.PathLike, cells: list[str], image_root: str | os.PathLike
) -> None:
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


def _warn_of_wrappers(path: str | os.PathLike, captions: dict[str, list[str]]) -> None:
    """Cells are taken as they are; say where all have the same thing around them."""
    texts = [text.strip() for each in captions.values() for text in each]
    for what, cells in (("caption", texts), ("image path", list(captions))):
        for kind, matches in _WRAPPERS.items():
            if len(cells) > 1 and all(map(matches, cells)):
                logger.warning("%s: each %s is %s. It is read as it is.", path, what, kind)


def add_caption(
    captions: dict[str, list[str]], path: str | os.PathLike, line: int, image: str, caption: str
) -> None:
    """Raise InputError if the image or the caption is blank."""
    blank = "image path" if not image.strip() else "caption" if not caption.strip() else None
    if blank:
        raise InputError(
            f"{path}, line {line}: the {blank} is blank in {[image, caption]}. Remove the row or "
            "fill it in."
        )
    captions.setdefault(image.strip(), []).append(caption)


def _records(
    path: str | os.PathLike,
    rows: Iterable[Row],
    advice: str,
    image_root: str | os.PathLike,
    caption_key: str,
) -> Records:
    captions = captions_of_table(path, rows, advice, image_root, caption_key)
    if not captions:
        raise InputError(f"{path}: it lists no images: expected rows of image path and caption.")
    names = list(captions)
    refuse_absent(names, path, image_root)
    return Records.of_files(names, names, list(captions.values()), image_root)
