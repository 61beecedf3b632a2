"""Which reader for which data set: three words of a command line, or a name of the catalog."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from virtex_d2.annotations.coco import read_json_file
from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.annotations.voc import read_voc_folder
from virtex_d2.engine.errors import InputError, nearest

# Type -> (annotation file or folder, image folder or split, name) -> table. The three words are
# those of an entry of VIRTEX.DATASETS.
READERS: dict[str, Callable[[str, str, str], AnnotationTable]] = {
    "coco": partial(read_json_file, "coco"),
    "lvis": partial(read_json_file, "lvis"),
    "voc": read_voc_folder,
}


def read_annotations(source: Sequence[str], name: str) -> AnnotationTable:
    """Read a data set.

    Args:
        source: ("coco" or "lvis", JSON file, image folder) or ("voc", folder, split).
        name: what to call it.
    """
    kind, annotations, images = source
    if kind not in READERS:
        raise InputError(
            f"'{kind}' is no type of data set; expected one of {', '.join(READERS)}, as in: coco "
            f"annotations.json images.{nearest(kind, READERS)}"
        )
    return READERS[kind](annotations, images, name)


def source_name(source: Sequence[str]) -> str:
    """Return what people call a data set: its file's name; in VOC the folder's and the split."""
    kind, annotations, images = source
    name = os.path.basename(os.path.normpath(annotations))
    return f"{name} {images}" if kind == "voc" else name


def read_catalog(name: str) -> AnnotationTable:
    """Read a data set that detectron2's catalog knows, from the files that its metadata names."""
    require_known(name)
    metadata: Any = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    if kind in ("coco", "lvis"):
        return READERS[kind](metadata.json_file, metadata.image_root, name)
    if kind == "pascal_voc":
        return read_voc_folder(
            metadata.dirname,
            metadata.split,
            name,
            metadata.get("thing_classes"),
            metadata.get("chosen_classes", False),
        )
    raise InputError(
        f"'{name}' has evaluator_type {kind!r}; only data sets in the formats of COCO, LVIS and "
        "VOC can be read."
    )


def require_known(name: str) -> None:
    """Raise InputError if detectron2's catalog has no data set of this name."""
    if name not in DatasetCatalog:
        known = [known for known in DatasetCatalog.list() if not known.startswith("__")]
        advice = nearest(name, known)
        if "lvis" in name.lower() and not any(version in name for version in ("v0.5", "v1")):
            advice = (
                " LVIS has two versions, with other classes: say which, as in lvis_v1_train and "
                "lvis_v1_val (1203 classes), or lvis_v0.5_train and lvis_v0.5_val (1230)."
            )
        raise InputError(
            f"DATASETS: '{name}' is not a known data set.{advice} Name data of your own with "
            "VIRTEX.DATASETS \"[['name', 'coco', 'annotations.json', 'images']]\"."
        )
