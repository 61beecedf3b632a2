"""Labelled images (VOC, detection sets, folders, iNaturalist's JSON), and their crops as pixels."""

import logging
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tvf

from virtex_d2.annotations.table import AnnotationTable
from virtex_d2.annotations.usable import Use, require_usable
from virtex_d2.annotations.voc import split_ids, split_list
from virtex_d2.detection.datasets import check_fraction, register_entries, take_fraction
from virtex_d2.detection.sources import read_catalog
from virtex_d2.engine.errors import InputError, nearest
from virtex_d2.engine.files import read_json, read_text
from virtex_d2.engine.images import IMAGE_SUFFIXES, images_in, read_image
from virtex_d2.engine.workers import batches_of, start_worker

logger = logging.getLogger(__name__)

_NAMED = 10  # records that an error names
_VOC_FOLDERS = ("Annotations", "ImageSets/Main", "JPEGImages")
_JSON_KEYS = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}
# How many images in a row may fail to decode before the data is given up.
MAX_REPLACEMENTS = 100


@dataclass(frozen=True)
class LabelledImages:
    """Images of a split, and of which classes they are.

    Attributes:
        files: paths.
        labels: (N,) int64, indices into `classes`. Of VOC and detection sets (N, C) int8, as in
            VOC's own ImageSets/Main/<class>_<split>.txt: 1 the class is there; 0 all of its objects
            are difficult or crowds, or nobody has looked for it; -1 it is not there.
        classes: the C names.
        source: the folder or file, for messages.
    """

    files: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str


def load_datasets(cfg: CfgNode) -> tuple[LabelledImages, LabelledImages]:
    """Read the training and the test set that DATA names, of the same classes."""
    if cfg.DATA.FORMAT == "detection":
        return _load_detection(cfg)
    _require_folder(cfg.DATA.ROOT, "DATA.ROOT")
    if cfg.DATA.FORMAT == "voc":
        return _load_voc(cfg)
    read = {"folders": _read_folders, "inaturalist": _read_inaturalist}[cfg.DATA.FORMAT]
    train, test = (read(cfg.DATA.ROOT, split) for split in (cfg.DATA.TRAIN, cfg.DATA.TEST))
    if train.source == test.source:
        raise InputError(
            f"DATA.TRAIN and DATA.TEST are both {train.source}: what was learned would be tested "
            "on itself."
        )
    _refuse_one_class(train)
    return train, _with_classes(test, train)


def _load_voc(cfg: CfgNode) -> tuple[LabelledImages, LabelledImages]:
    root, splits = cfg.DATA.ROOT, (cfg.DATA.TRAIN, cfg.DATA.TEST)
    lacking = [name for name in _VOC_FOLDERS if not os.path.isdir(os.path.join(root, name))]
    if lacking:
        raise InputError(
            f"DATA.ROOT {root}: expected a VOC folder such as VOCdevkit/VOC2007, with "
            f"{', '.join(_VOC_FOLDERS)}; there is no {', '.join(lacking)}."
        )
    classes = tuple(cfg.DATA.CLASSES or VOC_CLASSES)
    if len(set(classes)) < len(classes):
        raise InputError(f"DATA.CLASSES names a class twice: {', '.join(classes)}.")
    train, test = (split_ids(root, split) for split in splits)
    if shared := sorted(set(train) & set(test)):
        raise InputError(
            f"{root}: {len(shared)} images are in both splits, {splits[0]} and {splits[1]}; the "
            f"first: {', '.join(shared[:_NAMED])}. Choose splits that are apart."
        )
    objects = {name: _read_objects(root, name) for name in (*train, *test)}
    _check_classes(root, objects, cfg.DATA.CLASSES)
    return tuple(
        LabelledImages(
            [os.path.join(root, "JPEGImages", f"{name}.jpg") for name in names],
            np.array([[_label(objects[name], one) for one in classes] for name in names], np.int8),
            classes,
            split_list(root, split),
        )
        for split, names in zip(splits, (train, test))
    )


