"""Flickr8k's and Flickr30k's caption files, told apart by what is in them."""

import os
import re
from collections.abc import Iterator

from pretrain.data.checks import refuse, refuse_absent
from pretrain.data.records import Records
from pretrain.data.tables import (
    Row,
    add_caption,
    captions_of_table,
    comma_rows,
    header_columns,
    text_lines,
)
from virtex_d2.engine.errors import InputError

# Flickr8k.token.txt and results_20130124.token: image, "#", the caption's number, tab, caption.
_TOKEN_LINE = re.compile(r"(?P<image>[^\t#]+)#\d+\t(?P<caption>.*)", re.DOTALL)
# Flickr30k's results.csv: image, number and caption between bars. The published file lacks the
# second bar in one line.
_BAR_LINE = re.compile(r"(?P<image>[^|]+)\|\s*\d+\s*(?:\||\s)(?P<caption>.*)", re.DOTALL)
_BAR_HEADER = re.compile(r"image_name\s*\|")


def load_flickr_captions(
    path: str | os.PathLike,
    image_root: str | os.PathLike,
    split: str = "",
    caption_key: str = "",
) -> Records:
    """Read captions.txt, Flickr8k.token.txt, results_20130124.token or results.csv.

    Args:
        path: the caption file.
        image_root: the folder of all images.
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
        advice = "Expected image,caption."
        captions = captions_of_table(path, rows, advice, image_root, caption_key)
    if not captions:
        raise InputError(f"{path}: it lists no images. Is it a caption file of Flickr8k or 30k?")
    if split:
        captions = _images_of_split(captions, path, split)
    names = list(captions)
    refuse_absent(names, path, image_root)
    return Records.of_files(names, names, list(captions.values()), image_root)


def _captions_by_line(
    path: str | os.PathLike, layout: re.Pattern, expected: str
) -> dict[str, list[str]]:
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
        add_caption(captions, path, number, match["image"], match["caption"].strip())
    return captions


def _with_unquoted_commas(path: str | os.PathLike, caption_key: str) -> Iterator[Row]:
    """Rows of captions.txt, which does not quote every caption that has commas: what is more than
    its header's columns belongs to a caption that is the last of them.
    """
    last = 1
    for place, (line, cells) in enumerate(comma_rows(path)):
        header = header_columns(path, cells, caption_key) if place == 0 else None
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
    captions: dict[str, list[str]], path: str | os.PathLike, split: str
) -> dict[str, list[str]]:
    wanted = {line.strip() for _, line in text_lines(split)}
    if not wanted:
        raise InputError(f"{split}: expected names of images, one a line, found none.")
    chosen = {}
    found = set()
    for image, texts in captions.items():
        names = {image, os.path.splitext(image)[0]} & wanted
        if names:
            chosen[image] = texts
            found |= names
    refuse(
        split,
        sorted(wanted - found),
        f"of its {len(wanted)} images have no caption in {path}",
        "Remove them from the split, or name the split's own caption file.",
    )
    return chosen
