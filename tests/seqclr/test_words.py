"""Sets of words in their published layouts, each laid out by hand; what is refused, and how."""

import io
import logging
import os
import re
import shutil
import sys

import lmdb
import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pretrain.config import get_pretrain_cfg
from pretrain.data.loader import Samples, TrainSet, build_train_loader
from pretrain.data.records import MixedRecords
from pretrain.methods.seqclr.words import open_words, read_words, word_sets
from virtex_d2.engine.errors import InputError


def png(path, gray=100, size=(20, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, gray).save(path)


def pairs(path, other=""):
    """(file below the test's folder, label or None) of a path that holds one set."""
    (found,) = read_words(path, other)
    return [(r.file_name, *(r.captions or [None])) for r in found.records], found.layout


def lists(tmp_path, text, *images, name="list.txt", encoding="utf-8"):
    for image in images:
        png(tmp_path / image)
    (tmp_path / name).write_bytes(text.encode(encoding))
    return tmp_path / name


def labels(path, other=""):
    found, layout = pairs(path, other)
    return [label for _, label in found], layout


# A row per layout

LISTS = {
    "tab, labels with blanks and quotes": (
        'a b.png\tNew York\nc.png\t"x"\n',
        ["a b.png", "c.png"],
        ["New York", '"x"'],
        "list",
    ),
    "first blank": (
        "a.png Caf\u00e9 noir\r\nb.png x\r\n",
        ["a.png", "b.png"],
        ["Caf\u00e9 noir", "x"],
        "list",
    ),
    "paths alone": ("a.png\nb.png\n", ["a.png", "b.png"], [None, None], "list"),
    "RIMES: byte order mark, a line without label": (
        "\ufefflot_1/a.tiff chapitre \nlot_1/b.tiff \nlot_1/c.tiff l'\u00e9t\u00e9\n",
        ["lot_1/a.tiff", "lot_1/b.tiff", "lot_1/c.tiff"],
        ["chapitre", None, "l'\u00e9t\u00e9"],
        "list",
    ),
    "JSON lines": (
        '{"filename": "a.png", "text": "x y"}\n{"filename": "b.png", "text": ""}\n'
        '{"filename": "c.png"}\n',
        ["a.png", "b.png", "c.png"],
        ["x y", None, None],
        "json lines",
    ),
    "ICDAR 2013: byte order mark, escaped quotes": (
        '\ufeffword_1.png, "Tiredness"\nword_2.png, "\\"kills"\nword_3.png, "A, b"\n',
        ["word_1.png", "word_2.png", "word_3.png"],
        ["Tiredness", '"kills', "A, b"],
        "icdar",
    ),
    "MJSynth with places": (
        "./2425/1/115_Lube_45484.jpg 45484\n./2425/1/9_it's_5.jpg 5\n",
        ["2425/1/115_Lube_45484.jpg", "2425/1/9_it's_5.jpg"],
        ["Lube", "it's"],
        "mjsynth",
    ),
    "MJSynth without": ("./1/2_Ab_3.jpg\n", ["1/2_Ab_3.jpg"], ["Ab"], "mjsynth"),
}


@pytest.mark.parametrize(("text", "images", "expected", "layout"), LISTS.values(), ids=LISTS)
def test_a_list_is_told_by_its_content(tmp_path, text, images, expected, layout):
    found, told = pairs(lists(tmp_path, text, *images))
    assert found == [(str(tmp_path / i), label) for i, label in zip(images, expected)]
    assert told == layout


def test_images_of_a_list_may_lie_elsewhere(tmp_path):
    png(tmp_path / "images/a.png")
    path = lists(tmp_path, "a.png x\n")
    assert pairs(path, tmp_path / "images")[0] == [(str(tmp_path / "images/a.png"), "x")]


def database(folder, entries):
    environment = lmdb.open(str(folder), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    environment.close()
    return folder


def encoded(gray=100, size=(20, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, (gray, gray, gray)).save(stream, "png")
    return stream.getvalue()


LABELLED = {
    "image-000000001": encoded(10),
    "image-000000002": encoded(20),
    "label-000000001": "Caf\u00e9".encode(),
    "label-000000002": b"b c",
    "num-samples": b"2",
}


def test_lmdb_with_labels(tmp_path):
    (found,) = read_words(database(tmp_path / "set", LABELLED))
    assert [r.captions for r in found.records] == [("Caf\u00e9",), ("b c",)]
    assert [r.image_id for r in found.records] == ["image-000000001", "image-000000002"]
    grays = [Image.open(r.image_file()).getpixel((0, 0))[0] for r in found.records]
    assert (grays, found.layout) == ([10, 20], "lmdb")


def test_lmdb_without_labels_stays_without(tmp_path):
    for name, label in {"none": None, "phrase": b"unlabeled_data", "empty": b""}.items():
        entries = {**LABELLED, "label-000000001": label, "label-000000002": label}
        entries = {key: value for key, value in entries.items() if value is not None}
        (found,) = read_words(database(tmp_path / name, entries))
        assert [r.captions for r in found.records] == [(), ()]
        assert found.num_labelled == 0


def test_nested_lmdbs_are_sets_of_their_own(tmp_path):
    for name in ("MJ/train", "ST"):
        (tmp_path / name).mkdir(parents=True)
        database(tmp_path / name, LABELLED)
    assert [found.name for found in read_words(tmp_path)] == [
        str(tmp_path / name) for name in ("MJ/train", "ST")
    ]


def test_iiit5k_in_both_of_its_files(tmp_path):
    for name in ("test/1_1.png", "test/2_1.png"):
        png(tmp_path / name)
    kinds = {"testdata": ("GroundTruth", "smallLexi"), "testCharBound": ("chars", "charBB")}
    for variable, (label, other) in kinds.items():
        rows = np.zeros((1, 2), [(key, object) for key in ("ImgName", label, other)])
        rows[0, 0] = ("test/1_1.png", "PRIVATE", np.zeros((7, 4)))
        rows[0, 1] = ("test/2_1.png", "Kitchen", np.zeros((7, 4)))
        scipy.io.savemat(tmp_path / f"{variable}.mat", {variable: rows})
        assert pairs(tmp_path / f"{variable}.mat") == (
            [
                (str(tmp_path / "test/1_1.png"), "PRIVATE"),
                (str(tmp_path / "test/2_1.png"), "Kitchen"),
            ],
            "iiit5k",
        )


IAM = """\
#--- words.txt ---------------------------------------------------------------#
#
# format: a01-000u-00-00 ok 154 1 408 768 27 51 AT A
#
a01-000u-00-00 ok 154 408 768 27 51 AT A
a01-000u-00-01 ok 154 507 766 213 48 NN MOVE
a01-000u-01-00 err 154 796 764 70 50 TO to one
b02-045-00-00 ok 182 -1 -1 5 5 , #
"""


@pytest.fixture
def iam(tmp_path):
    for name in ("a01/a01-000u/a01-000u-00-00", "a01/a01-000u/a01-000u-00-01"):
        png(tmp_path / f"words/{name}.png")
    png(tmp_path / "words/a01/a01-000u/a01-000u-01-00.png")
    png(tmp_path / "words/b02/b02-045/b02-045-00-00.png")
    (tmp_path / "ascii").mkdir()
    (tmp_path / "ascii/words.txt").write_text(IAM)
    return tmp_path


def test_iam(iam):
    found, layout = pairs(iam / "ascii/words.txt")
    assert [label for _, label in found] == ["A", "MOVE", "to one", "#"]
    assert found[1][0].endswith("words/a01/a01-000u/a01-000u-00-01.png")
    assert layout == "iam"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("b02-045\n", ["#"]),  # forms: *.uttlist
        ("a01-000u-00\n", ["A", "MOVE"]),  # lines
        ("a01-000u-00-01,154 MOVE\na01-000u-01-00,154 to\n", ["MOVE", "to one"]),  # words: RWTH
    ],
)
def test_a_list_of_ids_takes_a_part_of_iam(iam, split, expected):
    (iam / "split.uttlist").write_text(split)
    assert labels(iam / "ascii/words.txt", iam / "split.uttlist")[0] == expected


def test_cvl_has_its_labels_in_the_names(tmp_path):
    names = [
        "0001-1-0-0-Imagine.tif",
        "0001-1-0-1-a.tif",
        "0001-6-12-3-f\u00fcr.tif",
        "0001-1-0-00-.tif",
    ]
    for name in names:
        png(tmp_path / "trainset/words/0001" / name)
    found, layout = labels(tmp_path / "trainset")
    assert (found, layout) == (["Imagine", None, "a", "f\u00fcr"], "cvl")


def test_images_alone_have_no_labels(tmp_path):
    png(tmp_path / "a.png")
    png(tmp_path / "deep/b.png")
    assert labels(tmp_path) == ([None, None], "images")


def test_icdar_2003_words(tmp_path):
    png(tmp_path / "word/1/1.jpg")
    text = (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<imagelist>\n'
        '<image file="word/1/1.jpg" tag="R &amp; D" />\n'
        '<image file="word/1/1.jpg" tag="\u00a37" />\n</imagelist>\n'
    )
    path = lists(tmp_path, text, name="word.xml", encoding="latin-1")
    image = str(tmp_path / "word/1/1.jpg")
    assert pairs(path) == ([(image, "R & D"), (image, "\u00a37")], "icdar 2003")


def scene(path):
    """100 x 50, black; with the gray 200 in the box from (10, 20) to (40, 30)."""
    image = np.zeros((50, 100), np.uint8)
    image[20:30, 10:40] = 200
    Image.fromarray(image).save(path)


def test_words_of_scenes_are_cut_out_of_them(tmp_path):
    scene(tmp_path / "a.png")
    text = (
        "<tagset><image><imageName>a.png</imageName><taggedRectangles>"
        '<taggedRectangle x="10.0" y="20.0" width="30" height="10" offset="0"><tag>self</tag>'
        '</taggedRectangle><taggedRectangle x="60" y="0" width="10" height="20"><tag>x</tag>'
        "</taggedRectangle></taggedRectangles></image></tagset>"
    )
    (found,) = read_words(lists(tmp_path, text, name="locations.xml"))
    assert [r.captions for r in found.records] == [("self",), ("x",)]
    assert [r.image_id for r in found.records] == ["a.png#1", "a.png#2"]
    first, second = (np.asarray(Image.open(r.image_file())) for r in found.records)
    assert (first.shape, first.min(), second.shape, second.max()) == (
        (10, 30, 3),
        200,
        (20, 10, 3),
        0,
    )


def test_words_of_synthtext_are_cut_out_and_turned_upright(tmp_path):
    scene(tmp_path / "a.png")
    png(tmp_path / "b.png")
    upright = [[10, 40, 40, 10], [20, 20, 30, 30]]  # x and y of the four corners
    turned = [[40, 40, 10, 10], [20, 30, 30, 20]]  # the word runs down
    boxes = np.stack([upright, turned], axis=2)  # (2, 4, words)
    texts = [np.array(["to\nbe "], object), np.array(["x"], object)]
    content = {
        "imnames": ["a.png", "b.png"],
        "wordBB": [boxes, np.array(upright, float)],
        "txt": texts,
    }
    content = {key: _cells(value) for key, value in content.items()}
    scipy.io.savemat(tmp_path / "gt.mat", {**content, "charBB": np.zeros(1)})
    (found,) = read_words(tmp_path / "gt.mat")
    assert [r.captions for r in found.records] == [("to",), ("be",), ("x",)]
    shapes = [np.asarray(Image.open(r.image_file())).shape for r in found.records]
    assert shapes == [(10, 30, 3), (30, 10, 3), (10, 30, 3)]
    assert np.asarray(Image.open(found.records[1].image_file())).min() == 200
    kept = found.records.select(np.array([1]), np.ones(3, bool))
    assert (kept[0].captions, kept[0].content) == (("be",), found.records[1].content)


def _cells(values):
    cells = np.empty((1, len(values)), object)
    cells[0, :] = [v if isinstance(v, str) else None for v in values]
    for place, value in enumerate(values):
        cells[0, place] = value
    return cells


def test_iiit5k_as_it_is_here(real_data):
    there = (real_data / "iiit5k").is_dir()
    if not there and os.environ.get("REQUIRE_REAL_DATA") != "1":
        pytest.skip(f"no iiit5k in {real_data}")
    sets = [read_words(real_data / "iiit5k" / f"{part}.txt")[0] for part in ("train", "test")]
    assert [(len(s.records), s.num_labelled) for s in sets] == [(2000, 2000), (2000, 2000)]
    assert {letter for s in sets for r in s.records for letter in r.captions[0]} <= set(
        "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    )


# What is refused


def refused(path, *said, other=""):
    with pytest.raises(InputError) as caught:
        read_words(path, other)
    for text in said:
        assert text in str(caught.value)


def test_an_lmdb_that_is_cut_short(tmp_path):
    folder = database(tmp_path / "set", {**LABELLED, "label-000000009": b"x" * 200_000})
    data = (folder / "data.mdb").read_bytes()
    for size, said in {
        len(data) - 100_000: "cut short",
        9000: "cut short",
        50: "cannot be read",
    }.items():
        copy = tmp_path / f"copy_{size}"
        copy.mkdir()
        (copy / "data.mdb").write_bytes(data[:size])
        refused(copy, str(copy / "data.mdb"), said, "again")


def test_an_lmdb_under_two_names_is_opened_once(tmp_path):
    folder = database(tmp_path / "set", LABELLED)
    (tmp_path / "link").symlink_to(folder)
    sets = [read_words(path)[0].records for path in (folder, tmp_path / "link")]
    one, other = ([r.image_file().read() for r in records] for records in sets)
    assert one == other == [LABELLED["image-000000001"], LABELLED["image-000000002"]]


def test_an_lmdb_without_its_number_or_with_fewer_images(tmp_path):
    without = {key: value for key, value in LABELLED.items() if key != "num-samples"}
    refused(database(tmp_path / "a", without), "num-samples", "found none")
    refused(database(tmp_path / "b", {**LABELLED, "num-samples": b"two"}), "found b'two'")
    more = database(tmp_path / "c", {**LABELLED, "num-samples": b"3"})
    refused(more, "num-samples is 3", "2 of these images")
    gap = {key: value for key, value in LABELLED.items() if key != "image-000000001"}
    refused(database(tmp_path / "d", gap), "1 of these images", "image-000000001 is missing")
    refused(database(tmp_path / "e", {"num-samples": b"0"}), "num-samples is 0")
    refused(database(tmp_path / "f", {**LABELLED, "num-samples": b"9" * 18}), "2 of these images")


def test_lmdbs_need_their_package(tmp_path, monkeypatch):
    folder = database(tmp_path / "set", LABELLED)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    refused(folder, "needs the package lmdb", "pip install -r requirements-words.txt")


def test_a_folder_whose_labels_would_be_lost(tmp_path):
    lists(tmp_path, "a.png x\n", "a.png", name="test.txt")
    refused(tmp_path, str(tmp_path), "the lists test.txt", "Name one of them")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["is empty"]),
        ("hello world\n", ["its first line is 'hello world'", "path of an image"]),
        ("absent.png x\n", ["1 of its 1 images are not on the disk", "absent.png"]),
        ('{"filename": "a.png", "text": 7}\n', ["line 1", "one of them is no text"]),
        ('{"filename": "a.png"\n', ["line 1", "expected JSON"]),
        ("./1/2_Ab_3.jpg 4\n", ["line 1", "number 3 of the lexicon, the line 4"]),
        ('word_1.png, "a"\nword_2.png b\n', ["line 2", 'expected word_1.png, "word"']),
        ('{"filename": "a.png"}\na.png x\n', ["line 2", "expected JSON"]),
        ("<imagelist><image file='a.png'", ["is not XML"]),
        ("<a/>", ["expected elements <image file= tag=>"]),
        (
            "<t><image><imageName>a</imageName><taggedRectangle x='1'/></image></t>",
            ["rectangle 1 of a needs the numbers"],
        ),
        (IAM + "a01-000u-00-02 ok 154\n", ["line 9", "nine fields"]),
        (IAM, ["expected IAM's images in the folder"]),
    ],
)
def test_a_list_that_cannot_be(tmp_path, text, said):
    path = lists(tmp_path, text, "a.png")
    refused(path, str(path), *said)


