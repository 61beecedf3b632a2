"""Tables of an image and a caption a row, separated by commas or tabs."""

import csv
import io
import os
from collections.abc import Iterable, Iterator

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_text

from .checks import refuse_absent
from .records import Records

# Names of columns, in lower case, by which a first row is known as a header.
IMAGE_COLUMNS = (
    *("image", "image_path", "image_name", "image_file", "img", "file", "file_name", "filename"),
    *("filepath", "path", "name"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "comment", "description")

# A line's number, from 1, and its cells.
Row = tuple[int, list[str]]


def load_csv_captions(path: str | os.PathLike, image_root: str | os.PathLike) -> Records:
    """Read rows of image path and caption, separated by commas.

    Cells that hold commas, quotes or line ends are in double quotes, a quote in them is doubled
    (RFC 4180). With a header line, the columns are found by their names and there may be others.

    Args:
        path: the table.
        image_root: the folder that image paths are relative to.

    Returns:
        A record for each image, in the order of first rows; its id is its path as in the table.

    Raises:
        InputError: the file or a row cannot be used, or an image is not on the disk; the message
            has the line.
    """
    advice = (
        "A caption with commas must be in double quotes; columns parted by tabs are the format tsv."
    )
    return _records(path, image_root, captions_of_table(path, comma_rows(path), advice))


def load_tsv_captions(path: str | os.PathLike, image_root: str | os.PathLike) -> Records:
    """As `load_csv_captions`, separated by tabs; quotes are characters like all others."""
    advice = "A caption cannot hold tabs, and columns parted by commas are the format csv."
    return _records(path, image_root, captions_of_table(path, tab_rows(path), advice))


def comma_rows(path: str | os.PathLike) -> Iterator[Row]:
    """Rows that have anything in them, by the line on which they begin.

    Raises:
        InputError: the quotes are damaged.
    """
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
    path: str | os.PathLike, rows: Iterable[Row], advice: str
) -> dict[str, list[str]]:
    """Captions of each image, in the order of the rows; a header line names the columns.

    Raises:
        InputError: a row has too few or too many cells (which `advice` explains), or a blank one.
    """
    image_column, caption_column, num_columns = 0, 1, 2
    captions: dict[str, list[str]] = {}
    for place, (line, cells) in enumerate(rows):
        if place == 0 and (header := header_columns(cells)):
            (image_column, caption_column), num_columns = header, len(cells)
            continue
        if len(cells) != num_columns:
            raise InputError(
                f"{path}, line {line}: expected {num_columns} columns, found {len(cells)}: "
                f"{str(cells)[:120]}. {advice}"
            )
        add_caption(captions, path, line, cells[image_column], cells[caption_column])
    return captions


def header_columns(cells: list[str]) -> tuple[int, int] | None:
    """The columns of image and caption, where the row is a header."""
    names = [cell.strip().lower() for cell in cells]
    images = [names.index(name) for name in IMAGE_COLUMNS if name in names]
    captions = [names.index(name) for name in CAPTION_COLUMNS if name in names]
    return (images[0], captions[0]) if images and captions else None


def add_caption(
    captions: dict[str, list[str]], path: str | os.PathLike, line: int, image: str, caption: str
) -> None:
    """Raises:
    InputError: the image or the caption is blank.
    """
    blank = "image path" if not image.strip() else "caption" if not caption.strip() else None
    if blank:
        raise InputError(
            f"{path}, line {line}: the {blank} is blank in {[image, caption]}. Remove the row or "
            "fill it in."
        )
    captions.setdefault(image.strip(), []).append(caption)


def _records(
    path: str | os.PathLike, image_root: str | os.PathLike, captions: dict[str, list[str]]
) -> Records:
    if not captions:
        raise InputError(f"{path}: it lists no images: expected rows of image path and caption.")
    names = list(captions)
    refuse_absent(names, path, image_root)
    return Records.of_files(names, names, list(captions.values()), image_root)
