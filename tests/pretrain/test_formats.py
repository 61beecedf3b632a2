"""One content in every format; and each format as users have it, damaged."""

import itertools
import os
import re
from pathlib import Path

import pytest
import torch

from pretrain.data.formats import FORMATS, IMAGES_ALONE, Source, load_records
from pretrain.data.loader import build_train_loader
from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from tests.pretrain.caption_files import (
    CAPTIONS,
    contents,
    train_set,
    write_all,
    write_csv,
    write_images,
)
from virtex_d2.engine.errors import InputError


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Source]:
    return write_all(tmp_path_factory.mktemp("formats"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(list(itertools.chain(*CAPTIONS.values())), 55, path)
    return Tokenizer(path)


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", ["a.jpg", "b.jpg"])


def batches(source: Source, tokenizer: Tokenizer) -> list[dict]:
    dataset = train_set(load_records(source), tokenizer, 16, 5)
    return list(itertools.islice(build_train_loader(dataset, 4), 5))


def assert_refused(source: Source, *messages: str) -> str:
    with pytest.raises(InputError) as caught:
        load_records(source)
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


def table(folder: Path, content: str | bytes, kind: str = "csv") -> Source:
    path = folder / f"captions.{kind}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source(kind, str(path), str(folder / "images"))


# All formats


def test_every_format_is_among_those_that_are_compared(sources):
    assert {source.format for source in sources.values()} == set(FORMATS) - {IMAGES_ALONE}


def test_every_format_gives_the_same_pixels_and_tokens(sources, tokenizer):
    expected = batches(sources["coco"], tokenizer)
    assert sum(len(batch["image"]) for batch in expected) == 20
    for name, source in sources.items():
        for batch, wanted in zip(batches(source, tokenizer), expected, strict=True):
            assert torch.equal(batch["image"], wanted["image"]), name
            assert torch.equal(batch["caption_tokens"], wanted["caption_tokens"]), name


def test_every_format_keeps_captions_to_the_letter(sources):
    for name, source in sources.items():
        assert [texts for _, texts in contents(source)] == [
            tuple(texts) for texts in CAPTIONS.values()
        ], name


def test_a_captions_path_of_the_wrong_kind_is_refused_by_name(sources, tmp_path):
    for source in sources.values():
        wrong = str(tmp_path)
        if source.format == "folder":
            wrong = str(tmp_path / "file")
            Path(wrong).touch()
        split = source.split if source.format == "karpathy" else ""
        assert_refused(
            Source(source.format, wrong, source.images, split, str(tmp_path / "index")), wrong
        )


def test_a_file_as_folder_of_images_is_refused_by_name(sources):
    for source in sources.values():
        if source.images:
            wrong = Source(source.format, source.captions, source.captions, source.split)
            assert_refused(wrong, source.captions, "expected the folder", "found a file")


def test_unknown_formats_are_refused_with_the_nearest(tmp_path):
    for wrong, near in (("web-dataset", "webdataset"), ("Karpathy", "karpathy"), ("cvs", "csv")):
        assert_refused(Source(wrong, "x"), "DATA.FORMAT", repr(wrong), f"Did you mean '{near}'?")


def test_a_split_where_there_are_none_is_refused(sources):
    source = sources["coco"]
    assert_refused(Source("coco", source.captions, source.images, "train"), "'train'", "karpathy")


# Karpathy's splits


@pytest.mark.parametrize("split", ["", "trian", "train+", "train+val"])
def test_a_split_without_images_is_refused_with_those_that_are_there(sources, split):
    source = sources["karpathy"]
    wrong = Source("karpathy", source.captions, source.images, split)
    assert_refused(wrong, "karpathy.json", "train (3 images), restval (2 images), test (1 images)")


def test_a_split_alone_has_its_images_in_order(sources):
    source = sources["karpathy"]
    records = load_records(Source("karpathy", source.captions, source.images, "restval"))
    assert [record.image_id for record in records] == [1, 3]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"raw": "six"', '"raw": " "', "images[2]"),
        ('"split": "restval"', '"part": "restval"', "images[1]"),
        ('"imgid": 3', '"imgid": 2', "2. Give each image an id"),
        ('"filename": "c.jpg"', '"filename": "gone.jpg"', "images/gone.jpg"),
        ('{"raw": "ten eleven", "tokens": []}', "", "images[4]"),
    ],
)
def test_damaged_karpathy_files_are_refused_by_the_record(sources, tmp_path, old, new, message):
    source = sources["karpathy"]
    content = Path(source.captions).read_text()
    assert content.count(old) >= 1
    (tmp_path / "k.json").write_text(content.replace(old, new))
    wrong = Source("karpathy", str(tmp_path / "k.json"), source.images, "train+restval")
    assert_refused(wrong, "k.json", message)