def test_other_paths_that_do_not_belong(tmp_path, iam):
    path = lists(tmp_path, "a.png x\n", "a.png")
    refused(path, "neither a folder of images nor a list", other=tmp_path / "nowhere")
    refused(path, "only IAM's words.txt takes a list", other=path)
    refused(database(tmp_path / "set", LABELLED), "of the layout lmdb", other=tmp_path / "words")
    words = iam / "ascii/words.txt"
    (iam / "split").write_text("a01-000u\nz99-999\n")
    refused(words, "1 ids are not in", "z99-999", other=iam / "split")
    (iam / "split").write_text("trainset\n")
    refused(words, "line 1", "the id of one of IAM's forms", other=iam / "split")


def test_matlab_files_that_cannot_be(tmp_path):
    scipy.io.savemat(tmp_path / "other.mat", {"x": np.zeros(3)})
    refused(tmp_path / "other.mat", "traindata", "wordBB", "found x")
    whole = (tmp_path / "other.mat").read_bytes()
    (tmp_path / "cut.mat").write_bytes(whole[:150])
    refused(tmp_path / "cut.mat", "cannot be read as a MATLAB file")
    png(tmp_path / "a.png")
    content = {"imnames": _cells(["a.png"]), "wordBB": _cells([np.zeros((2, 4, 3))])}
    scipy.io.savemat(tmp_path / "gt.mat", {**content, "txt": _cells([np.array(["a b"], object)])})
    refused(tmp_path / "gt.mat", "a.png has 2 words in `txt` and 3 boxes")