def _read_objects(root: str, name: str) -> list[tuple[str, bool]]:
    """Class and difficulty of every object of an image."""
    path = os.path.join(root, "Annotations", f"{name}.xml")
    try:
        tree = ElementTree.fromstring(read_text(path))
    except ElementTree.ParseError as error:
        raise InputError(
            f"{path}: expected VOC's XML, but it is cut short or not XML ({error}). Copy it again."
        ) from error
    objects = []
    for place, node in enumerate(tree.iter("object"), start=1):
        class_name = (node.findtext("name") or "").strip()
        difficult = (node.findtext("difficult") or "0").strip()
        if not class_name or difficult not in ("0", "1"):
            raise InputError(
                f"{path}: object {place} has the name {class_name!r} and difficult {difficult!r}; "
                "expected a class, and 0 or 1."
            )
        objects.append((class_name, difficult == "1"))
    return objects


def _check_classes(
    root: str, objects: dict[str, list[tuple[str, bool]]], wanted: Sequence[str]
) -> None:
    """Refuse classes of the annotations that nobody knows, or of the config that are not there."""
    first_image: dict[str, str] = {}
    for image, found in objects.items():
        for name, _ in found:
            first_image.setdefault(name, image)
    absent = [name for name in wanted if name not in first_image]
    if absent:
        raise InputError(
            f"DATA.CLASSES: no annotation of {root} has {', '.join(absent)}; it has "
            f"{', '.join(sorted(first_image))}.{nearest(absent[0], first_image)}"
        )
    unknown = sorted(set(first_image) - set(VOC_CLASSES))
    if unknown and not wanted:
        raise InputError(
            f"{os.path.join(root, 'Annotations', first_image[unknown[0]])}.xml: '{unknown[0]}' is "
            f"none of VOC's twenty classes ({len(unknown)} such). Name the classes to report with "
            f'DATA.CLASSES "{sorted(first_image)[:3]}".'
        )


def _label(objects: Sequence[tuple[str, bool]], wanted: str) -> int:
    easy = [not difficult for name, difficult in objects if name == wanted]
    return 1 if any(easy) else 0 if easy else -1


def _load_detection(cfg: CfgNode) -> tuple[LabelledImages, LabelledImages]:
    """A detector's data sets, as images that hold several classes each."""
    register_entries(cfg)
    tables: dict[str, list[AnnotationTable]] = {}
    for key in ("TRAIN", "TEST"):
        names = [name.strip() for name in cfg.DATA[key].split(",")]
        tables[key] = [read_catalog(name) for name in names]
        for table in tables[key]:
            require_usable(
                table, Use(tests=False, max_bad_share=1.0)
            )  # its boxes are not looked at
    every = [*tables["TRAIN"], *tables["TEST"]]
    classes = dict(sorted(every[0].categories.items()))
    for table in every[1:]:
        if table.categories != classes:
            raise InputError(
                f"{table.source}: its categories are not those of {every[0].source}. What is "
                "tested must have been learned: give both files the same list."
            )
    fraction, seed = cfg.VIRTEX.FRACTION, cfg.VIRTEX.FRACTION_SEED
    train = _of_tables(tables["TRAIN"], classes, fraction, seed)
    test = _of_tables(tables["TEST"], classes)
    if shared := sorted(
        set(map(os.path.realpath, train.files)) & set(map(os.path.realpath, test.files))
    ):
        raise InputError(
            f"{test.source}: {len(shared)} of its images are training images, too; the first: "
            f"{', '.join(shared[:_NAMED])}. tools/check_dataset.py names all of them."
        )
    return train, test


def _of_tables(
    tables: Sequence[AnnotationTable],
    classes: dict[int, str],
    fraction: float = 1.0,
    seed: int = 0,
) -> LabelledImages:
    """Of each set the images that a detector with this fraction and seed has, in one list."""
    files: list[str] = []
    labels: list[np.ndarray] = []
    for table in tables:
        check_fraction(fraction, table.name, len(table.image_ids))
        images = [{"image_id": key, "place": n} for n, key in enumerate(table.image_ids)]
        taken = [image["place"] for image in take_fraction(images, fraction, seed)]
        files += [table.files[place] for place in taken]
        labels.append(_image_labels(table, list(classes))[taken])
    source = ", ".join(table.source for table in tables)
    return LabelledImages(files, np.concatenate(labels), tuple(classes.values()), source)


