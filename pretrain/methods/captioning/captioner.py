"""A pretrained captioning model and its tokenizer, put to use on image files."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TextIO

import torch
from detectron2.config import CfgNode
from PIL import Image

from pretrain.config import get_pretrain_cfg
from pretrain.export import load_weights
from pretrain.methods.captioning.decoding import Decode, Decoded
from pretrain.methods.captioning.model import Captioning
from pretrain.methods.captioning.samples import tokenizer_identity
from pretrain.methods.captioning.tokenizer import Tokenizer
from pretrain.methods.method import build_method
from pretrain.transforms import EvalTransform, normalize
from virtex_d2.engine.config import load_config
from virtex_d2.engine.device import resolve_device
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_text, require_file
from virtex_d2.engine.images import images_in, read_image
from virtex_d2.engine.safe_load import read_checkpoint, read_stored


@dataclass(frozen=True, eq=False)
class CaptionedImage:
    """What became of one file.

    Attributes:
        file: as it was given.
        error: why it cannot be decoded; then there is nothing else.
        caption: the text.
        decoded: tokens, log-probability and, where asked for, attention.
    """

    file: str
    error: str = ""
    caption: str = ""
    decoded: Decoded | None = None


@dataclass(frozen=True, eq=False)
class Captioner:
    """A captioning model in evaluation mode, and what belongs to it."""

    model: Captioning
    tokenizer: Tokenizer
    image_size: int  # side of the central square that the model sees, pixels
    device: torch.device

    @torch.no_grad()
    def caption(self, images: list[Image.Image], decode: Decode) -> list[Decoded]:
        """RGB images of any size -> a caption each."""
        transform = EvalTransform(self.image_size)
        pixels = torch.stack([transform(image, "")[0] for image in images])  # (N, 3, S, S) uint8
        features = self.model.visual(normalize(pixels.to(self.device)))
        return decode(self.model.textual, features)

    def caption_files(
        self, files: Iterable[str], decode: Decode, batch_size: int
    ) -> Iterator[CaptionedImage]:
        """Caption files in their order, `batch_size` at a time; what cannot be decoded says why."""
        if batch_size < 1:
            raise InputError(f"Batch size {batch_size}: expected 1 or more.")
        files = iter(files)
        while batch := list(islice(files, batch_size)):
            images, errors = [], {}
            for place, file in enumerate(batch):
                try:
                    images.append(read_image(file, self.image_size))
                except OSError as error:
                    errors[place] = error.strerror or str(error)
            decoded = iter(self.caption(images, decode) if images else [])
            for place, file in enumerate(batch):
                if place in errors:
                    yield CaptionedImage(file, error=errors[place])
                else:
                    caption = next(decoded)
                    text = self.tokenizer.decode(caption.tokens)
                    yield CaptionedImage(file, caption=text, decoded=caption)


def list_images(arguments: Iterable[str], stdin: TextIO) -> Iterator[str]:
    """Files as they are, the images of folders (with their subfolders, sorted), and for "-" the
    paths that standard input names, one a line, as they arrive.
    """
    for argument in arguments:
        if argument == "-":
            yield from (line.rstrip("\n") for line in stdin if line.strip())
        elif os.path.isdir(argument):
            yield from (os.path.join(argument, name) for name in images_in(argument))
        else:
            yield argument


def load_captioner(
    model: str, config_file: str = "", tokenizer: str = "", device: str = "auto"
) -> Captioner:
    """Load the captioning model of a pretraining run.

    Args:
        model: the folder of a run (its last checkpoint is taken), or a checkpoint of ours or of
            VirTex's names.
        config_file: config of the model; "" is `config.yaml` beside the checkpoint.
        tokenizer: SentencePiece model; "" is the config's DATA.TOKENIZER if that file exists, else
            `tokenizer.model` beside the checkpoint.
        device: "auto" is CUDA where there is a device, else the CPU.
    """
    device = resolve_device(device, name="Device")
    checkpoint = _checkpoint_in(model) if os.path.isdir(model) else model
    require_file(checkpoint)
    folder = os.path.dirname(checkpoint)
    cfg = load_config(
        get_pretrain_cfg(), _beside(folder, "config.yaml", config_file, "--config-file"), None
    )
    cfg.MODEL.VISUAL.RECOMPUTE = ""  # concerns training alone
    given = tokenizer or (cfg.DATA.TOKENIZER if os.path.isfile(cfg.DATA.TOKENIZER) else "")
    tokenizer_file = _beside(folder, "tokenizer.model", given, "--tokenizer")
    pieces = Tokenizer(tokenizer_file)
    objective = build_captioning(cfg, pieces.vocab_size)
    try:
        load_weights(objective, read_stored(checkpoint), tokenizer_identity(pieces))
    except InputError as error:
        _check_vocabulary(checkpoint, tokenizer_file, pieces.vocab_size, error)
        raise
    objective = objective.eval().to(device)
    return Captioner(objective, pieces, cfg.DATA.IMAGE_SIZE, torch.device(device))


def build_captioning(cfg: CfgNode, vocab_size: int) -> Captioning:
    """The config's objective, of random weights."""
    objective = build_method(cfg, vocab_size)
    if not (isinstance(objective, Captioning) and objective.can_caption):
        raise InputError(
            f"MODEL.OBJECTIVE {cfg.MODEL.OBJECTIVE} cannot caption: it has no decoder that "
            "predicts the next word. Use a model of bicaptioning or captioning."
        )
    return objective


def _checkpoint_in(folder: str) -> str:
    """The checkpoint that `last_checkpoint` names, else model_final.pth."""
    last = os.path.join(folder, "last_checkpoint")
    name = read_text(last).strip() if os.path.isfile(last) else "model_final.pth"
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise InputError(
            f"{folder}: expected the folder of a pretraining run, found no checkpoint {name} in it."
        )
    return path


def _beside(folder: str, name: str, given: str, flag: str) -> str:
    path = given or os.path.join(folder, name)
    if not given and not os.path.isfile(path):
        raise InputError(
            f"{path}: expected it beside the checkpoint, found none. Name the file with {flag}."
        )
    return path


def _check_vocabulary(checkpoint: str, tokenizer: str, pieces: int, cause: InputError) -> None:
    """Say both sizes where the vocabulary is why a checkpoint does not fit."""
    content = read_checkpoint(checkpoint)
    state = content.get("model", content)
    for name in ("textual.output.weight", "module.textual.output.weight"):
        weight = state.get(name) if isinstance(state, dict) else None
        if isinstance(weight, torch.Tensor) and len(weight) != pieces:
            raise InputError(
                f"{tokenizer}: the vocabulary has {pieces} pieces, the model in {checkpoint} "
                f"{len(weight)}. Give the tokenizer that the model was trained with."
            ) from cause
