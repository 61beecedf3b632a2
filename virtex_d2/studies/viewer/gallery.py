"""A folder of pictures, predictions beside the truth, and one HTML page that holds them all."""

import argparse
import base64
import io
import os
import random
import shutil
import uuid
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from jinja2 import Environment
from PIL import Image

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.detection.sources import read_annotations, source_name
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.studies.page import write_page
from virtex_d2.studies.viewer import drawing, matching
from virtex_d2.studies.viewer.results import collect, predict, read_results

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
_BODY = """
{%- macro counts(rows) -%}
<table><tr><th></th>
{%- for name in ("objects", "found", "missed", "wrong") %}<th class="n">{{ name }}</th>{% endfor -%}
</tr>
{%- for name, count in rows %}
<tr><td>{{ name }}</td><td class="n">{{ count.found + count.missed }}</td>
<td class="n">{{ count.found }}</td><td class="n">{{ count.missed }}</td>
<td class="n">{{ count.wrong }}</td></tr>
{%- endfor %}
</table>
{%- endmacro -%}

<h1>{{ title }}</h1>
<p class="muted">{{ figures|length }} of {{ judged }} images shown.</p>
<dl>{% for name, text in facts.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
{% for line in not_drawn %}<p class="muted">{{ line }}</p>{% endfor %}
<p class="legend">
{% for verdict, words in legend.items() %}
<span><i style="border-top:3px {{ "dashed" if verdict in dashed else "solid" }}
 {{ colors[verdict] }}"></i>{{ words }}</span>
{% endfor %}
</p>
{% for name, total, classes in tables %}
{{ counts([(name ~ ", all images", total)]) }}
<details><summary>{{ name }}: by class</summary>{{ counts(classes) }}</details>
{% endfor %}
{% for words, image, pixels in figures %}
<figure><figcaption>{{ words }}</figcaption><img alt="{{ words }}" width="{{ image.width }}"
 height="{{ image.height }}" src="data:image/jpeg;base64,{{ pixels }}"></figure>
{% endfor %}
"""


def read_truth(words: Sequence[str]) -> AnnotationTable:
    """Read the data set that three words of the command line name."""
    table = read_annotations(words, source_name(words))
    if table.kind == "voc" and tuple(table.categories.values()) != tuple(CLASS_NAMES):
        raise InputError(
            f"{table.source}: its classes are not VOC's twenty, and predictions hold their numbers "
            "alone. Name the data set with --config-file, whose VIRTEX.DATASETS lists the classes."
        )
    return table


def show(table: AnnotationTable, args: argparse.Namespace, cfg: CfgNode | None = None) -> Path:
    """Write pictures and a page, and print what came out.

    Args:
        cfg: of the detector that predicts where --weights is given.

    Returns:
        The page.
    """
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: it is there already. Choose another, or remove it.")
    classes = _class_ids(table, args.classes)
    images = range(len(table.image_ids))
    if 0 < args.sample < len(images):
        images = sorted(random.Random(args.seed).sample(images, args.sample))
    sources, predictions = _predictions(table, args, cfg, images)
    by = args.by
    if by == "auto":
        by = "segm" if matching.masks_everywhere(table, predictions) else "bbox"
    how = {"threshold": args.iou, "by": by, "classes": classes, "images": images}
    every = matching.judge(table, predictions, **how)
    if not every:
        raise InputError("no image has an object or a prediction of these classes.")
    overlap = "masks" if by == "segm" else "boxes"
    facts = {
        "truth": table.source,
        **sources,
        "right": f"the class, and an IoU of {overlap} of at least {args.iou:g}, as in COCO",
        "score": f"at least {args.score_threshold:g}",
        "order": args.sort,
        **({"classes": ", ".join(args.classes)} if args.classes else {}),
    }
    shown = matching.arrange(every, args.sort, args.seed)
    left_out = _write_gallery(output, table, every, shown, args.num_images, facts)
    for name in predictions:
        results = [image.matches[name] for image in every]
        print(
            f"{name}: {_told(results)} on {len(every)} images (score >= {args.score_threshold:g}, "
            f"IoU of {overlap} >= {args.iou:g})"
        )
        if empty := sum(not result.predictions for result in results):
            print(
                f"{name}: no prediction on {empty} of {len(every)} images, at that score; see "
                "--score-threshold."
            )
    for line in _not_drawn(left_out):
        print(line)
    page = output / PAGE
    print(f"{min(args.num_images, len(every) - len(left_out))} images: {page}")
    return page


def picture(table: AnnotationTable, judged: matching.Judged) -> Image.Image:
    """Draw one image: its objects in the colours of their classes, then for each detector what is
    right, wrong and missed.
    """
    image = drawing.read_pixels(table.files[judged.index])
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
    panels = [(title, drawing.draw_instances(image, judged.truth, names, side=side))]
    for name, result in judged.matches.items():
        missed = [item for item in result.truth if item.verdict == "missed"]
        items = [*result.predictions, *missed]
        boxes = not any(item.segmentation for item in items)
        drawn = drawing.draw_instances(image, items, names, side=side, boxes=boxes)
        panels.append((f"{name}: {_told([result])}", drawn))
    return drawing.grid(panels, columns)