def _image_labels(table: AnnotationTable, classes: list) -> np.ndarray:
    """`LabelledImages.labels` (N, C) of a detection set, in the order of the category ids given."""
    column = np.array([classes.index(key) for key in table.categories] + [-1])  # -1: of no category
    labels = np.full((len(table.image_ids), len(classes)), -1, np.int8)
    for image, keys in table.verified.items():  # LVIS: of other classes nobody knows
        labels[image] = [-1 if key in keys else 0 for key in classes]
    of = column[table.category_of]
    unsure = table.crowd | table.difficult
    for value, rows in ((0, unsure), (1, ~unsure)):  # one that is sure is enough
        rows = rows & (table.image_of >= 0) & (of >= 0)
        labels[table.image_of[rows], of[rows]] = value
    return labels


def _refuse_one_class(train: LabelledImages) -> None:
    """Raise InputError if all images are of one class, so that every answer would be right."""
    name = train.classes[train.labels[0]]
    if (train.labels != train.labels[0]).any():
        return
    folder = os.path.join(train.source, name)
    advice = "Give images of two classes or more."
    if os.path.isdir(folder) and (inside := _subfolders(folder)):
        advice = (
            f"It holds the folders {', '.join(inside[:_NAMED])}: if these are the classes, "
            f"DATA.TRAIN is the folder below, {folder}, and DATA.TEST likewise."
        )
    raise InputError(
        f"{train.source}: all images are of one class, {name!r}: nothing to tell apart. {advice}"
    )


def _require_folder(path: str, key: str) -> None:
    if not os.path.isdir(path):
        raise InputError(
            f"{key} {path!r}: there is no such folder. Check the path, or for the configs' own "
            "data sets DETECTRON2_DATASETS."
        )


def _read_folders(root: str, split: str) -> LabelledImages:
    """A folder of images, with subfolders or not, for each class: ImageNet's layout."""
    folder = os.path.join(root, split)
    _require_folder(folder, "DATA.ROOT with DATA.TRAIN or DATA.TEST")
    classes = _subfolders(folder)
    found: dict[str, list[str]] = {name: [] for name in classes}
    if not classes:
        raise InputError(
            f"{folder}: expected a folder of images for each class, found none in it. The script "
            "that sorts ImageNet's validation images into folders makes them."
        )
    for name in images_in(folder):
        name, slash, below = name.partition("/")
        if slash:  # no class is known of an image that lies beside the folders
            found[name].append(os.path.join(folder, name, below))
    if empty := [name for name in classes if not found[name]]:
        raise InputError(
            f"{folder}: {len(empty)} of its {len(classes)} class folders hold no image "
            f"({', '.join(IMAGE_SUFFIXES)}); the first: {', '.join(empty[:_NAMED])}. Remove them, "
            "or copy them again."
        )
    files = [file for name in classes for file in found[name]]
    labels = np.repeat(np.arange(len(classes)), [len(found[name]) for name in classes])
    return LabelledImages(files, labels, tuple(classes), folder)


def _subfolders(folder: str) -> list[str]:
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return sorted(name for name in names if os.path.isdir(os.path.join(folder, name)))


def _read_inaturalist(root: str, split: str) -> LabelledImages:
    """A JSON file with images, annotations and categories, one annotation an image."""
    path = os.path.join(root, split)
    content = read_json(path)
    images, annotations, categories = (_records(content, key, path) for key in _JSON_KEYS)
    names = {image["id"]: image["file_name"] for image in images}
    # numbers before texts, which do not compare with them
    ids = sorted({c["id"] for c in categories}, key=lambda i: (isinstance(i, str), i))
    label_of = {category: label for label, category in enumerate(ids)}
    label: dict[object, int] = {}
    unknown, twice = [], []
    for annotation in annotations:
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in names or category not in label_of:
            unknown.append(f"image_id {image}, category_id {category}")
        elif image in label:
            twice.append(f"image_id {image}")
        else:
            label[image] = label_of[category]
    bare = [f"id {image}" for image in names if image not in label]
    for found, what in (
        (unknown, "annotations name an image or a category that the file does not have"),
        (twice, "images have more than one annotation"),
        (bare, "images have no annotation"),
        (_repeated(image["id"] for image in images), "ids belong to more than one image"),
        (_repeated(c["id"] for c in categories), "ids belong to more than one category"),
    ):
        if found:
            first = "; ".join(found[:_NAMED])
            raise InputError(f"{path}: {len(found)} {what}; the first: {first}. Correct the file.")
    if not names:
        raise InputError(f"{path}: `images` is empty; there is nothing to learn or to test.")
    by_id = {category["id"]: category["name"] for category in categories}
    return LabelledImages(
        [os.path.join(root, name) for name in names.values()],
        np.array([label[image] for image in names], np.int64),
        tuple(f"{category} {by_id[category]}" for category in ids),
        path,
    )


