"""Folders of prepared images: what is in them, and that they survive anything."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from pretrain.data import prepare as prepare_module
from pretrain.data.main import main
from pretrain.data.prepare import MANIFEST, Outcome, Settings, prepare_folder, prepare_image
from pretrain.jpeg import Jpeg
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.images import read_image
from virtex_d2.engine.lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "prepare_images.py"
SMALL = Settings(shorter_side=48)


def scene(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)]
    return Image.fromarray(
        np.stack([200 * x, 180 * y, 220 - 120 * x - 80 * y], -1).astype(np.uint8)
    )


@pytest.fixture
def images(tmp_path) -> Path:
    """Seven kinds of images, in two folders, and a text."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    scene(160, 120).save(folder / "large.jpg", quality=95)
    scene(48, 200).save(folder / "narrow.jpg")
    scene(30, 40).save(folder / "sub" / "small.JPEG", format="JPEG")
    scene(160, 120).save(folder / "sub" / "large.png")
    scene(90, 150).convert("CMYK").save(folder / "print.jpg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    scene(200, 100).save(folder / "turned.jpg", exif=exif)
    scene(120, 130).save(folder / "web.webp")
    (folder / "sub" / "large.txt").write_text("a caption")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Of all files that are no bookkeeping."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def counts(outcomes: list[Outcome]) -> dict[str, int]:
    return dict(Counter(outcome.what for outcome in outcomes))


def test_names_stay_and_large_images_get_the_shorter_side(images, tmp_path):
    outcomes = prepare_folder(images, tmp_path / "out", SMALL)
    sizes = {name: Image.open(tmp_path / "out" / name).size for name in content(tmp_path / "out")}
    assert sizes == {
        "large.jpg": (64, 48),
        "narrow.jpg": (48, 200),
        "sub/small.JPEG": (30, 40),
        "sub/large.png": (64, 48),
        "print.jpg": (48, 80),
        "turned.jpg": (48, 96),
        "web.webp": (48, 52),
    }
    assert counts(outcomes) == {"resized": 5, "copied": 2}
    assert sum(outcome.bytes_before for outcome in outcomes) == sum(
        p.stat().st_size for p in images.rglob("*") if p.is_file() and p.suffix != ".txt"
    )
    assert sum(outcome.bytes_after for outcome in outcomes) == sum(
        map(len, content(tmp_path / "out").values())
    )


def test_pictures_show_what_they_showed(images, tmp_path):
    prepare_folder(images, tmp_path / "out", SMALL)
    for name in content(tmp_path / "out"):
        before, after = read_image(str(images / name)), read_image(str(tmp_path / "out" / name))
        before = before.resize(after.size, Image.Resampling.BOX)
        assert np.abs(np.asarray(before, np.float32) - np.asarray(after)).mean() < 3, name
        if name in ("narrow.jpg", "sub/small.JPEG"):
            assert (tmp_path / "out" / name).read_bytes() == (images / name).read_bytes()
        else:
            kind = {"png": "PNG", "webp": "WEBP"}.get(name.rpartition(".")[2], "JPEG")
            assert Image.open(tmp_path / "out" / name).format == kind


def test_crops_of_prepared_jpegs_need_a_part_of_the_file(real_data, tmp_path):
    source = sorted((real_data / "coco" / "val2017").glob("*.jpg"))[0]
    prepare_image(source.name, str(source.parent), str(tmp_path), Settings(shorter_side=200))
    data = (tmp_path / source.name).read_bytes()
    width, height = Jpeg(data).size
    assert min(width, height) == 200
    part = Jpeg(data)._part((0, 0, width // 2, height // 2))
    assert len(part.data) < len(data) / 2


def test_what_its_format_could_not_hold_is_copied(tmp_path):
    (tmp_path / "images").mkdir()
    wide = tmp_path / "images" / "wide.jpg"  # a PNG: in JPEG, 65 500 pixels are the most
    scene(70_000, 52).save(wide, format="PNG")
    outcomes = prepare_folder(tmp_path / "images", tmp_path / "out", SMALL)
    # 64 615 x 48 pixels would do
    assert counts(outcomes) == {"resized": 1}
    scene(72_000, 50).save(wide, format="PNG")
    outcomes = prepare_folder(tmp_path / "images", tmp_path / "out", SMALL)
    assert counts(outcomes) == {"copied": 1}
    assert (tmp_path / "out" / "wide.jpg").read_bytes() == wide.read_bytes()


def test_images_of_rare_suffixes_keep_their_names_and_what_is_left_out_is_named(tmp_path, caplog):
    kinds = {"a.jfif": "JPEG", "b.jpg?resize=634": "JPEG", "c.JPE": "JPEG", "d.jp2": "JPEG2000"}
    (tmp_path / "images").mkdir()
    for name, kind in kinds.items():
        scene(300, 200).save(tmp_path / "images" / name, format=kind)
    (tmp_path / "images" / "notes.md").touch()
    outcomes = prepare_folder(tmp_path / "images", tmp_path / "out", SMALL)
    assert counts(outcomes) == {"resized": 4}
    for name, kind in kinds.items():
        assert Image.open(tmp_path / "out" / name).format == kind
    assert "notes.md" in caplog.text


def test_linked_folders_are_prepared_and_links_in_a_circle_end(images, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "there").symlink_to(images)
    (linked / "itself").symlink_to(linked)
    prepare_folder(linked, tmp_path / "out", SMALL)
    assert set(content(tmp_path / "out")) == {
        f"there/{path.relative_to(images)}" for path in images.rglob("*.*") if path.suffix != ".txt"
    }


def test_images_that_are_gone_from_the_source_are_named(images, tmp_path, caplog):
    prepare_folder(images, tmp_path / "out", SMALL)
    (images / "sub" / "large.png").unlink()
    prepare_folder(images, tmp_path / "out", SMALL)
    assert "1 of its images are not in" in caplog.text
    assert "sub/large.png" in caplog.text
    assert (tmp_path / "out" / "sub" / "large.png").is_file()


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_a_folder_is_refused(images, tmp_path, output):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot be made a folder"):
        prepare_folder(images, tmp_path / output, SMALL)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_decoded_is_named_and_left_out(images, tmp_path, workers):
    whole = (images / "large.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "sub" / "text.png").write_text("no image")
    outcomes = prepare_folder(images, tmp_path / "out", SMALL, workers)
    unreadable = [outcome for outcome in outcomes if outcome.what == "unreadable"]
    assert [outcome.name for outcome in unreadable] == ["cut.jpg", "sub/text.png"]
    assert "truncated" in unreadable[0].reason
    assert not {"cut.jpg", "sub/text.png"} & content(tmp_path / "out").keys()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["finished"]
    assert manifest["unreadable"] == ["cut.jpg", "sub/text.png"]
    assert manifest["counts"] == {"resized": 5, "copied": 2, "unreadable": 2}
    assert manifest["settings"] == {"shorter_side": 48, "quality": 90}


def test_a_second_run_does_what_is_new_or_has_changed_and_nothing_else(images, tmp_path):
    out = tmp_path / "out"
    prepare_folder(images, out, SMALL)
    times = {name: os.stat(out / name).st_mtime_ns for name in content(out)}
    scene(100, 300).save(images / "new.jpg")
    scene(300, 100).save(images / "large.jpg")
    (images / "web.webp").write_bytes(b"damaged meanwhile")
    (out / "turned.jpg").write_bytes(b"")
    outcomes = prepare_folder(images, out, SMALL)
    assert counts(outcomes) == {"already": 4, "resized": 3, "unreadable": 1}
    assert Image.open(out / "large.jpg").size == (144, 48)
    assert Image.open(out / "turned.jpg").size == (48, 96)
    assert not (out / "web.webp").exists()
    for name in ("narrow.jpg", "sub/small.JPEG", "sub/large.png", "print.jpg"):
        assert os.stat(out / name).st_mtime_ns == times[name]


def test_other_settings_are_refused_in_the_same_folder(images, tmp_path):
    out = tmp_path / "out"
    prepare_folder(images, out, SMALL)
    before = content(out)
    for other in (Settings(shorter_side=64), Settings(48, quality=80)):
        with pytest.raises(InputError, match=r"prepared with .*48.*not with"):
            prepare_folder(images, out, other)
    assert content(out) == before


def test_a_folder_with_anything_else_in_it_is_refused(images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="something else in it"):
        prepare_folder(images, out, SMALL)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("out", [".", "sub", "new/folder"])
def test_the_images_own_folder_is_refused(images, out):
    before = content(images)
    with pytest.raises(InputError, match="Choose one beside it"):
        prepare_folder(images, images / out, SMALL)
    assert content(images) == before


def test_a_folder_without_images_and_impossible_settings_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected a folder of images"):
        prepare_folder(tmp_path / "none", tmp_path / "out", SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none in it"):
        prepare_folder(tmp_path / "empty", tmp_path / "out", SMALL)
    with pytest.raises(InputError, match="--quality 101"):
        Settings(quality=101)
    with pytest.raises(InputError, match="--shorter-side 0"):
        Settings(shorter_side=0)
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_killed_before_its_first_image_is_taken_up(images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-prepared-0123.json").write_text('{"form')
    assert "already" not in counts(prepare_folder(images, out, SMALL))
    assert not list(out.glob(".tmp-*"))


def test_a_second_run_at_the_same_time_is_refused(images, tmp_path):
    prepare_folder(images, tmp_path / "out", SMALL)
    lock = RunLock(tmp_path / "out", lambda error: None)
    lock.acquire()
    try:
        with pytest.raises(InputError, match="another run is writing it"):
            prepare_folder(images, tmp_path / "out", SMALL)
    finally:
        lock.release()


def test_a_full_disk_ends_the_run_with_what_to_do_and_leaves_no_half_file(
    images, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.shutil, "copyfile", full)
    with pytest.raises(InputError, match=r"narrow\.jpg: cannot be written: No space left.*again"):
        prepare_folder(images, tmp_path / "out", SMALL)
    assert "narrow.jpg" not in content(tmp_path / "out")
    monkeypatch.undo()
    assert counts(prepare_folder(images, tmp_path / "out", SMALL))["already"] > 0


def test_a_result_that_does_not_decode_never_appears(images, tmp_path, monkeypatch):
    def half(image, name, settings):
        stream = io.BytesIO()
        image.save(stream, "JPEG")
        return stream.getvalue()[: stream.tell() // 2]

    monkeypatch.setattr(prepare_module, "_encoded", half)
    with pytest.raises(InputError, match=r"large\.jpg: cannot be written: .*truncated"):
        prepare_image("large.jpg", str(images), str(tmp_path / "out"), SMALL)
    assert content(tmp_path / "out") == {}


# The tool


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_and_leaves_what_an_undisturbed_one_does(
    tmp_path, run_python, workers
):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(150):
        scene(400 + number, 300).save(images / f"{number:03}.jpg")
    command = [TOOL, "--images", images, "--output", out, "--shorter-side", 64]
    command += ["--workers", workers]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    for wait in (5, 40, 90):  # finished images
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            if len(list(out.glob("*.jpg"))) >= wait:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.002)
        finished = json.loads((out / MANIFEST).read_text())["finished"]
        assert finished == (process.returncode == 0)
        for file in content(out):  # whole, all of them
            if not Path(file).name.startswith((".tmp-", "run.lock")):
                read_image(str(out / file))
    assert kills >= 2
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert "0 unreadable" in result.stdout
    run_python(*command[:4], tmp_path / "whole", *command[5:])
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_leaves_nothing_half_written(tmp_path, run_python, number):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for place in range(150):
        scene(400 + place, 300).save(images / f"{place:03}.jpg")
    command = [TOOL, "--images", images, "--output", out, "--shorter-side", 64, "--workers", 2]
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores the signal, and what it starts would, too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not list(out.glob("*.jpg")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert "leaked" not in errors  # what multiprocessing says of processes that were left
    assert not [file for file in content(out) if Path(file).name.startswith(".tmp-")]
    result = run_python(*command)
    assert result.returncode == 0, result.stderr
    assert len(content(out)) == 150


def test_the_exit_code_and_the_last_line_say_what_happened(images, tmp_path, monkeypatch, capsys):
    def run(*more):
        command = ["--images", images, "--output", tmp_path / "out", "--shorter-side", 48, *more]
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, command), "--workers", "1"])
        try:
            code = main("")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    (images / "bad.jpg").write_bytes(b"no image")
    code, output, errors = run()
    assert code == 1
    assert "5 images resized, 2 copied, 1 unreadable; 0 were there before" in output
    (images / "bad.jpg").unlink()
    assert run()[0] == 0
    code, _, errors = run("--quality", 50)
    assert code == 2
    assert errors.splitlines()[-1].startswith("error: ")
