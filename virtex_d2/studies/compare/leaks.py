"""Test images of detectors that are among the images that a start was pretrained on."""

import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from virtex_d2.annotations.checks import check, leaks
from virtex_d2.annotations.coco import read_image_list
from virtex_d2.annotations.table import KINDS
from virtex_d2.detection.datasets import register_entries
from virtex_d2.detection.sources import read_catalog
from virtex_d2.engine.files import read_json, sha256, write_json
from virtex_d2.studies.stages import cores


def find_leaks(
    captions: Sequence[tuple[str, str]], configs: Sequence[CfgNode], record: Path
) -> list[str]:
    """Compare captioned images with the detectors' test images, by file and pixel by pixel.

    Args:
        captions: (annotation file, image folder) each.
        configs: of detectors, with DATASETS.TEST.
        record: a JSON of the result; nothing is decoded again while it is of these files.

    Returns:
        A sentence for each pair of a caption file and a test set.
    """
    seen = [read_image_list(file, images, os.path.basename(file)) for file, images in captions]
    tests = {}
    for cfg in configs:
        register_entries(cfg)
        tests |= {name: read_catalog(name) for name in cfg.DATASETS.TEST}
    key = [[file, images, sha256(file)] for file, images in captions]
    key += [[name, table.source, len(table.files)] for name, table in tests.items()]
    if record.is_file() and (found := read_json(record)).get("compared") == key:
        return found["sentences"]
    learned = [check(table, workers=cores()) for table in seen]
    sentences = []
    for name, table in tests.items():
        tested = check(table, workers=cores())
        for each in learned:
            problems = [p for p in leaks(each, tested) if KINDS[p.kind].serious]
            count = f"{len(problems)} of {len(table.files)}"
            told = f"{count} test images of {name} are among the images of {each.table.source}"
            named = ", ".join(os.path.basename(problem.image) for problem in problems[:5])
            what = "a start that learned from them has seen the test"
            sentences.append(f"{told}: {what}. The first: {named}." if problems else f"{told}.")
    write_json(record, {"compared": key, "sentences": sentences})
    return sentences
