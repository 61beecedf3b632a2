"""Words of lists in MATLAB's and XML files; some are places in larger images, cut out when read.

IIIT5K (Mishra et al., BMVC 2012), SynthText (Gupta et al., CVPR 2016), ICDAR 2003 and Street View
Text (Wang et al., ICCV 2011).
"""

import io
import os
from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import scipy.io
from PIL import Image

from pretrain.data.records import Records, packed
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import read_image

_IIIT5K = {"traindata": "GroundTruth", "testdata": "GroundTruth"}
_IIIT5K |= {"trainCharBound": "chars", "testCharBound": "chars"}
_SYNTHTEXT = ("imnames", "wordBB", "txt")


@dataclass(frozen=True, slots=True)
class CutWord:
    """A quadrangle of an image file.

    Attributes:
        path: the image.
        corners: x and y of the upper left, upper right, lower right and lower left one, in pixels.
    """

    path: str
    corners: tuple[float, ...]

    def open(self) -> io.BytesIO:
        """The word brought upright, as an uncompressed image."""
        corners = np.array(self.corners).reshape(4, 2)
        right, down = corners[[1, 2]] - corners[[0, 3]], corners[[3, 2]] - corners[[0, 1]]
        width, height = (round(float(np.linalg.norm(s, axis=1).mean())) for s in (right, down))
        if width < 1 or height < 1:
            raise OSError(f"the word's corners {self.corners} leave nothing to cut out")
        image = read_image(self.path)
        # Pillow's order: upper left, lower left, lower right, upper right
        quad = corners[[0, 3, 2, 1]].reshape(-1).tolist()
        word = image.transform(
            (width, height), Image.Transform.QUAD, quad, Image.Resampling.BILINEAR
        )
        stream = io.BytesIO()
        word.save(stream, "ppm")
        stream.seek(0)
        return stream


@dataclass(frozen=True, eq=False, repr=False)
class CutRecords(Records):
    """Records of words within images: `corners` (words, 8) float32, as of `CutWord`."""

    corners: np.ndarray | None = None

    def content(self, root: str, index: int) -> CutWord:
        path = os.path.join(root, self.names[index])
        return CutWord(path, tuple(self.corners[index].tolist()))

    def select(self, images: np.ndarray, captions: np.ndarray) -> "CutRecords":
        return replace(super().select(images, captions), corners=self.corners[images])


def _cut(path: str, words: Sequence[tuple[str, str, Sequence[float]]]) -> CutRecords:
    """Pack (image, label, corners) of words; all images must be on the disk."""
    names = [name for name, _, _ in words]
    count: dict[str, int] = {}
    ids = []
    for name in names:
        count[name] = count.get(name, 0) + 1
        ids.append(f"{name}#{count[name]}")
    labels = _captions([label for _, label, _ in words])
    found = packed(ids, names, labels, path, os.path.dirname(path) or ".")
    corners = np.array([corners for _, _, corners in words], np.float32).reshape(-1, 8)
    return CutRecords(**{**vars(found), "corners": corners})


def _captions(labels: Iterable[str]) -> list[list[str]]:
    return [[label.strip()] if label.strip() else [] for label in labels]


# MATLAB


def is_matlab(path: str) -> bool:
    """Whether a file begins as MATLAB's of version 5 on do."""
    with open(path, "rb") as file:
        return file.read(7) == b"MATLAB "


def read_matlab(path: str) -> tuple[str, Records]:
    """Read IIIT5K's traindata.mat and its kind, or SynthText's gt.mat: layout and words."""
    names = [name for name, _, _ in _matlab(path, scipy.io.whosmat)]
    if set(_SYNTHTEXT) <= set(names):
        return "synthtext", _read_synthtext(path)
    known = [name for name in names if name in _IIIT5K]
    if not known:
        raise InputError(
            f"{path}: expected one of IIIT5K's variables ({', '.join(_IIIT5K)}) or SynthText's "
            f"({', '.join(_SYNTHTEXT)}), found {', '.join(names[:10]) or 'none'}."
        )
    return "iiit5k", _read_iiit5k(path, known[0])