# Flickr


@pytest.mark.parametrize("file", ["captions.txt", "flickr.token", "results.csv"])
def test_a_list_of_names_selects_images_with_or_without_their_suffix(sources, tmp_path, file):
    folder = Path(sources["flickr csv"].captions).parent
    for listed in ("a/2.png\nc.jpg\n", "c\r\na/2"):
        (tmp_path / "split.txt").write_text(listed)
        split = str(tmp_path / "split.txt")
        records = load_records(Source("flickr", str(folder / file), str(folder / "images"), split))
        assert [record.image_id for record in records] == ["a/2.png", "c.jpg"]


def test_a_list_that_names_unknown_images_is_refused(sources, tmp_path):
    source = sources["flickr token"]
    (tmp_path / "split.txt").write_text("c.jpg\nd.jpg\n")
    wrong = Source("flickr", source.captions, source.images, str(tmp_path / "split.txt"))
    assert_refused(wrong, "split.txt", "1 of its 2 images", "d.jpg", source.captions)
    (tmp_path / "split.txt").write_text("\n")
    assert_refused(wrong, "split.txt", "found none")


def test_the_published_line_without_its_bar_is_read(tmp_path, images):
    rows = "image_name| comment_number| comment\na.jpg| 0| A dog .\na.jpg| 4   A dog runs .\n"
    source = Source("flickr", table(tmp_path, rows).captions, str(images))
    (record,) = load_records(source)
    assert record.captions == ("A dog .", "A dog runs .")


@pytest.mark.parametrize(
    ("content", "line"),
    [("a.jpg#0\tA dog\nb.jpg 0 A cat\n", 2), ("a.jpg| 0| A dog\n\nb.jpg\n", 3)],
)
def test_a_line_of_another_layout_is_refused_by_its_number(tmp_path, images, content, line):
    source = Source("flickr", table(tmp_path, content).captions, str(images))
    assert_refused(source, f"captions.csv, line {line}: expected", "found 'b.jpg")


def test_unquoted_commas_of_flickr8k_belong_to_the_caption(tmp_path, images):
    source = table(tmp_path, "image,caption\na.jpg,A dog, a cat , and I .\nb.jpg,B\n")
    records = load_records(Source("flickr", source.captions, str(images)))
    assert records[0].captions == ("A dog, a cat , and I .",)


def test_headers_of_flickr_tables_are_read_by_name_as_in_csv(tmp_path, images):
    quoted = 'a.jpg,0,"A dog, a cat"\nb.jpg,1,B\n'
    unquoted = "a.jpg,0,A dog, a cat\nb.jpg,1,B\n"
    ends = 'a.jpg,"A dog, a cat",0\nb.jpg,B,1\n'
    for header, rows in (
        ("image_name,comment_number,comment", quoted),
        ("Image,Number,Caption", unquoted),
        ("image,caption,id", ends),
    ):
        source = table(tmp_path, f"{header}\n{rows}")
        records = load_records(Source("flickr", source.captions, str(images)))
        assert [record.captions for record in records] == [("A dog, a cat",), ("B",)]


@pytest.mark.parametrize("number", ["0", " 12 "])
def test_a_number_where_a_flickr_caption_should_begin_is_refused(tmp_path, images, number):
    source = table(tmp_path, f"a.jpg,A dog\nb.jpg,{number},A cat\n")
    wrong = Source("flickr", source.captions, str(images))
    assert_refused(wrong, "line 2", "three columns with a number as the second", "header line")
    source = table(tmp_path, "a.jpg,2 dogs, 3 cats\n")
    (record,) = load_records(Source("flickr", source.captions, str(images)))
    assert record.captions == ("2 dogs, 3 cats",)


# Tables


@pytest.mark.parametrize(
    ("rows", "messages"),
    [
        ("image_id,caption\na.jpg,A\n", ["'image_id'", "header", "file_name", "description"]),
        ("image,bildtext\na.jpg,A\n", ["'bildtext'", "not understood", "DATA.CAPTION_KEY"]),
        ("bild,unterschrift\na.jpg,A\n", ["'unterschrift'", "not understood"]),
        ("id,image_id,caption\n0,a.jpg,A\n", ["'id', 'image_id'", "not understood"]),
        ("image;caption\na.jpg;A\n", ["parted by semicolons"]),
        ("a.jpg;A\nb.jpg;B\n", ["parted by semicolons"]),
        ("image|caption\na.jpg|A\n", ["parted by bars"]),
        ("image\tcaption\na.jpg\tA\n", ["parted by tabs"]),
        ("A dog,http://host/1.jpg\nB,http://host/2.jpg", ["Conceptual Captions' layout"]),
        ("image,caption,title\na.jpg,A,B\n", ["caption, title", "DATA.CAPTION_KEY"]),
        ("image,caption,caption\na.jpg,A,B\n", ["caption, caption"]),
    ],
)
def test_a_first_row_of_another_layout_is_named_for_what_it_is(tmp_path, images, rows, messages):
    assert_refused(table(tmp_path, rows), "captions.csv", *messages)