def test_both_parts_of_cvl_at_once(tmp_path):
    for part in ("trainset", "testset"):
        png(tmp_path / part / "words/0001-1-0-0-x.tif")
    refused(tmp_path, "holds CVL's trainset and testset")


word = st.text(
    st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp"), blacklist_characters="\ufeff"),
    min_size=1,
).filter(lambda text: text == text.strip())


@given(labels=st.lists(word, min_size=1, max_size=4))
def test_any_label_behind_a_tab_comes_back(tmp_path_factory, labels):
    folder = tmp_path_factory.mktemp("list")
    png(folder / "a.png")
    path = folder / "list.txt"
    path.write_bytes("".join(f"a.png\t{label}\n" for label in labels).encode())
    assert [r.captions for r in read_words(path)[0].records] == [(label,) for label in labels]
    shutil.rmtree(folder)


# From the config to batches


def config(**data):
    cfg = get_pretrain_cfg()
    for key, value in data.items():
        cfg.DATA[key] = value
    return cfg


def test_entries_of_the_config(tmp_path):
    path = str(lists(tmp_path, "a.png x\nb.png y\n", "a.png", "b.png"))
    folder = str(database(tmp_path / "set", LABELLED))
    joined = open_words(config(WORDS=[path, [folder]]), train=True)
    assert [r.captions[0] for r in joined] == ["x", "y", "Caf\u00e9", "b c"]
    assert [joined.part_of(i) for i in range(4)] == [0, 0, 1, 1]
    mixed = open_words(config(WORDS=[[3, path], [1.0, folder]]), train=True)
    assert isinstance(mixed, MixedRecords)
    assert mixed.weights == (3, 1.0)
    assert [len(part) for part in word_sets(mixed)] == [2, 2]
    assert open_words(config(WORDS=[path]), train=False) is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"WORDS": [3]}, "DATA.WORDS[0]: expected a path"),
        ({"WORDS": [["a", "b", "c"]]}, "DATA.WORDS[0]"),
        ({"WORDS": [[1, "a"], "b"]}, "for all sets of DATA.WORDS, or for none"),
        ({"VAL_WORDS": [[1, "a"]]}, "for none of them"),
        ({"WORDS": ["a"], "TRAIN_IMAGES": "b"}, "both name data"),
        ({"VAL_WORDS": ["a"], "VAL_CAPTIONS": "b"}, "both name data"),
        ({"WORDS": ["nowhere"]}, "nowhere: expected a file, found nothing"),
    ],
)
def test_entries_that_cannot_be(data, said):
    with pytest.raises(InputError, match=re.escape(said)):
        open_words(config(**data), train="WORDS" in data)