def _matlab(path: str, read: Any, **options: Any) -> Any:
    try:
        return read(path, **options)
    except NotImplementedError as error:  # HDF5
        raise InputError(
            f"{path}: is a MATLAB file of version 7.3, which is not read. Save it with -v7."
        ) from error
    except Exception as error:  # scipy answers damage with nearly every kind
        raise InputError(
            f"{path}: cannot be read as a MATLAB file: {error}. Copy it again."
        ) from error


def _load(path: str, names: Sequence[str]) -> dict[str, Any]:
    return _matlab(path, scipy.io.loadmat, variable_names=names, squeeze_me=True)


def _read_iiit5k(path: str, variable: str) -> Records:
    field = _IIIT5K[variable]
    rows = np.atleast_1d(_load(path, [variable])[variable])
    if not {"ImgName", field} <= set(rows.dtype.names or ()):
        raise InputError(
            f"{path}: expected `ImgName` and `{field}` in {variable}, found {rows.dtype.names}."
        )
    names = [_text(path, row["ImgName"]) for row in rows]
    labels = [_text(path, row[field]) for row in rows]
    return packed(names, names, _captions(labels), path, os.path.dirname(path) or ".")


def _text(path: str, value: Any) -> str:
    value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    if isinstance(value, np.ndarray) and not value.size:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{path}: expected a text, found {value!r}.")
    return value


def _read_synthtext(path: str) -> CutRecords:
    content = _load(path, _SYNTHTEXT)
    names, boxes, texts = (np.atleast_1d(content[name]) for name in _SYNTHTEXT)
    if boxes.dtype != object:  # the boxes of one image alone
        boxes = _single(content["wordBB"])
    if not len(names) == len(boxes) == len(texts):
        names_, lengths = ", ".join(_SYNTHTEXT), (len(names), len(boxes), len(texts))
        raise InputError(f"{path}: {names_} have {lengths} images; expected as many of each.")
    words = []
    for name, box, text in zip(names, boxes, texts if len(names) > 1 else [content["txt"]]):
        labels = " ".join(map(str, np.atleast_1d(text))).split()
        corners = np.asarray(box, np.float32).reshape(2, 4, -1)  # x and y, corner, word
        if corners.shape[2] != len(labels):
            raise InputError(
                f"{path}: {name} has {len(labels)} words in `txt` and {corners.shape[2]} boxes in "
                "`wordBB`. The file is damaged, or of another data set."
            )
        rows = corners.transpose(2, 1, 0).reshape(-1, 8)  # (words, 8)
        words += [(str(name), label, row) for label, row in zip(labels, rows)]
    return _cut(path, words)


def _single(value: np.ndarray) -> np.ndarray:
    result = np.empty(1, object)
    result[0] = value
    return result


# XML


def is_xml(path: str) -> bool:
    """Whether a file begins with an element, or says that it is XML."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(BOM_UTF8).lstrip().startswith(b"<")


def read_xml(path: str) -> tuple[str, Records]:
    """Read ICDAR 2003's lists of cropped words, or of words in scenes (as SVT's)."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # encodings, too
        raise InputError(f"{path}: is not XML: {error}. Copy it again.") from error
    images = list(root.iter("image"))
    if images and all("file" in image.attrib for image in images):
        names = [image.attrib["file"] for image in images]
        labels = [image.attrib.get("tag", "") for image in images]
        return "icdar 2003", packed(
            names,
            names,
            _captions(labels),
            path,
            os.path.dirname(path) or ".",
        )
    words = []
    for image in images:
        name = (image.findtext("imageName") or "").strip()
        for number, box in enumerate(image.iter("taggedRectangle"), 1):
            try:
                x, y, width, height = (float(box.attrib[k]) for k in ("x", "y", "width", "height"))
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"{path}: rectangle {number} of {name or 'an image'} needs the numbers x, y, "
                    f"width and height, found {box.attrib}."
                ) from error
            corners = (x, y, x + width, y, x + width, y + height, x, y + height)
            words.append((name, box.findtext("tag") or "", corners))
    if not words or not all(name for name, _, _ in words):
        raise InputError(
            f"{path}: expected elements <image file= tag=>, or <image> with imageName and "
            "taggedRectangle, as ICDAR 2003 and SVT have them; found none that is whole."
        )
    return "icdar 2003 scenes", _cut(path, words)