def test_a_table_in_the_wrong_folder_is_not_taken_for_one_with_a_header(tmp_path, images):
    for rows in ("c.jpg,A\nd.jpg,B\n", "image,caption\nc.jpg,A\nd.jpg,B\n"):
        assert_refused(table(tmp_path, rows), "2 of its 2 images", "Check the folder of images")
    assert_refused(table(tmp_path, "A,dog\nb,cat\n"), "'a.jpg' is there, for 'A'")


def test_the_captions_column_can_be_named(tmp_path, images):
    rows = "image,caption,Title\na.jpg,A,one\nb.jpg,B,two\n"
    given = table(tmp_path, rows)
    for kind in ("csv", "flickr"):
        for key, first in (("title", "one"), ("caption", "A")):
            records = load_records(Source(kind, given.captions, given.images, caption_key=key))
            assert records[0].captions == (first,)
    wrong = Source("csv", given.captions, given.images, caption_key="text")
    assert_refused(wrong, "no column is called 'text'", "'Title'")
    assert_refused(Source("coco", "c.json", "images", caption_key="text"), "'text'", "tsv")


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        ('a.jpg\t"A dog"\nb.jpg\t"B"\n', "caption is in quotes"),
        ("a.jpg\t['A dog']\nb.jpg\t['B']\n", "caption is in brackets"),
        ("./a.jpg\tA\n./b.jpg\tB\n", "image path is behind ./"),
        ("a.jpg\t3\nb.jpg\t14\n", "caption is a number"),
        ('a.jpg\t"A" dog\nb.jpg\tB\n', ""),
    ],
)
def test_what_stands_around_every_cell_is_warned_of(tmp_path, images, caplog, rows, warning):
    load_records(table(tmp_path, rows, "tsv"))
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)


def test_quotes_commas_and_line_ends_in_cells_are_the_captions(tmp_path, images):
    texts = ['say "hi", dog', "one\ntwo\r\nthree", ",", "'", '"', "tab\there", "a\u2028b"]
    source = table(tmp_path, "")
    write_csv(Path(source.captions), [("a.jpg", text) for text in texts])
    (record,) = load_records(source)
    assert record.captions == tuple(texts)


def test_a_tab_table_takes_quotes_as_they_are(tmp_path, images):
    source = table(tmp_path, 'a.jpg\t"A" dog\nb.jpg\t"\n', "tsv")
    assert [record.captions for record in load_records(source)] == [('"A" dog',), ('"',)]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        (["a.jpg,A", "b.jpg", "b.jpg,B"], 2, "expected 2 columns, found 1"),
        (["a.jpg,A", "", "b.jpg,B,C"], 3, "expected 2 columns, found 3"),
        (["image,caption", "a.jpg,A", "b.jpg, "], 3, "the caption is blank"),
        (["a.jpg,A", ",B"], 2, "the image path is blank"),
        (["url,caption,filepath", "x,A,a.jpg", "x,B"], 3, "expected 3 columns, found 2"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_that_cannot_be_used_is_refused_by_its_line(
    tmp_path, images, kind, rows, line, message, end
):
    content = end.join(rows)
    if kind == "tsv":
        content = content.replace(",", "\t")
    assert_refused(table(tmp_path, content, kind), f"captions.{kind}, line {line}: ", message)


def test_lines_are_counted_where_cells_span_several(tmp_path, images):
    assert_refused(table(tmp_path, 'a.jpg,"A\nB\nC"\nb.jpg\n'), "line 4")
    assert_refused(table(tmp_path, 'a.jpg,A\nb.jpg,"B\nC\nD'), "line 2", "not CSV", "double quotes")
    assert_refused(table(tmp_path, "a.jpg," + "x" * 200_000), "line 1", "field limit")


@pytest.mark.parametrize("content", ["", "\n\n", "image,caption\n"])
def test_an_empty_table_is_refused(tmp_path, images, content):
    assert_refused(table(tmp_path, content), "captions.csv", "lists no images")


def test_bytes_that_are_not_utf8_are_refused_by_their_line(tmp_path, images):
    for kind, separator in (("csv", b","), ("tsv", b"\t")):
        content = b"a.jpg%sA\nb.jpg%scaf\xe9\n" % (separator, separator)
        assert_refused(table(tmp_path, content, kind), "line 2: expected UTF-8", "0xe9", "iconv")
    (tmp_path / "c.json").write_bytes(b'{"images": [],\n"annotations": ["\xff"]}')
    assert_refused(Source("coco", str(tmp_path / "c.json"), "x"), "c.json, line 2", "0xff")


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, images):
    source = table(tmp_path, b"\xef\xbb\xbfa.jpg,A\r\nb.jpg,B\r\n")
    assert [record.image_id for record in load_records(source)] == ["a.jpg", "b.jpg"]