def test_fractions_are_nested(tmp_path):
    names = [f"{number}.png" for number in range(20)]
    path = str(lists(tmp_path, "".join(f"{n} {n[:-4]}\n" for n in names), *names))

    def taken(**data):
        return [r.captions[0] for r in open_words(config(WORDS=[path], **data), train=True)]

    few, some = taken(FRACTION=0.1), taken(FRACTION=0.5)
    assert (len(few), len(some)) == (2, 10)
    assert set(few) < set(some)
    assert set(taken(FRACTION=0.5, SUBSET_SEED=1)) != set(some)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_engines_loader_reads_lmdbs_and_replaces_broken_images(tmp_path, caplog, workers):
    entries = {f"image-{n:09d}": encoded(n) for n in range(1, 7)}
    entries |= {"image-000000003": b"no image", "num-samples": b"6"}
    records = open_words(config(WORDS=[str(database(tmp_path / "set", entries))]), train=True)
    assert records[0].image_file().read() == entries["image-000000001"]  # open before the fork
    samples = Samples(config(IMAGE_SIZE=8, COLOR_JITTER_PROB=0.0))
    with caplog.at_level(logging.WARNING):
        loader = iter(
            build_train_loader(TrainSet(records, samples, seed=5), 6, num_workers=workers)
        )
        batch = next(loader)
    grays = [int(image[0, 0, 0]) for image in batch["image"]]
    assert set(grays) == {1, 2, 4, 5, 6}
    assert len(grays) == 6
    assert batch["skipped_files"] == [str(tmp_path / "set/image-000000003")]
    assert torch.equal(batch["image"].amax((1, 2, 3)), batch["image"].amin((1, 2, 3)))