def _records(content: dict, key: str, path: str) -> list[dict]:
    records = content.get(key)
    if not isinstance(records, list):
        found = "nothing" if records is None else f"a {type(records).__name__}"
        raise InputError(
            f"{path}: expected a list in `{key}`, found {found}. Is it iNaturalist's JSON with "
            "images, annotations and categories? That of the test set has no annotations."
        )
    kinds = {name: str if name == "file_name" else int | str for name in _JSON_KEYS[key]}
    for place, record in enumerate(records):
        known = record if isinstance(record, dict) else {}
        lacking = [name for name, kind in kinds.items() if not isinstance(known.get(name), kind)]
        if lacking:
            raise InputError(
                f"{path}: `{key}`[{place}] lacks {', '.join(lacking)} (a number or text): "
                f"{record!r:.200}"
            )
    return records


def _repeated(ids: Iterable[object]) -> list[str]:
    seen: set[object] = set()
    return [f"id {one}" for one in ids if one in seen or seen.add(one)]


def _with_classes(test: LabelledImages, train: LabelledImages) -> LabelledImages:
    """The test set with the training set's classes."""
    place = {name: label for label, name in enumerate(train.classes)}
    unknown = [name for name in test.classes if name not in place]
    if unknown:
        raise InputError(
            f"{test.source}: {len(unknown)} of its classes are not in {train.source}: "
            f"{', '.join(unknown[:_NAMED])}.{nearest(unknown[0], train.classes)} What is tested "
            "must have been learned."
        )
    if untested := len(train.classes) - len(np.unique(test.labels)):
        logger.warning(
            "%s: %d of the %d classes have no test image", test.source, untested, len(train.classes)
        )
    labels = np.array([place[test.classes[label]] for label in test.labels], np.int64)
    return LabelledImages(test.files, labels, train.classes, test.source)


@dataclass(frozen=True)
class CentralCrop:
    """Shorter side to `resize`, central `size` x `size`, bilinear with antialiasing.

    Attributes:
        resize, size: pixels.
        channel_order: "RGB" or "BGR", of the result.
    """

    resize: int = 256
    size: int = 224
    channel_order: str = "RGB"

    # To be raised with any change of the pixels: features in caches are of one version.
    version = 1

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> (3, size, size) uint8."""
        image = tvf.resize(image, self.resize, InterpolationMode.BILINEAR)
        return _pixels(tvf.center_crop(image, [self.size, self.size]), self.channel_order)


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop and a flip half of the time, as a function of a seed.

    Attributes:
        size: pixels.
        scale, ratio: ranges of the area kept (fraction) and of the aspect ratio.
        channel_order: "RGB" or "BGR", of the result.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    channel_order: str

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        """RGB image -> (3, size, size) uint8."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            region = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
            is_flipped = bool(torch.rand(()) < 0.5)
        size = [self.size, self.size]
        image = tvf.resized_crop(image, *region, size, InterpolationMode.BILINEAR)
        return _pixels(tvf.hflip(image) if is_flipped else image, self.channel_order)


def _pixels(image: Image.Image, channel_order: str) -> torch.Tensor:
    pixels = tvf.pil_to_tensor(image)
    return pixels if channel_order == "RGB" else pixels.flip(0)


class _CentralCrops(Dataset):
    """Some of a list's images: {"index", "input"}, or {"index", "unusable": reason}."""

    def __init__(self, files: Sequence[str], indices: Sequence[int], crop: CentralCrop):
        self._files = files
        self._indices = indices
        self._crop = crop

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> dict:
        index = self._indices[place]
        try:
            return {"index": index, "input": self._crop(read_image(self._files[index]))}
        except OSError as error:  # as data: from a worker it would arrive as a traceback
            return {"index": index, "unusable": str(error)}


def central_batches(
    files: Sequence[str],
    indices: Sequence[int],
    crop: CentralCrop,
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[list[int], torch.Tensor | None, dict[int, str]]]:
    """Give indices and pixels (N, 3, S, S) of usable images, and reasons by index for the others.

    In the order of `indices`; pixels are None where nothing of a batch is usable.
    """
    crops = _CentralCrops(files, indices, crop)
    for samples in _loaded(crops, num_workers, batch_size=batch_size):
        usable = [sample for sample in samples if "input" in sample]
        pixels = torch.stack([sample["input"] for sample in usable]) if usable else None
        unusable = {s["index"]: s["unusable"] for s in samples if "unusable" in s}
        yield [sample["index"] for sample in usable], pixels, unusable


