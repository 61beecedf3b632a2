"""The result of a check as a page of text."""

import math
import os
from collections.abc import Sequence
from typing import Any

from virtex_d2.annotations.checks.check import Checked, summary
from virtex_d2.annotations.checks.kinds import KINDS
from virtex_d2.annotations.table import Problem

NAMED = 5  # records of each kind that are named
_WIDTH = 100
_BARS, _COLUMNS = 24, 120  # up to so many classes: with bars; in columns
_FEW = (0, 10, 100, 1000)  # bounds of the classes' counts, where there are more
_LISTED = 12  # classes in a list of names


def page(checked: Checked, refused: bool = False) -> str:
    """Counts, class histogram, and problems with the first records of each kind.

    Args:
        checked: the data set.
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
            total = sum(map(len, shown.values()))
            lines.append(f"  {title} ({_number(total)})")
            for kind, found in shown.items():
                lines += _problem_lines(kind, found)
    if not groups and not refused:
        lines.append("  no problems")
    return "\n".join(lines)


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
    lines = ["  instances a class (images with it)"]
    if len(classes) <= _BARS:
        lines += _bars(used)
    elif len(classes) <= _COLUMNS:
        lines += _columns(used)
    else:
        lines += _columns(used[: 2 * _LISTED])
        lines.append(f"    {_bins(classes)}")
    if unused:
        more = f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else ""
        lines.append(f"    without an instance: {', '.join(unused[:_LISTED])}{more}")
    return lines


def _bars(used: Sequence[dict[str, Any]]) -> list[str]:
    longest = 45 / max((item["instances"] for item in used), default=1)
    return [
        f"    {_cut(item['name'], 20):<20}{_number(item['instances']):>9}"
        f" {'(' + _number(item['images']) + ')':>9}  {'#' * math.ceil(longest * item['instances'])}"
        for item in used
    ]


def _columns(used: Sequence[dict[str, Any]], count: int = 3) -> list[str]:
    height = -(-len(used) // count)
    lines = []
    for row in range(height):
        cells = [
            f"{_cut(item['name'], 13):<13}{_number(item['instances']):>8}"
            f" {'(' + _number(item['images']) + ')':>8}"
            for item in used[row::height]
        ]
        lines.append("    " + "  ".join(cells))
    return lines


def _bins(classes: Sequence[dict[str, Any]]) -> str:
    counts, parts = [item["instances"] for item in classes], []
    for low, high in zip((1, *_FEW[1:]), (*_FEW[1:], None)):
        inside = [count for count in counts if count >= low and (not high or count < high)]
        name = f"{low} to {high - 1}" if high else f"{_number(low)} or more"
        parts.append(f"{name}: {_number(len(inside))}")
    return f"classes by instances: {'; '.join(parts)}"


def _problem_lines(kind: str, found: Sequence[Problem]) -> list[str]:
    lines = [f"    {_number(len(found)):>7}  {KINDS[kind].title}"]
    for problem in found[:NAMED]:
        image = f" ({os.path.basename(problem.image)})" if problem.image else ""
        lines.append(f"             {problem.record}{image}: {problem.why}")
    if len(found) > NAMED:
        lines.append(f"             and {_number(len(found) - NAMED)} more")
    return lines


def _range(low: int, high: int) -> str:
    return f"{low} to {high}" if low < high else f"{low}"


def _number(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _cut(text: str, width: int) -> str:
    return text if len(text) < width else f"{text[: width - 2]}…"
