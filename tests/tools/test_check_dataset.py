"""tools/check_dataset.py as it is typed."""

import functools
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_dataset.py"


@pytest.fixture
def check(run_tool):
    """`check(*arguments)` -> exit code, in this process."""
    return functools.partial(run_tool, TOOL)


def _set(world, split):
    return ["coco", world / f"annotations/instances_{split}.json", world / "images" / split]


def test_the_exit_code_is_for_scripts(check, world):
    (world / "images/test/000000.jpg").unlink()
    assert check("--val", *_set(world, "test"), "--no-images") == 1


def test_a_contact_sheet_that_is_no_png_is_refused_before_anything_is_read(
    check, world, tmp_path, capsys
):
    sheet = tmp_path / "sheet.pdf"
    assert check("--val", *_set(world, "test"), "--contact-sheet", sheet) == 2
    printed = capsys.readouterr()
    assert "is a PNG; expected a name that ends in .png" in printed.err
    assert printed.out == ""
    assert not sheet.exists()


def test_sets_are_named_by_type_file_and_folder(check, world, capsys):
    assert check("--train", *_set(world, "train"), "--val", *_set(world, "test")) == 0
    out = capsys.readouterr().out
    assert out.startswith("train: instances_train.json: COCO, ")
    assert "\nval: instances_test.json: COCO, " in out


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        ("--val", {"images": [], "annotations": []}, "`images` is empty"),
        ("--train", {"annotations": []}, "there is nothing to learn"),
    ],
)
def test_what_training_would_refuse_is_no_sound_data_set(
    role, change, message, check, world, capsys
):
    kind, file, images = _set(world, "test")
    assert check(role, kind, file, images) == 0
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert check(role, kind, file, images) == 1
    told = capsys.readouterr().out
    assert "tools/train_net.py would not start on this" in told
    assert message in told
    assert told.count("no problems") == 1  # of the sound set before


def test_sets_of_other_classes_do_not_go_together(check, world, capsys):
    path = world / "annotations/instances_test.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "zebra"
    path.write_text(json.dumps(content))
    assert check("--train", *_set(world, "train"), "--val", *_set(world, "test")) == 1
    assert "different categories" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--val TYPE FILE IMAGES, or by --config-file or KEY VALUE pairs; neither is given"),
        (["--val", "coco", "a", "b", "--config-file", "c.yaml"], "both are given"),
        (["--val", "cocoo", "none.json", "images"], "Did you mean 'coco'?"),
        (["--val", "coco", "none.json", "images"], "none.json: cannot be read"),
        (
            ["--val", "voc", "none", "test"],
            "none/ImageSets/Main/test.txt: expected a folder in Pascal VOC's layout",
        ),
        (["DATASETS.TEST", "('nonesuch',)"], "'nonesuch' is not a known data set"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN and DATASETS.TEST are empty"),
        (["DATASETS.TEST", "('cityscapes_fine_instance_seg_val',)"], "only data sets in the form"),
    ],
)
def test_bad_usage_is_told_in_a_line(arguments, message, check, capsys):
    assert check(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_data_sets_of_a_config_are_found_by_their_names(check, data, world, capsys):
    assert check("--no-images", *data) == 0
    out = capsys.readouterr().out
    assert out.startswith("tool_train: COCO, ")
    assert "\ntool_test: COCO, " in out


def test_detectron2s_own_names_need_no_entry(check, capsys):
    assert check("--no-images", "DATASETS.TEST", "('coco_2017_val',)") == 2
    assert "coco/annotations/instances_val2017.json: cannot be read" in capsys.readouterr().err


def test_no_problems_are_told_only_where_nothing_was_found(check, world, capsys):
    """A BOM and whole floats are nothing; an area that is not given is a note."""
    kind, file, images = _set(world, "test")
    content = json.loads(file.read_text())
    for image in content["images"]:
        image.update(width=float(image["width"]))
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    assert check("--val", kind, file, images) == 0
    assert "no problems" in capsys.readouterr().out
    content["annotations"][0]["area"] = None
    file.write_text(json.dumps(content))
    assert check("--val", kind, file, images) == 0
    told = capsys.readouterr().out
    assert "notes (1)" in told
    assert "no problems" not in told


def test_a_file_without_annotations_is_checked_as_one_to_predict_on(check, world, capsys):
    kind, file, images = _set(world, "test")
    content = json.loads(file.read_text())
    del content["annotations"]
    file.write_text(json.dumps(content))
    assert check("--val", kind, file, images) == 0
    assert "no `annotations`: it is to predict on" in capsys.readouterr().out
