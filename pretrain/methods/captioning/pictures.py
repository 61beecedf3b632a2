"""Pictures of what a captioner says and of where it looks while saying it."""

import functools
import itertools
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

from pretrain.methods.captioning.decoding import Decoded, beam_search
from pretrain.methods.captioning.tokenizer import Tokenizer
from pretrain.transforms import EvalTransform, normalize
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.images import read_image

PANEL = 224  # side of a photograph or an attention map, pixels
_MARGIN, _TITLE, _LINE = 14, 30, 24  # between panels, above a panel, of a line of the caption
_PAPER, _INK, _FAINT = (255, 255, 255), (25, 25, 25), (110, 110, 110)
_WORD_START = "\u2581"  # SentencePiece's mark


def attention_picture(
    image: Image.Image, tokenizer: Tokenizer, decoded: Decoded, caption: str
) -> Image.Image:
    """The photograph, and for each word the square that the model sees with its attention over it.

    The attention of a word of several pieces is their mean. Brightness is the same for all words of
    the picture: from no attention to the highest of any word.

    Args:
        image: RGB, the whole photograph.
        tokenizer: of the model.
        decoded: with attention.
        caption: its text, written above.
    """
    words, maps = join_pieces(tokenizer, decoded)
    square = Image.fromarray(EvalTransform(PANEL)(image, "")[0].numpy().transpose(1, 2, 0))
    highest = max((float(weights.max()) for weights in maps), default=1.0)
    panels = [("photograph", _with_square(image))]
    panels += [(word, _heat(square, weights / highest)) for word, weights in zip(words, maps)]
    # as few empty places as possible
    columns = min(len(panels), min((5, 6, 4), key=lambda count: -len(panels) % count))
    rows = -(-len(panels) // columns)
    width = _MARGIN + columns * (PANEL + _MARGIN)
    lines = _wrapped(caption or "(no words)", _font(18), width - 2 * _MARGIN)
    top = _MARGIN + len(lines) * _LINE
    picture = Image.new("RGB", (width, top + rows * (_TITLE + PANEL) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN // 2 + number * _LINE), line, _INK, _font(18))
    for number, (title, panel) in enumerate(panels):
        row, column = divmod(number, columns)
        x, y = _MARGIN + column * (PANEL + _MARGIN), top + row * (_TITLE + PANEL)
        # the largest font in which it fits, down to what can still be read
        fonts = (_font(size) for size in range(18, 11, -1))
        font = next((f for f in fonts if f.getlength(title) <= PANEL), _font(11))
        ink = _INK if number else _FAINT
        draw.text((x + PANEL // 2, y + _TITLE - 6), _cut(title, font, PANEL), ink, font, "ms")
        picture.paste(panel, (x, y + _TITLE))
    return picture


class PictureFolder:
    """A folder of attention pictures, each under its photograph's name."""

    def __init__(self, folder: str):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: no folder can be made: {error.strerror}.") from error
        self._folder = folder
        self._names: set[str] = set()

    def save(self, file: str, tokenizer: Tokenizer, decoded: Decoded, caption: str) -> str:
        """Draw the picture of a photograph; returns its path, numbered where the name is taken."""
        stem = os.path.splitext(os.path.basename(file))[0]
        names = itertools.chain([f"{stem}.png"], (f"{stem}-{n}.png" for n in itertools.count(2)))
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        image = read_image(file, smallest_side=PANEL)
        picture = attention_picture(image, tokenizer, decoded, caption)
        path = os.path.join(self._folder, name)
        with atomic_path(path) as temporary:
            picture.save(temporary)
        return path


def join_pieces(tokenizer: Tokenizer, decoded: Decoded) -> tuple[list[str], list[np.ndarray]]:
    """Words of a caption and the attention (h, w) of each, the mean over its pieces.

    [EOS] is left out.
    """
    words: list[str] = []
    groups: list[list[np.ndarray]] = []
    pieces = tokenizer.pieces(decoded.tokens)
    for token, piece, weights in zip(decoded.tokens, pieces, decoded.attention.numpy()):
        if token == Tokenizer.eos_id:
            continue
        if piece.startswith(_WORD_START) or not words:
            words.append("")
            groups.append([])
        words[-1] += piece.replace(_WORD_START, "")
        groups[-1].append(weights)
    return words, [np.mean(group, axis=0) for group in groups]


@torch.no_grad()
def caption_pictures(
    model: nn.Module, tokenizer: Tokenizer, samples: Sequence[dict]
) -> list[tuple[str, np.ndarray]]:
    """Photographs with their greedy caption and the reference written under them.

    Args:
        model: one that can caption; its mode is restored.
        tokenizer: of the model.
        samples: of `data/loader.py`, read are image (3, S, S) uint8, caption_tokens and image_id.

    Returns:
        A pair for each sample: "caption/<image_id>", and (3, height, PANEL) uint8, as TensorBoard
        takes it.
    """
    if not samples:
        return []
    device = next(model.parameters()).device
    pixels = torch.stack([sample["image"] for sample in samples]).to(device)
    training = model.training
    model.eval()
    try:
        decoded = beam_search(model.textual, model.visual(normalize(pixels)), beam_size=1)
    finally:
        model.train(training)
    pictures = []
    for sample, caption in zip(samples, decoded):
        texts = (
            (tokenizer.decode(caption.tokens) or "(no words)", _INK),
            (f"reference: {tokenizer.decode(sample['caption_tokens'].tolist())}", _FAINT),
        )
        image = Image.fromarray(sample["image"].numpy().transpose(1, 2, 0))
        picture = _with_texts(image.resize((PANEL, PANEL), Image.Resampling.BICUBIC), texts)
        pictures.append((f"caption/{sample['image_id']}", np.asarray(picture).transpose(2, 0, 1)))
    return pictures


def _with_texts(image: Image.Image, texts: Sequence[tuple[str, tuple]]) -> Image.Image:
    font, line_height = _font(13), 17
    lines = [(line, ink) for text, ink in texts for line in _wrapped(text, font, PANEL - 8)]
    picture = Image.new("RGB", (PANEL, image.height + len(lines) * line_height + 8), _PAPER)
    picture.paste(image, (0, 0))
    draw = ImageDraw.Draw(picture)
    for number, (line, ink) in enumerate(lines):
        draw.text((4, image.height + 3 + number * line_height), line, ink, font)
    return picture


def _with_square(image: Image.Image) -> Image.Image:
    """The whole photograph in a panel, pale outside the central square."""
    small = ImageOps.contain(image, (PANEL, PANEL), Image.Resampling.LANCZOS)
    side = min(small.size)
    x, y = (small.width - side) // 2, (small.height - side) // 2
    square = small.crop((x, y, x + side, y + side))
    small = Image.blend(small, Image.new("RGB", small.size, _PAPER), 0.6)
    small.paste(square, (x, y))
    panel = Image.new("RGB", (PANEL, PANEL), _PAPER)
    panel.paste(small, ((PANEL - small.width) // 2, (PANEL - small.height) // 2))
    return panel


def _heat(square: Image.Image, weights: np.ndarray) -> Image.Image:
    """Attention (h, w) in [0, 1] over the square: glowing where it is, dark and grey elsewhere."""
    from matplotlib import colormaps  # slow to import, and every run imports this module

    # bicubic overshoots: the range is cut again afterwards
    smooth = Image.fromarray(weights.astype(np.float32)).resize(
        square.size, Image.Resampling.BICUBIC
    )
    heat = np.clip(np.asarray(smooth), 0, 1)[..., None]  # (PANEL, PANEL, 1)
    colours = colormaps["inferno"](heat[..., 0])[..., :3] * 255
    pixels = np.asarray(square, np.float32)
    grey = pixels.mean(-1, keepdims=True)
    shaded = (0.55 + 0.4 * heat) * (0.5 * grey + 0.5 * pixels)
    mixed = (1 - 0.6 * heat) * shaded + 0.6 * heat * colours
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: it knows most alphabets."""
    import matplotlib  # as above

    return ImageFont.truetype(
        os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning as fits with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that fit the width; a word that does not is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_cut(word, font, width))
    return lines
