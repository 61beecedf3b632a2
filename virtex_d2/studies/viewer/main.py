"""tools/visualize_results.py: predictions read or made, matched, drawn."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.detection.datasets import register_entries
from virtex_d2.detection.sources import (
    read_annotations,
    read_catalog,
    source_name,
)
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.viewer.gallery import not_drawn, require_empty, write_gallery
from virtex_d2.studies.viewer.instances import Instance
from virtex_d2.studies.viewer.predict import predict
from virtex_d2.studies.viewer.results import collect, read_results
from virtex_d2.studies.viewer.select import arrange, class_ids, judge, masks_everywhere


@dataclass(frozen=True)
class Options:
    """What is shown, and how.

    Attributes:
        output: folder to write.
        score_threshold: predictions below it are left out.
        num_images: how many are drawn.
        sort: which come first, of `select.ORDERS` or "random".
        classes: names of the classes to look at; none: all.
        iou: from which a prediction is right.
        by: "bbox", "segm", or "auto": masks where all have one.
        sample: judge so many images only, drawn with `seed`; 0: all.
        seed: of the sample and of the random order.
    """

    output: str
    score_threshold: float = 0.5
    num_images: int = 24
    sort: str = "errors"
    classes: Sequence[str] = ()
    iou: float = 0.5
    by: str = "auto"
    sample: int = 0
    seed: int = 0


def read_truth(words: Sequence[str]) -> AnnotationTable:
    """The data set that three words of the command line name."""
    table = read_annotations(words, source_name(words))
    if table.kind == "voc" and tuple(table.categories.values()) != tuple(CLASS_NAMES):
        raise InputError(
            f"{table.source}: its classes are not VOC's twenty, and predictions hold their numbers "
            "alone. Name the data set with --config-file, whose VIRTEX.DATASETS lists the classes."
        )
    return table


def truth_of_config(cfg: CfgNode, name: str) -> AnnotationTable:
    """The data set `name` of a config; "": the first of DATASETS.TEST."""
    register_entries(cfg)
    if not name and not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty; name the data set with --dataset.")
    return read_catalog(name or cfg.DATASETS.TEST[0])


def run(
    table: AnnotationTable,
    files: Sequence[str],
    options: Options,
    cfg: CfgNode | None = None,
    weights: str = "",
) -> Path:
    """Write pictures and a page; prints what came out.

    Args:
        table: the truth.
        files: results files, "file" or "name=file".
        options: what is shown.
        cfg, weights: of a detector that predicts here, in place of files.

    Returns:
        The page.
    """
    _check(options)
    wanted = class_ids(table, options.classes)
    count = len(table.image_ids)
    images = None
    if 0 < options.sample < count:
        images = set(random.Random(options.seed).sample(range(count), options.sample))
    sources: dict[str, str] = {}
    predictions: dict[str, list[list[Instance]]] = {}
    if weights:
        only = None if images is None else {table.image_ids[index] for index in images}
        records = predict(cfg, table.name, weights, only)
        sources["predictions"] = weights
        predictions["predictions"] = collect(records, table, options.score_threshold, weights)
    for entry in files:
        name, path = _named(entry, sources)
        sources[name] = path
        predictions[name] = read_results(path, table, options.score_threshold)
    by = options.by
    if by == "auto":
        by = "segm" if masks_everywhere(table, predictions) else "bbox"
    every = judge(table, predictions, threshold=options.iou, by=by, classes=wanted, images=images)
    if not every:
        raise InputError("no image has an object or a prediction of these classes.")
    ordered = arrange(every, options.sort, options.seed)
    overlap = "masks" if by == "segm" else "boxes"
    facts = {
        "truth": table.source,
        **sources,
        "right": f"the class, and an IoU of {overlap} of at least {options.iou:g}, as in COCO",
        "score": f"at least {options.score_threshold:g}",
        "order": options.sort,
        **({"classes": ", ".join(options.classes)} if options.classes else {}),
    }
    page, left_out = write_gallery(options.output, table, every, ordered, options.num_images, facts)
    for name in predictions:
        right, wrong, missed = (
            sum(image.matches[name].count(verdict) for image in every)
            for verdict in ("right", "wrong", "missed")
        )
        print(
            f"{name}: {right} right, {wrong} wrong, {missed} missed on {len(every)} images "
            f"(score >= {options.score_threshold:g}, IoU of {overlap} >= {options.iou:g})"
        )
        if empty := sum(not image.matches[name].predictions for image in every):
            print(
                f"{name}: no prediction on {empty} of {len(every)} images, at that score; see "
                "--score-threshold."
            )
    for line in not_drawn(left_out):
        print(line)
    print(f"{min(options.num_images, len(every) - len(left_out))} images: {page}")
    return page


def _check(options: Options) -> None:
    for name in ("score_threshold", "iou"):
        value = getattr(options, name)
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a number from 0 to 1.")
    if options.num_images < 1:
        raise InputError(f"--num-images {options.num_images}: expected at least 1.")
    if options.sample < 0:
        raise InputError(f"--sample {options.sample}: expected at least 0.")
    arrange([], options.sort)
    require_empty(options.output)


def _named(entry: str, taken: dict[str, str]) -> tuple[str, str]:
    name, separator, path = entry.partition("=")
    if not separator:
        name, path = ("predictions" if not taken else f"predictions {len(taken) + 1}"), entry
    if not name or name in taken:
        raise InputError(f"--predictions {entry}: the name '{name}' is empty or there twice.")
    return name, path