def test_absent_images_of_a_table_are_refused_by_name(tmp_path, images):
    source = table(tmp_path, "a.jpg,A\ngone/c.jpg,C\n")
    assert_refused(source, "1 of its 2 images", f"{images}/gone/c.jpg")


def test_a_row_of_an_image_given_before_adds_a_caption(tmp_path, images):
    records = load_records(table(tmp_path, "b.jpg,1\na.jpg,2\nb.jpg,3\n"))
    assert [(r.image_id, r.captions) for r in records] == [("b.jpg", ("1", "3")), ("a.jpg", ("2",))]


# Folders


def test_an_image_without_text_and_a_text_without_image_are_refused_by_name(tmp_path):
    write_images(tmp_path, ["a.jpg", "more/b.jpg"])
    (tmp_path / "a.txt").write_text("A\n")
    source = Source("folder", str(tmp_path))
    assert_refused(source, "1 images have no text", "more/b.jpg")
    (tmp_path / "more" / "b.txt").write_text("B\n")
    (tmp_path / "more" / "c.txt").write_text("C\n")
    assert_refused(source, "1 texts have no image", "more/c.txt")


def test_a_text_without_captions_is_refused_and_blank_lines_are_none(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    source = Source("folder", str(tmp_path))
    (tmp_path / "a.txt").write_text("\n  \n")
    assert_refused(source, "1 texts have no caption", "a.txt")
    (tmp_path / "a.txt").write_text("\nA dog\r\n\n  a cat \n\n")
    (record,) = load_records(source)
    assert record.captions == ("A dog", "a cat")


def test_two_images_for_one_text_are_refused(tmp_path):
    write_images(tmp_path, ["a.jpg", "a.png"])
    (tmp_path / "a.txt").write_text("A\n")
    assert_refused(Source("folder", str(tmp_path)), "share a name", "a.jpg and a.png")


def test_a_folder_is_read_through_links_without_hidden_names_and_says_what_is_left(
    tmp_path, caplog
):
    write_images(tmp_path / "pairs", ["a.JPG", ".b.jpg", ".hidden/c.jpg"])
    write_images(tmp_path / "elsewhere", ["d.jpg"])
    (tmp_path / "pairs" / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("pairs/a.TXT", "pairs/notes.md", "elsewhere/d.txt"):
        (tmp_path / name).write_text("A\n")
    records = load_records(Source("folder", str(tmp_path / "pairs")))
    assert [record.image_id for record in records] == ["a.JPG", "link/d.jpg"]
    assert "1 file is left out" in caplog.text
    assert caplog.text.endswith("suffix: notes.md\n")


def test_a_folder_without_images_is_refused(tmp_path):
    assert_refused(Source("folder", str(tmp_path)), str(tmp_path), "found none")


def test_a_text_that_is_not_utf8_is_refused_by_line(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "a.txt").write_bytes(b"A\ncaf\xe9\n")
    assert_refused(Source("folder", str(tmp_path)), f"{tmp_path}{os.sep}a.txt, line 2")


# Captions of every kind


@pytest.mark.parametrize(
    "caption",
    [
        "word " * 2000,
        "x" * 10_000,
        "🐕 🐈‍⬛ 👩🏽‍🚀",
        "كلب على العشب",
        "\u200f\u202eabc",
        "\x0b\x85 a",
    ],
)
def test_any_caption_keeps_its_eos_and_its_bound(tmp_path, images, tokenizer, caption):
    source = table(tmp_path, "")
    write_csv(Path(source.captions), [("a.jpg", caption)])
    for batch in batches(source, tokenizer):
        assert batch["caption_tokens"].shape[1] <= 30
        lengths = batch["caption_lengths"]
        assert (batch["caption_tokens"][range(4), lengths - 1] == Tokenizer.eos_id).all()


def test_messages_name_file_and_what_to_do(tmp_path, images):
    message = assert_refused(table(tmp_path, "a.jpg,A\nb.jpg,B,C\n"), "double quotes")
    assert re.match(rf"{re.escape(str(tmp_path))}/captions\.csv, line 2: expected", message)
