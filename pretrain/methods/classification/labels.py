"""The classes of the objects in an image, from COCO instances files, for multi-label learning."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode

from pretrain.data.loader import Samples, Visit
from pretrain.data.records import CaptionRecord
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json

logger = logging.getLogger(__name__)


class ImageLabels:
    """Classes by record: `labels[i]` is the sorted int64 array of those that image i shows.

    Images are matched by the name of their file: most formats know no ids. One that the instances
    file does not list has no labels, as has one without objects.

    Args:
        json_path: a COCO instances file; crowds count as well.
        file_names: of the records, in their order; of each the last part is read.
    """

    def __init__(self, json_path: str | os.PathLike, file_names: Iterable[str]):
        content = read_json(json_path)
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise InputError(
                    f"{json_path}: expected a list `{key}`, found the keys {sorted(content)[:10]}. "
                    "Labels are read from COCO instances files (instances_train2017.json)."
                )
        try:
            categories = sorted((c["id"], c["name"]) for c in content["categories"])
            images = {os.path.basename(i["file_name"]): i["id"] for i in content["images"]}
            pairs = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{json_path}: a record lacks {error}. Expected `id` and `name` of categories, "
                "`id` and `file_name` of images, `image_id` and `category_id` of annotations."
            ) from error
        if len(images) != len(content["images"]):
            raise InputError(
                f"{json_path}: {len(content['images']) - len(images)} file names are given twice; "
                "labels are matched by them. Make them unique."
            )
        self.class_names = [name for _, name in categories]
        index_of = {category_id: index for index, (category_id, _) in enumerate(categories)}
        if strange := sorted({c for _, c in pairs if c not in index_of}, key=str):
            raise InputError(
                f"{json_path}: annotations have the category ids {strange[:10]}, which are not in "
                "`categories`. The file is cut short, or two files were mixed."
            )
        classes_of: dict[int | str, list[int]] = {}
        for image_id, category_id in pairs:
            classes_of.setdefault(image_id, []).append(index_of[category_id])

        names = [os.path.basename(name) for name in file_names]
        self.num_unlisted = sum(name not in images for name in names)
        if self.num_unlisted == len(names):
            raise InputError(
                f"{json_path}: it lists none of the {len(names)} images, of which the "
                f"first is {names[0] if names else '-'}; its own first is "
                f"{next(iter(images), '-')}. Images and labels must be of one data set."
            )
        rows = [sorted(classes_of.get(images.get(name), ())) for name in names]
        self.num_unlabelled = sum(not row for row in rows)
        # two arrays, not a list of lists: workers share them without copying
        self._ends = np.cumsum([0] + [len(row) for row in rows])
        self._classes = np.array([c for row in rows for c in row], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self._classes[self._ends[index] : self._ends[index + 1]]


class LabelSamples(Samples):
    """Views of images with their classes: `labels` (K,) int64, of DATA.TRAIN_LABELS' file."""

    padding = {"labels": -1}

    def __init__(
        self, cfg: CfgNode, train: Sequence[CaptionRecord] | None, val: Sequence[CaptionRecord]
    ):
        super().__init__(cfg)
        if train is None:
            raise InputError(
                f"MODEL.OBJECTIVE {cfg.MODEL.OBJECTIVE}: {cfg.DATA.TRAIN_CAPTIONS} is read from "
                "pipes, for whose images no labels are read. Download the shards."
            )
        self.train_labels = _open_labels(cfg, "TRAIN", train) if train else None
        self.val_labels = _open_labels(cfg, "VAL", val) if val else None
        if self.train_labels and self.val_labels:
            check_same_classes(self.train_labels, self.val_labels, cfg.DATA.VAL_LABELS)
        self.num_outputs = len((self.train_labels or self.val_labels).class_names)

    def train(self, visit: Visit) -> dict[str, torch.Tensor]:
        rng = visit.rng()
        rng.integers(max(1, len(visit.record.captions)))  # runs of old have drawn a caption first
        pixels, _, jitter = self.train_view(visit.image, "", rng)
        labels = torch.from_numpy(self.train_labels[visit.index])
        return {"image": pixels, "jitter": jitter, "labels": labels}

    def val(self, visit: Visit) -> list[dict[str, torch.Tensor]]:
        (view,) = super().val(visit)
        return [{**view, "labels": torch.from_numpy(self.val_labels[visit.index])}]


def _open_labels(cfg: CfgNode, split: str, records: Sequence[CaptionRecord]) -> ImageLabels:
    path = cfg.DATA[f"{split}_LABELS"]
    if not path:
        raise InputError(
            f"DATA.{split}_LABELS is empty: multilabel_classification learns the classes of a COCO "
            f"instances file of the images of DATA.{split}_CAPTIONS."
        )
    labels = ImageLabels(path, (record.file_name for record in records))
    logger.log(
        logging.WARNING if labels.num_unlisted else logging.INFO,
        "%s: %d classes; %d of %d images have no label, %d of these are not in the file. Images "
        "without a label count for nothing in the loss.",
        path,
        len(labels.class_names),
        labels.num_unlabelled,
        len(labels),
        labels.num_unlisted,
    )
    return labels


def entropy_of_labels(rows: Iterable[Iterable[int]]) -> float:
    """Loss in nats of the best classifier that answers the same for every image.

    With q the answer, the mean over labelled rows of the mean over a row's labels of -log q is
    smallest for q = the mean share of each label.
    """
    shares: Counter[int] = Counter()
    for row in rows:
        for label in row:
            shares[int(label)] += 1 / len(row)
    return entropy(shares)


def entropy(counts: Counter[int]) -> float:
    """In nats."""
    share = np.array(list(counts.values())) / sum(counts.values())
    return float(-(share * np.log(share)).sum())


def check_same_classes(train: ImageLabels, val: ImageLabels, val_path: str) -> None:
    """Raise InputError if the two files have different classes, by name and order."""
    if train.class_names != val.class_names:
        differing = set(train.class_names) ^ set(val.class_names)
        raise InputError(
            f"DATA.VAL_LABELS {val_path}: its classes differ from those of DATA.TRAIN_LABELS in "
            f"{', '.join(sorted(differing)[:10]) or 'their order'}. Use the same categories."
        )