def _predictions(
    table: AnnotationTable, args: argparse.Namespace, cfg: CfgNode | None, images: Sequence[int]
) -> tuple[dict[str, str], dict[str, list[list[matching.Instance]]]]:
    """The file of each detector, and its predictions for each image."""
    if args.weights:
        only = {table.image_ids[index] for index in images}
        records = predict(cfg, table.name, args.weights, only)
        found = collect(records, table, args.score_threshold, args.weights)
        return {"predictions": args.weights}, {"predictions": found}
    sources: dict[str, str] = {}
    for entry in args.predictions:
        name, separator, path = entry.partition("=")
        if not separator:
            name = f"predictions {len(sources) + 1}" if sources else "predictions"
            path = entry
        if not name or name in sources:
            raise InputError(f"--predictions {entry}: the name '{name}' is empty or there twice.")
        sources[name] = path
    return sources, {
        name: read_results(path, table, args.score_threshold) for name, path in sources.items()
    }


def _class_ids(table: AnnotationTable, names: Sequence[str]) -> set[Hashable] | None:
    """Category ids of class names; None for no name at all."""
    ids = {name: key for key, name in table.categories.items()}
    for name in names:
        if name not in ids:
            raise InputError(
                f"--classes {name}: {table.source} has no such class.{nearest(name, ids)}"
            )
    return {ids[name] for name in names} or None


def _write_gallery(
    output: Path,
    table: AnnotationTable,
    every: Sequence[matching.Judged],
    shown: Iterable[matching.Judged],
    count: int,
    facts: Mapping[str, str],
) -> list[str]:
    """Write pictures/*.png of the first `count` images, and a page that needs no other file; the
    page counts every image that was judged.

    Images that cannot be drawn are left out, and named on the page.

    Returns:
        For each image that was left out why.
    """
    temporary = output.with_name(f".tmp-{output.name}-{uuid.uuid4().hex[:12]}")
    try:
        (temporary / "pictures").mkdir(parents=True)
        figures: list[tuple[str, Image.Image, str]] = []
        left_out: list[str] = []
        for judged in shown:
            try:
                drawn = picture(table, judged)
            except InputError as error:
                left_out.append(str(error))
                continue
            stem = Path(table.files[judged.index]).stem
            name = f"{len(figures) + 1:03d}_{stem}.png"
            drawing.with_legend(drawn).save(temporary / "pictures" / name)
            counts = "; ".join(f"{name}: {_told([r])}" for name, r in judged.matches.items())
            name = os.path.basename(table.files[judged.index])
            words = f"image {table.image_ids[judged.index]}, {name}. {counts}"
            figures.append((words, drawn, _jpeg(drawn)))
            if len(figures) == count:
                break
        if not figures:
            raise InputError(
                f"none of {len(left_out)} images can be drawn; the first: {left_out[0]}"
            )
        title = f"Predictions on {table.name}"
        body = Environment(autoescape=True, trim_blocks=True).from_string(_BODY)
        values = {"facts": facts, "figures": figures, "judged": len(every), "title": title}
        values |= {"not_drawn": _not_drawn(left_out), "tables": _tables(table, every)}
        style = {"colors": drawing.COLORS, "dashed": drawing.DASHED, "legend": drawing.LEGEND}
        write_page(temporary / PAGE, title, body.render(values, **style), _CSS)
        os.replace(temporary, output)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return left_out


def _tables(
    table: AnnotationTable, every: Sequence[matching.Judged]
) -> list[tuple[str, Counter, list[tuple[str, Counter]]]]:
    """For each detector its name, the counts of all images, and of each class, worst first."""
    tables = []
    for name in every[0].matches:
        counts = matching.count_classes(every, name)
        ranked = sorted(counts.items(), key=lambda pair: -(pair[1]["missed"] + pair[1]["wrong"]))
        classes = [(str(table.categories.get(key, f"category {key}")), c) for key, c in ranked]
        tables.append((name, sum(counts.values(), Counter()), classes))
    return tables


def _not_drawn(reasons: Sequence[str]) -> list[str]:
    """A line for each of the first images that could not be drawn, and one for the others."""
    lines = [f"not drawn: {why}" for why in reasons[:_NAMED]]
    if len(reasons) > _NAMED:
        lines.append(f"not drawn: {len(reasons) - _NAMED} more images")
    return lines


def _told(results: Sequence[matching.Match]) -> str:
    counts = {name: sum(r.count(name) for r in results) for name in ("right", "wrong", "missed")}
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _jpeg(image: Image.Image) -> str:
    """A photograph's bytes for the page: a tenth of a PNG's."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, subsampling=0)
    return base64.b64encode(file.getvalue()).decode("ascii")
