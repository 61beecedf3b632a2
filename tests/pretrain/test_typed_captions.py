"""Caption files with any one field of another type train, or are refused by file and record."""

import codecs
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.data.formats import Source, load_records
from pretrain.data.loader import build_train_loader
from pretrain.data.records import Records
from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from tests.pretrain.caption_files import train_set, write_images
from virtex_d2.engine.errors import InputError

OTHERS = [None, True, 3, 7.0, 0.5, 1e400, 10**30, "", "3", "b.jpg", "more", "\ud800"]
OTHERS += [["a"], [None], {}, {"raw": 1}]

COCO = {
    "info": {"year": 2026},
    "images": [
        {"id": 7, "file_name": "b.jpg", "height": 40},
        {"id": 3, "file_name": "more/a.jpg", "height": 40},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": "A dog."},
        {"id": 2, "image_id": 7, "caption": "A cat."},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "",
            "filename": "b.jpg",
            "split": "train",
            "imgid": 0,
            "cocoid": 7,
            "sentences": [{"raw": "A dog.", "tokens": ["a", "dog"], "sentid": 1}],
        },
        {
            "filepath": "more",
            "filename": "a.jpg",
            "split": "train",
            "imgid": 1,
            "cocoid": 3,
            "sentences": [{"raw": "A cat.", "tokens": ["a", "cat"], "sentid": 2}],
        },
    ],
}
FILES = {"coco": COCO, "karpathy": KARPATHY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("typed")
    write_images(folder / "images", ["b.jpg", "more/a.jpg"])
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    train_tokenizer(["A dog.", "A cat."], 13, folder / "tokenizer.model")
    return Tokenizer(folder / "tokenizer.model")


def fields(content: object, place: tuple = ()) -> Iterator[tuple]:
    """Places of everything in nested lists and objects."""
    inside = enumerate(content) if isinstance(content, list) else ()
    for key, value in content.items() if isinstance(content, dict) else inside:
        yield (*place, key)
        yield from fields(value, (*place, key))


def changed(content: dict, place: tuple, value: object) -> dict:
    content = copy.deepcopy(content)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return content


def source(folder: Path, kind: str, content: bytes | str | dict) -> Source:
    path = folder / f"captions.{kind}"
    text = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return Source(kind, str(path), str(folder / "images"), "train" if kind == "karpathy" else "")


def reach_first_batch(source: Source, tokenizer: Tokenizer) -> Records:
    records = load_records(source)
    assert all(type(image_id) in (int, str) for image_id in (r.image_id for r in records))
    dataset = train_set(records, tokenizer, 8, 5)
    batch = next(iter(build_train_loader(dataset, 2)))
    assert len(batch["image"]) == 2
    return records


@pytest.mark.parametrize("kind", FILES)
def test_any_field_of_another_type_trains_or_is_refused_by_file_and_record(folder, tokenizer, kind):
    trained = 0
    for place in fields(FILES[kind]):
        for value in OTHERS:
            given = source(folder, kind, changed(FILES[kind], place, value))
            try:
                reach_first_batch(given, tokenizer)
                trained += 1
            except InputError as error:
                message = str(error)
                assert message.startswith(given.captions), (place, value)
                records = ["images[", "annotations[", ".jpg", "7", "3", "`images`", "`annotations`"]
                records += ["lists no images", "split", "on the disk; the first: "]
                message = message.replace(given.captions, "")
                assert any(record in message for record in records), (place, value, message)
    assert trained > 100  # what is not read may be anything


LOSSLESS = {
    "coco": [
        (("images", 0, "id"), 7.0),
        (("annotations", 0, "image_id"), 3.0),
        (("annotations", 1, "id"), None),
        (("images", 0, "height"), None),
        (("images", 1, "height"), "40"),
        (("info",), None),
    ],
    "karpathy": [
        (("images", 0, "cocoid"), 96.0),
        (("images", 0, "cocoid"), None),
        (("images", 1, "imgid"), None),
        (("images", 0, "filepath"), None),
        (("images", 0, "sentences", 0, "tokens"), None),
        (("dataset",), None),
    ],
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_lossless_trains(folder, tokenizer, kind):
    for place, value in LOSSLESS[kind]:
        given = source(folder, kind, changed(FILES[kind], place, value))
        assert len(reach_first_batch(given, tokenizer)) == 2, (place, value)
    marked = codecs.BOM_UTF8 + json.dumps(FILES[kind]).encode()
    assert len(reach_first_batch(source(folder, kind, marked), tokenizer)) == 2


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("images", 0, "id"), "7", '7. 7 is not "7": one is a text'),
        (("annotations", 0, "image_id"), "3", '"3". "3" is not 3: '),
        (("annotations", 1, "image_id"), " 7", '" 7". " 7" is not 7: '),
        (("annotations", 0, "image_id"), 4, "4. The file is cut short"),
        (("annotations", 0, "image_id"), True, "annotations[0]"),
        (("images", 1, "file_name"), "more/A.JPG", "'more/a.jpg' is there, for 'more/A.JPG'"),
        (("images", 0, "file_name"), "train/b.jpg", "'b.jpg' is there, for 'train/b.jpg'"),
        (("images", 0, "file_name"), "b.png", "'b.jpg' is there, for 'b.png'"),
        (("images", 0, "file_name"), "00b.jpg", "'b.jpg' is there, for '00b.jpg'"),
        (("images", 0, "file_name"), "c.jpg", "Check the folder of images"),
    ],
)
def test_ids_and_names_that_nearly_match_are_compared_before_advising(
    folder, place, value, message
):
    with pytest.raises(InputError) as caught:
        load_records(source(folder, "coco", changed(COCO, place, value)))
    assert message in str(caught.value)


CELLS = ["", " ", "3", "0.5", "null", "NaN", "true", "[]", "{}", "b.jpg", '"', '"x', "'", ";"]
CELLS += [",", "\t", "\n", "\0", "\ufeff", "caption", "x" * 5000, "./b.jpg", "http://a/b.jpg"]


@pytest.mark.parametrize("header", [[], [["image", "caption"]]], ids=["plain", "with header"])
@pytest.mark.parametrize(("kind", "separator"), [("csv", ","), ("tsv", "\t"), ("flickr", ",")])
def test_any_cell_of_a_table_trains_or_is_refused_by_file_and_row(
    folder, tokenizer, kind, separator, header
):
    rows = [*header, ["b.jpg", "A dog."], ["more/a.jpg", "A cat."], ["b.jpg", "A dog, a cat."]]
    if kind == "csv":
        rows[-1][1] = '"A dog, a cat."'
    trained = 0
    for place in ((row, column) for row in range(len(rows)) for column in range(2)):
        for value in CELLS:
            lines = [
                separator.join(row)
                for row in changed({"rows": rows}, ("rows", *place), value)["rows"]
            ]
            given = source(folder, kind, "\n".join(lines))
            try:
                reach_first_batch(given, tokenizer)
                trained += 1
            except InputError as error:
                message = str(error)
                assert message.startswith(given.captions), (place, value)
                found = (", line ", "first row", "of its", "column", "lists no images")
                assert any(words in message for words in found), (place, value, message)
    assert trained > 20
