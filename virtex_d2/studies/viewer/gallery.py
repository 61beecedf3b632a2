"""A folder of pictures, predictions beside the truth, and one HTML page that holds them all."""

import base64
import io
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.page import definitions, write_page
from virtex_d2.studies.viewer.drawing import COLORS, draw_instances
from virtex_d2.studies.viewer.instances import read_pixels
from virtex_d2.studies.viewer.panels import LEGEND, grid, with_legend
from virtex_d2.studies.viewer.select import Judged, count_classes

PAGE = "index.html"
_ROW = 1040  # pixels of a row's panels, longer sides together
_NAMED = 10  # images that could not be drawn
_CSS = """
main { max-width: 1120px; padding-top: 40px; }
.muted { overflow-wrap: anywhere; }
.legend { max-width: none; }
.legend span { white-space: nowrap; margin-right: 22px; font-size: 14px; }
.legend i { display: inline-block; width: 26px; height: 0; margin: 0 7px 4px 0; }
summary { cursor: pointer; margin: 12px 0; }
figure { margin: 30px 0 0; padding-top: 14px; border-top: 1px solid var(--rule); }
figure img { max-width: 100%; width: auto; }
figcaption { margin: 0 0 6px; }
"""


def picture(table: AnnotationTable, judged: Judged) -> Image.Image:
    """One image: its objects in the colours of their classes, then for each detector what is right,
    wrong and missed.
    """
    image = read_pixels(table.files[judged.index])
    width, height = (int(value) for value in table.sizes[judged.index])
    if image.shape[:2] != (height, width):
        raise InputError(
            f"{table.files[judged.index]}: it is {image.shape[1]}x{image.shape[0]}, recorded as "
            f"{width}x{height}: boxes would be in the wrong place. tools/check_dataset.py names "
            "all such images."
        )
    names, count = table.categories, len(judged.truth)
    columns = 3 if len(judged.matches) % 3 == 2 else 2  # so that no row has a single one
    side = _ROW // columns
    title = f"truth: {count} object{'s' if count != 1 else ''}"
    panels = [(title, draw_instances(image, judged.truth, names, side=side))]
    for name, result in judged.matches.items():
        missed = [item for item in result.truth if item.verdict == "missed"]
        shown = [*result.predictions, *missed]
        drawn = draw_instances(image, shown, names, side=side, boxes=not _masked(shown))
        panels.append((f"{name}: {_told(result.count)}", drawn))
    return grid(panels, columns)


def write_gallery(
    output: str | os.PathLike,
    table: AnnotationTable,
    every: Sequence[Judged],
    shown: Iterable[Judged],
    count: int,
    facts: Mapping[str, str],
) -> tuple[Path, list[str]]:
    """Write pictures/*.png of images, and a page that needs no other file.

    Images that cannot be drawn are left out, and named on the page.

    Args:
        output: a folder that is not there, or empty.
        table: the data set.
        every: all images that were judged; the page counts them.
        shown: those to draw, in their order.
        count: how many of them.
        facts: about how it was made, for the page.

    Returns:
        The page, and for each image that was left out why.
    """
    output = Path(output)
    require_empty(output)
    temporary = output.with_name(f".tmp-{output.name}-{uuid.uuid4().hex[:12]}")
    try:
        (temporary / "pictures").mkdir(parents=True)
        figures: list[str] = []
        left_out: list[str] = []
        for judged in shown:
            try:
                drawn = picture(table, judged)
            except InputError as error:
                left_out.append(str(error))
                continue
            stem = Path(table.files[judged.index]).stem
            with_legend(drawn).save(temporary / "pictures" / f"{len(figures) + 1:03d}_{stem}.png")
            figures.append(_figure(table, judged, drawn))
            if len(figures) == count:
                break
        if not figures:
            raise InputError(
                f"none of {len(left_out)} images can be drawn; the first: {left_out[0]}"
            )
        title = f"Predictions on {table.name}"
        body = _body(title, table, every, figures, left_out, facts)
        write_page(temporary / PAGE, title, body, _CSS)
        os.replace(temporary, output)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output / PAGE, left_out


def not_drawn(reasons: Sequence[str]) -> list[str]:
    """A line for each of the first images that could not be drawn, and one for the others."""
    lines = [f"not drawn: {why}" for why in reasons[:_NAMED]]
    if len(reasons) > _NAMED:
        lines.append(f"not drawn: {len(reasons) - _NAMED} more images")
    return lines


def require_empty(output: str | os.PathLike) -> None:
    """Raise InputError if the path is a file, or a folder that holds something."""
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise InputError(f"--output {output}: it is there already. Choose another, or remove it.")


def _masked(items: Sequence) -> bool:
    return any(item.segmentation for item in items)


def _told(count) -> str:
    told = [f"{count(verdict)} {verdict}" for verdict in ("right", "wrong", "missed")]
    return ", ".join(told)


def _figure(table: AnnotationTable, judged: Judged, drawn: Image.Image) -> str:
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=88, subsampling=0)  # a photograph: a tenth of a PNG
    data = base64.b64encode(file.getvalue()).decode("ascii")
    name = os.path.basename(table.files[judged.index])
    counts = "; ".join(f"{key}: {_told(each.count)}" for key, each in judged.matches.items())
    words = f"image {table.image_ids[judged.index]}, {name}. {counts}"
    return (
        f'<figure><figcaption>{escape(words)}</figcaption><img alt="{escape(words)}" '
        f'width="{drawn.width}" height="{drawn.height}" src="data:image/jpeg;base64,{data}">'
        "</figure>"
    )


def _body(
    title: str,
    table: AnnotationTable,
    every: Sequence[Judged],
    figures: Sequence[str],
    left_out: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    names = list(every[0].matches) if every else []
    return "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="muted">{len(figures)} of {len(every)} images shown.</p>',
            definitions(facts),
            *(f'<p class="muted">{escape(line)}</p>' for line in not_drawn(left_out)),
            f'<p class="legend">{_legend()}</p>',
            *(_tables(table, every, name) for name in names),
            *figures,
        ]
    )


def _legend() -> str:
    return " ".join(
        f'<span><i style="border-top:3px {style} {COLORS[verdict]}"></i>{escape(words)}</span>'
        for verdict, words in LEGEND.items()
        for style in ["solid" if verdict in ("right", "wrong") else "dashed"]
    )


def _tables(table: AnnotationTable, every: Sequence[Judged], name: str) -> str:
    counts = count_classes(every, name)
    total = sum(counts.values(), Counter())
    head = (
        '<tr><th></th><th class="n">objects</th><th class="n">found</th><th class="n">missed</th>'
        '<th class="n">wrong</th></tr>'
    )
    ranked = sorted(counts.items(), key=lambda pair: -(pair[1]["missed"] + pair[1]["wrong"]))
    rows = "".join(_row(_class_name(table, key), count) for key, count in ranked)
    return (
        f"<table>{head}{_row(f'{name}, all images', total)}</table>"
        f"<details><summary>{escape(name)}: by class</summary><table>{head}{rows}</table></details>"
    )


def _class_name(table: AnnotationTable, key: Hashable) -> str:
    return str(table.categories.get(key, f"category {key}"))


def _row(name: str, count: Counter) -> str:
    numbers = (count["found"] + count["missed"], count["found"], count["missed"], count["wrong"])
    cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"
