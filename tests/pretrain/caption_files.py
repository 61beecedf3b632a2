"""One set of captioned images, written in every format that is read."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.config import get_pretrain_cfg
from pretrain.data.formats import Source, load_records
from pretrain.data.loader import TrainSet
from pretrain.data.records import CaptionRecord
from pretrain.methods.captioning.samples import CaptionSamples

CAPTIONS = {
    "a/1.jpg": ['one dog, left of "it"', "two dogs"],
    "a/2.png": ["three cats 🐈 sit"],
    "b/3.webp": ["four birds", "five: كلب", "six"],
    "b/4.jpeg": ["seven| eight", "nine"],
    "c.jpg": ["ten eleven"],
}
LOSSLESS = {"png": {}, "webp": {"lossless": True}}


def caption_samples(tokenizer, size: int, targets=(), max_length: int = 30) -> CaptionSamples:
    """Of the paper's crops at a size."""
    cfg = get_pretrain_cfg()
    cfg.DATA.IMAGE_SIZE, cfg.MODEL.TEXTUAL.MAX_LENGTH = size, max_length
    return CaptionSamples(cfg, tokenizer, targets)


def train_set(records, tokenizer, size: int = 8, seed: int = 0, targets=()) -> TrainSet:
    return TrainSet(records, caption_samples(tokenizer, size, targets), seed)


def write_images(root: Path, names=CAPTIONS) -> Path:
    """Noise, different in each."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **LOSSLESS.get(path.suffix[1:], {}))
    return root


def write_all(folder: Path) -> dict[str, Source]:
    """The content of `CAPTIONS` in each format; names say which."""
    images = write_images(folder / "images")
    rows = [(name, text) for name, texts in CAPTIONS.items() for text in texts]
    coco, karpathy = {"images": [], "annotations": []}, []
    for number, (name, texts) in enumerate(CAPTIONS.items()):
        coco["images"].append({"id": number, "file_name": name})
        coco["annotations"] += [{"image_id": number, "caption": text} for text in texts]
        parent, _, base = name.rpartition("/")
        sentences = [{"raw": text, "tokens": []} for text in texts]
        split = ("train", "restval")[number % 2]
        image = {"filename": base, "split": split, "sentences": sentences, "imgid": number}
        karpathy.append(image | ({"filepath": parent} if parent else {}))
    unwanted = {"filename": "9.jpg", "split": "test", "sentences": [{"raw": "x"}], "imgid": 99}
    (folder / "coco.json").write_text(json.dumps(coco))
    (folder / "karpathy.json").write_text(json.dumps({"images": karpathy + [unwanted]}))

    write_csv(folder / "plain.csv", rows)
    write_csv(folder / "header.csv", [("Caption", "n", "image"), *((t, "7", n) for n, t in rows)])
    write_csv(folder / "captions.txt", [("image", "caption"), *rows])
    lines = [f"{name}\t{text}" for name, text in rows]
    (folder / "plain.tsv").write_text("\n".join(lines))
    header = "filepath\ttitle\r\n" + "\r\n".join(lines) + "\r\n"
    (folder / "windows.tsv").write_bytes(b"\xef\xbb\xbf" + header.encode())
    numbered = [(n, i, t) for n, texts in CAPTIONS.items() for i, t in enumerate(texts)]
    (folder / "flickr.token").write_text("".join(f"{n}#{i}\t{t}\n" for n, i, t in numbered))
    bars = "".join(f"{n}| {i}| {t}\n" for n, i, t in numbered)
    (folder / "results.csv").write_text("image_name| comment_number| comment\n" + bars)

    write_images(folder / "pairs")
    for name, texts in CAPTIONS.items():
        (folder / "pairs" / name).with_suffix(".txt").write_text("\n".join(texts) + "\n")
    write_shards(folder / "shards", images)
    pattern = str(folder / "shards" / "{00000..00001}.tar")

    root = str(images)
    return {
        "coco": Source("coco", str(folder / "coco.json"), root),
        "karpathy": Source("karpathy", str(folder / "karpathy.json"), root, "train+restval"),
        "flickr csv": Source("flickr", str(folder / "captions.txt"), root),
        "flickr token": Source("flickr", str(folder / "flickr.token"), root),
        "flickr bars": Source("flickr", str(folder / "results.csv"), root),
        "csv": Source("csv", str(folder / "plain.csv"), root),
        "csv with header": Source("csv", str(folder / "header.csv"), root),
        "tsv": Source("tsv", str(folder / "plain.tsv"), root),
        "tsv of Windows": Source("tsv", str(folder / "windows.tsv"), root),
        "folder": Source("folder", str(folder / "pairs")),
        "webdataset": Source("webdataset", pattern, index_dir=str(folder / "index")),
    }


def write_csv(path: Path, rows: list[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_shards(folder: Path, images: Path, captions=CAPTIONS, num_shards: int = 2) -> list[Path]:
    """Neighbours share a shard. Texts are in .txt, in the last shard in .json."""
    folder.mkdir()
    names = list(captions)
    paths = []
    for shard in range(num_shards):
        first = shard * len(names) // num_shards
        members = []
        for name in names[first : (shard + 1) * len(names) // num_shards]:
            key, _, suffix = name.rpartition(".")
            members.append((f"{key}.{suffix}", (images / name).read_bytes()))
            if shard == num_shards - 1:
                content = json.dumps({"caption": captions[name], "width": 56}).encode()
                members.append((f"{key}.json", content))
            else:
                members.append((f"{key}.txt", "\n".join(captions[name]).encode()))
        paths.append(write_tar(folder / f"{shard:05}.tar", members))
    return paths


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def contents(source: Source) -> list[tuple[bytes, tuple[str, ...]]]:
    """Bytes of the image and captions of each record."""
    return [(image_bytes(record), record.captions) for record in load_records(source)]


def image_bytes(record: CaptionRecord) -> bytes:
    file = record.image_file()
    return Path(file).read_bytes() if isinstance(file, str) else file.read()
