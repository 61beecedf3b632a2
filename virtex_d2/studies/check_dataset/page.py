"""The result of a check as a page of text, and as a file for programs."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from virtex_d2.annotations.checks import Checked
from virtex_d2.annotations.masks import mask_kinds
from virtex_d2.annotations.table import KINDS, AnnotationTable
from virtex_d2.engine.errors import InputError, some
from virtex_d2.engine.files import atomic_path

NAMED = 5  # records of each kind that are named
_BARS, _COLUMNS = 24, 120  # up to so many classes: with bars; in columns
_FEW = (0, 10, 100, 1000)  # bounds of the classes' counts, where there are more
_LISTED = 12  # classes in a list of names


def page(checked: Checked, refused: bool = False) -> str:
    """Counts, class histogram, and problems with the first records of each kind.

    Args:
        refused: whether training would not start, for a reason that is told elsewhere.
    """
    facts = summary(checked)
    lines = [f"{facts['name']}: {facts['type'].upper()}, {facts['source']}", ""]
    lines += _counts(facts)
    lines += ["", *_histogram(facts["classes"]), ""]
    groups = checked.by_kind()
    for title, serious in (("problems", True), ("notes", False)):
        shown = {kind: found for kind, found in groups.items() if KINDS[kind].serious == serious}
        if shown:
            lines.append(f"  {title} ({_number(sum(map(len, shown.values())))})")
        for kind, found in shown.items():
            lines.append(f"    {_number(len(found)):>7}  {KINDS[kind].title}")
            lines += [f"             {problem}" for problem in found[:NAMED]]
            if len(found) > NAMED:
                lines.append(f"             and {_number(len(found) - NAMED)} more")
    if not groups and not refused:
        lines.append("  no problems")
    return "\n".join(lines)


def summary(checked: Checked) -> dict[str, Any]:
    """Count what the page and the JSON output tell, as plain values."""
    table = checked.table
    masks = Counter(mask_kinds(table).tolist())
    sizes = table.sizes[~np.isnan(table.sizes).any(axis=1)]
    kept = (table.boxes[:, 2:] > 0).all(axis=1) & ~table.crowd
    areas = table.boxes[kept, 2:].prod(axis=1)
    small, large = 32**2, 96**2  # pixels; COCO's bounds of small, medium and large
    return {
        "name": table.name,
        "type": table.kind,
        "source": table.source,
        "images": len(table.image_ids),
        "images_without_objects": sum(not len(rows) for rows in table.objects_by_image()),
        "images_decoded": len(checked.decoded),
        "smallest_sides": sizes.min(axis=0).astype(int).tolist() if len(sizes) else [],
        "largest_sides": sizes.max(axis=0).astype(int).tolist() if len(sizes) else [],
        "objects": len(table.records),
        "crowd": int(table.crowd.sum()),
        "difficult": int(table.difficult.sum()),
        "objects_by_size": {
            "small": int((areas < small).sum()),
            "medium": int(((areas >= small) & (areas < large)).sum()),
            "large": int((areas >= large).sum()),
        },
        "masks": {kind: masks[kind] for kind in ("polygons", "run-length", "none", "other")},
        "classes": _classes(table),
        "problems": {kind: len(found) for kind, found in checked.by_kind().items()},
    }


def write_listing(path: str | os.PathLike, datasets: Sequence[Checked]) -> None:
    """Write all problems: as JSON with the counts of each data set, or as CSV, a problem a line."""
    try:
        with (
            atomic_path(path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as f,
        ):
            if os.fspath(path).endswith(".json"):
                content = [{**summary(each), "records": _rows(each)} for each in datasets]
                json.dump({"datasets": content}, f, indent=1, ensure_ascii=False)
            else:
                fields = ("dataset", "kind", "serious", "record", "image", "why")
                writer = csv.DictWriter(f, fields)
                writer.writeheader()
                for each in datasets:
                    writer.writerows(_rows(each))
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written: {error.strerror}.") from error


def _classes(table: AnnotationTable) -> list[dict[str, Any]]:
    known = (table.category_of >= 0) & (table.image_of >= 0)
    instances = np.bincount(table.category_of[known], minlength=len(table.categories))
    pairs = np.unique(np.stack([table.category_of[known], table.image_of[known]]), axis=1)
    images = np.bincount(pairs[0], minlength=len(table.categories))
    return [
        {"id": key, "name": name, "instances": int(count), "images": int(image_count)}
        for (key, name), count, image_count in zip(table.categories.items(), instances, images)
    ]


def _rows(checked: Checked) -> list[dict[str, Any]]:
    name = checked.table.name
    return [
        {"dataset": name, "serious": KINDS[problem.kind].serious, **asdict(problem)}
        for problem in checked.problems
    ]


def _counts(facts: dict[str, Any]) -> list[str]:
    images, objects, masks = facts["images"], facts["objects"], facts["masks"]
    rows = [("images", images, f"{_number(facts['images_without_objects'])} without objects")]
    if facts["smallest_sides"]:
        (width, height), (most_width, most_height) = facts["smallest_sides"], facts["largest_sides"]
        sides = f"{_range(width, most_width)} px wide, {_range(height, most_height)} px high"
        rows.append(("", None, sides))
    decoded = facts["images_decoded"]
    rows.append(("", None, f"{_number(decoded)} decoded" if decoded else "none decoded"))
    rows.append(
        (
            "objects",
            objects,
            f"{_number(facts['crowd'])} crowd, {_number(facts['difficult'])} difficult",
        )
    )
    sizes = facts["objects_by_size"]
    if total := sum(sizes.values()):
        shares = ", ".join(f"{100 * count / total:.0f} % {name}" for name, count in sizes.items())
        rows.append(("", None, f"{shares} (boxes below 32², 96² px, above)"))
    told = [f"{_number(count)} {kind}" for kind, count in masks.items() if count]
    rows.append(("", None, f"masks: {', '.join(told) or 'none'}"))
    unused = sum(not item["instances"] for item in facts["classes"])
    rows.append(("classes", len(facts["classes"]), f"{_number(unused)} without an instance"))
    return [
        f"  {name:<9}{_number(count) if count is not None else '':>11}   {rest}"
        for name, count, rest in rows
    ]


def _histogram(classes: Sequence[dict[str, Any]]) -> list[str]:
    ranked = sorted(classes, key=lambda item: -item["instances"])
    used = [item for item in ranked if item["instances"]]
    unused = [item["name"] for item in ranked if not item["instances"]]
    with_bars = len(classes) <= _BARS
    shown = used if len(classes) <= _COLUMNS else used[: 2 * _LISTED]
    width = 20 if with_bars else 13
    cells = [
        f"{_cut(item['name'], width):<{width}}{_number(item['instances']):>8}"
        f" {'(' + _number(item['images']) + ')':>8}"
        for item in shown
    ]
    if with_bars:
        longest = 45 / max((item["instances"] for item in used), default=1)
        bars = ["#" * math.ceil(longest * item["instances"]) for item in used]
        rows = [[f"{cell}  {bar}"] for cell, bar in zip(cells, bars)]
    else:
        height = -(-len(cells) // 3)
        rows = [cells[row::height] for row in range(height)]
    lines = ["  instances a class (images with it)"]
    lines += ["    " + "  ".join(row) for row in rows]
    if len(classes) > _COLUMNS:
        lines.append(f"    {_bins(classes)}")
    if unused:
        lines.append(f"    without an instance: {some(unused, _LISTED)}")
    return lines


def _bins(classes: Sequence[dict[str, Any]]) -> str:
    counts, parts = [item["instances"] for item in classes], []
    for low, high in zip((1, *_FEW[1:]), (*_FEW[1:], None)):
        inside = [count for count in counts if count >= low and (not high or count < high)]
        name = f"{low} to {high - 1}" if high else f"{_number(low)} or more"
        parts.append(f"{name}: {_number(len(inside))}")
    return f"classes by instances: {'; '.join(parts)}"


def _range(low: int, high: int) -> str:
    return f"{low} to {high}" if low < high else f"{low}"


def _number(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _cut(text: str, width: int) -> str:
    return text if len(text) < width else f"{text[: width - 2]}…"
