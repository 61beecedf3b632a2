"""A trained recogniser put to use on images of words."""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from pretrain.config import get_pretrain_cfg
from pretrain.data.records import CaptionRecord
from pretrain.export import differences
from pretrain.methods.seqclr.decoders import Reading
from pretrain.methods.seqclr.lmdb_words import find_databases
from pretrain.methods.seqclr.recognizer import FORMAT, LETTERS, VERSION, Recognizer
from pretrain.methods.seqclr.words import read_words, word_pixels
from pretrain.transforms import normalize
from virtex_d2.engine.device import resolve_device
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import image_suffix, images_in, read_image
from virtex_d2.engine.safe_load import read_tensors

NAME = "recognizer.safetensors"


@dataclass(frozen=True)
class ReadImage:
    """What became of one image: `error` says why there is no reading."""

    name: str
    reading: Reading | None = None
    error: str = ""


@dataclass(frozen=True, eq=False)
class Reader:
    """A recogniser in evaluation mode."""

    model: Recognizer
    size: tuple[int, int]  # height and width of the words that it sees, pixels
    device: torch.device

    @torch.no_grad()
    def read(self, pixels: Sequence[torch.Tensor]) -> list[Reading]:
        """(3, H, W) uint8 RGB of `size` each -> a reading each."""
        if not pixels:
            return []
        image = normalize(torch.stack(list(pixels)).to(self.device))
        return self.model.decoder.read(self.model.frames(image))

    def read_records(
        self, records: Iterable[CaptionRecord], batch_size: int
    ) -> Iterator[ReadImage]:
        """Read images in their order, `batch_size` at a time; what cannot be decoded says why."""
        if batch_size < 1:
            raise InputError(f"Batch size {batch_size}: expected 1 or more.")
        records = iter(records)
        while batch := list(islice(records, batch_size)):
            pixels, errors = [], {}
            for place, record in enumerate(batch):
                try:
                    pixels.append(word_pixels(read_image(record.image_file()), self.size))
                except OSError as error:
                    errors[place] = error.strerror or str(error)
            readings = iter(self.read(pixels))
            for place, record in enumerate(batch):
                if place in errors:
                    yield ReadImage(record.file_name, error=errors[place])
                else:
                    yield ReadImage(record.file_name, next(readings))


def load_reader(model: str, device: str = "auto") -> Reader:
    """Load a recogniser.

    Args:
        model: recognizer.safetensors, or the folder of the run that has written it.
        device: "auto" is CUDA where there is a device, else the CPU.
    """
    device = resolve_device(device, name="Device")
    path = model
    if os.path.isdir(model):
        path = os.path.join(model, NAME)
        if not os.path.isfile(path):
            raise InputError(
                f"{model}: expected the folder of a run of tools/train_recognizer.py, found no "
                f"{NAME} in it."
            )
    stored = read_tensors(path)
    if stored.metadata.get("format") != FORMAT:
        found = stored.metadata.get("format") or f"a {stored.format} file without such metadata"
        raise InputError(
            f"{path}: expected {NAME} of tools/train_recognizer.py, found {found}. Checkpoints "
            "of captions, detectors and encoders do not read words."
        )
    if stored.metadata.get("format_version") != VERSION:
        raise InputError(
            f"{path}: expected format_version {VERSION}, found "
            f"{stored.metadata.get('format_version')!r}. It is of another version of this project."
        )
    recognizer = _build(path, stored.metadata)
    _load(recognizer, stored.content, path)
    size = tuple(recognizer.cfg.DATA.WORD_SIZE)
    return Reader(recognizer.eval().to(device), size, torch.device(device))


def _build(path: str, metadata: dict[str, str]) -> Recognizer:
    cfg = get_pretrain_cfg()
    Recognizer.add_config(cfg)
    try:
        for key, value in json.loads(metadata["config"]).items():
            *groups, name = key.split(".")
            node = functools.reduce(dict.__getitem__, groups, cfg)
            value = tuple(value) if isinstance(value, list) else value
            if type(node[name]) is not type(value):
                raise TypeError(f"{key} is {value!r}")
            node[name] = value
        Recognizer.check(cfg)
        return Recognizer(cfg, len(cfg.DECODER.ALPHABET))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: its metadata `config` does not say what the recognizer is built of: {error}. "
            "Export it again: a run that goes on with --resume writes it anew."
        ) from error


def _load(recognizer: Recognizer, tensors: dict[str, torch.Tensor], path: str) -> None:
    own = recognizer.state_dict()
    problems = differences(own, tensors)
    if not problems and not torch.equal(tensors[LETTERS].int(), own[LETTERS]):
        problems = ["its letters are not those of its metadata"]
    if problems:
        raise InputError(
            f"{path} is damaged: {len(problems)} tensors differ from what its metadata say: "
            f"{'; '.join(problems[:5])}. Export it again."
        )
    recognizer.load_state_dict(tensors)


def images_to_read(path: str) -> Iterable[CaptionRecord]:
    """An image, all images of a folder, or the words of a set that `read_words` knows."""
    if os.path.isdir(path) and not find_databases(path):
        for name in images_in(path):
            yield CaptionRecord(name, os.path.join(path, name), ())
    elif image_suffix(path):
        yield CaptionRecord(path, path, ())
    else:
        for words in read_words(path):
            yield from words.records