class _RandomCrops(Dataset):
    """Training samples by position in an endless stream; each is a function of (seed, position).

    Position p is image p % N of epoch p // N, in that epoch's order. An image that cannot be
    decoded is replaced by the next one of the order, so that batches keep their size.

    A sample has "input" (3, S, S) uint8, "label", and "unusable": [(file, reason), ...] of images
    that it stands in for; where `MAX_REPLACEMENTS` in a row fail, that is all.
    """

    def __init__(self, images: LabelledImages, crop: RandomCrop, seed: int):
        self._images = images
        self._crop = crop
        self._order = EpochOrder(len(images.files), seed)
        self._seed = seed

    def __getitem__(self, position: int) -> dict:
        files, labels = self._images.files, self._images.labels
        epoch, place = divmod(position, len(files))
        order = self._order(epoch)
        unusable = []
        for step in range(min(MAX_REPLACEMENTS, len(order))):
            index = order[(place + step) % len(order)]
            try:
                image = read_image(files[index])
            except OSError as error:
                unusable.append((files[index], str(error)))
                continue
            seed = np.random.SeedSequence([self._seed, 1, position]).generate_state(1, np.uint64)
            pixels = self._crop(image, int(seed[0] >> 1))
            return {"input": pixels, "label": int(labels[index]), "unusable": unusable}
        return {"unusable": unusable}


class EpochOrder:
    """Epoch -> its permutation of `size` images; a function of (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self._size = size
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # a batch may span two epochs
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            rng = np.random.default_rng([self._seed, 0, epoch])
            self._orders[epoch] = rng.permutation(self._size)
        return self._orders[epoch]


def positions(batch_size_total: int, start_iteration: int) -> Iterator[list[int]]:
    """Give the positions of this process, an iteration after the other, without an end."""
    first = start_iteration * batch_size_total
    while True:
        yield list(range(first + comm.get_rank(), first + batch_size_total, comm.get_world_size()))
        first += batch_size_total


def random_batches(
    cfg: CfgNode, images: LabelledImages, start_iteration: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Give endless training batches of this process from an iteration on: {"input", "label"}.

    Images that cannot be decoded are named in the log; too many of them end the run.
    """
    size, scale, ratio = cfg.INPUT.CROP, tuple(cfg.INPUT.CROP_SCALE), tuple(cfg.INPUT.CROP_RATIO)
    crops = _RandomCrops(images, RandomCrop(size, scale, ratio, cfg.INPUT.FORMAT), cfg.SEED)
    wanted = positions(cfg.SOLVER.IMS_PER_BATCH, start_iteration)
    skipped: dict[str, str] = {}
    for samples in _loaded(crops, cfg.DATA.NUM_WORKERS, batch_sampler=wanted):
        for sample in samples:
            for file, reason in sample["unusable"]:
                if file not in skipped:
                    message = "%s: skipped, another image takes its place (%s)"
                    logger.warning(message, file, reason)
                skipped[file] = reason
            if "input" not in sample:
                raise InputError(refusal(skipped, "training images in a row"))
        if len(skipped) > cfg.DATA.MAX_SKIPPED_SHARE * len(images.files):
            what = "training images, more than DATA.MAX_SKIPPED_SHARE allows,"
            raise InputError(refusal(skipped, what))
        yield {
            "input": torch.stack([sample["input"] for sample in samples]),
            "label": torch.tensor([sample["label"] for sample in samples]),
        }


def refusal(unusable: dict[str, str], what: str) -> str:
    """Say that images cannot be decoded: how many, and the first ten."""
    first = "; ".join(f"{file} ({reason})" for file, reason in list(unusable.items())[:_NAMED])
    return (
        f"{len(unusable)} {what} cannot be decoded: {first}. Copy them again, or take them out of "
        "the data set."
    )


def _loaded(dataset: Dataset, num_workers: int, **batches: object) -> Iterator[list[dict]]:
    """Lists of samples; batches are stacked behind the loader, so that pinning would be in vain."""
    loader = DataLoader(
        dataset,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        prefetch_factor=2 if num_workers else None,
        **batches,
    )
    return batches_of(lambda: iter(loader))


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    start_worker()
