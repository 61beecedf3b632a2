"""One small set of captioned images in every format that pretraining reads."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.methods.captioning.tokenizer import train_tokenizer
from pretrain.methods.seqclr.rendered import write_words

# Of a run of THIN_TOOL on it that takes seconds; VOCAB_SIZE is what so few captions can fill.
THIN_TOOL = Path(__file__).resolve().parents[1] / "thin" / "pretrain_net.py"
THIN = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VISUAL.NAME": "resnet18",
    "MODEL.TEXTUAL.HIDDEN_SIZE": 64,
    "DATA.VOCAB_SIZE": 48,
    "DATA.IMAGE_SIZE": 32,
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


def write_world(folder: Path, num_images: int, shards: int = 4) -> None:
    """Write images, captions and classes, and for each way to read them `<name>.options.json`.

    Names: coco, karpathy, tsv, folder, webdataset (tar shards), pipe (the same, streamed) and mixed
    (coco and tsv); these validate on COCO's format. And images alone and words, for methods that
    need no captions. Each options file holds the config keys of a run.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    samples = []
    for i in range(num_images):
        name, captions, colour = f"{i:03d}.jpg", _captions(i), list(COLOURS)[i % 3]
        _image(i, colour).save(images / name)
        samples.append((name, captions, list(COLOURS).index(colour)))
    _write_coco(folder, samples)
    _write_others(folder, samples)
    _write_shards(folder, samples, shards)
    texts = (caption for _, captions, _ in samples for caption in captions)
    train_tokenizer(texts, 48, folder / "tokenizer.model")

    captions, pattern = folder / "coco.json", folder / f"{{0..{shards - 1}}}.tar"
    common = {
        "DATA.VAL_FORMAT": "coco",
        "DATA.VAL_CAPTIONS": captions,
        "DATA.VAL_IMAGES": images,
        "DATA.TRAIN_IMAGES": images,
        "DATA.TRAIN_LABELS": folder / "instances.json",
        "DATA.VAL_LABELS": folder / "instances.json",
    }
    tokenizer = {"DATA.TOKENIZER": folder / "tokenizer.model"}  # a stream cannot be read twice
    ways = {
        "coco": {"DATA.TRAIN_CAPTIONS": captions},
        "karpathy": {"DATA.TRAIN_CAPTIONS": folder / "karpathy.json", "DATA.TRAIN_SPLIT": "train"},
        "tsv": {"DATA.TRAIN_CAPTIONS": folder / "captions.tsv"},
        "folder": {"DATA.TRAIN_CAPTIONS": folder / "images"},
        "webdataset": {"DATA.TRAIN_CAPTIONS": pattern},
        "pipe": {"DATA.TRAIN_CAPTIONS": f"pipe:cat {pattern}", **tokenizer},
        "mixed": {
            "DATA.TRAIN_SOURCES": [
                [2.0, "coco", str(captions), str(images)],
                [1.0, "tsv", str(folder / "captions.tsv"), str(images)],
            ]
        },
    }
    for name, options in ways.items():
        options = {**common, "DATA.FORMAT": {"pipe": "webdataset"}.get(name, name), **options}
        if name == "mixed":
            del options["DATA.FORMAT"], options["DATA.TRAIN_IMAGES"]
        text = json.dumps(options, default=str)
        (folder / f"{name}.options.json").write_text(text)
    _write_uncaptioned(folder)


def _write_uncaptioned(folder: Path) -> None:
    """Options of the methods that need no captions: `images`, and `words` of their own."""
    words = [str(write_words(folder / "words", 24, seed=1))]
    ways = {
        "images": {"DATA.TRAIN_IMAGES": folder / "images", "DATA.VAL_IMAGES": folder / "images"},
        "words": {"DATA.WORDS": words, "DATA.VAL_WORDS": words},
    }
    ways["images"]["DATA.FORMAT"] = "images"
    for name, options in ways.items():
        (folder / f"{name}.options.json").write_text(json.dumps(options, default=str))


def _captions(i: int) -> list[str]:
    colour, side = list(COLOURS)[i % 3], ("left", "right")[i // 3 % 2]
    return [f"a {colour} picture bright on the {side}", f"the {side} of it is bright {colour}"]


def _image(i: int, colour: str) -> Image.Image:
    rng = np.random.RandomState(i)
    pixels = np.full((48, 64, 3), COLOURS[colour], np.float32) * 0.6
    pixels[:, slice(0, 32) if i // 3 % 2 == 0 else slice(32, 64)] *= 1.6
    pixels += rng.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write_coco(folder: Path, samples: list) -> None:
    images = [
        {"id": i, "file_name": name, "height": 48, "width": 64}
        for i, (name, _, _) in enumerate(samples)
    ]
    captions = [
        {"image_id": i, "caption": caption}
        for i, (_, captions, _) in enumerate(samples)
        for caption in captions
    ]
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(COLOURS)]
    objects = [{"image_id": i, "category_id": 10 + c} for i, (_, _, c) in enumerate(samples)]
    for name, annotations in (("coco", captions), ("instances", objects)):
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{name}.json").write_text(json.dumps(content))


def _write_others(folder: Path, samples: list) -> None:
    karpathy = [
        {"filename": name, "split": "train", "sentences": [{"raw": text} for text in captions]}
        for name, captions, _ in samples
    ]
    (folder / "karpathy.json").write_text(json.dumps({"images": karpathy, "dataset": "mine"}))
    with open(folder / "captions.tsv", "w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["image", "caption"])
        rows.writerows((name, text) for name, captions, _ in samples for text in captions)
    for name, captions, _ in samples:
        (folder / "images" / name).with_suffix(".txt").write_text("\n".join(captions) + "\n")


def _write_shards(folder: Path, samples: list, shards: int) -> None:
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for name, captions, _ in samples[shard::shards]:
                image = (folder / "images" / name).read_bytes()
                for member, content in (
                    (name, image),
                    (name.replace(".jpg", ".txt"), captions[0].encode()),
                ):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
