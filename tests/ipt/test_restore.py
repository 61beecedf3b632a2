"""tools/restore_images.py: what it writes, what it scores, what it refuses, how it goes on."""

import argparse
import json
import re
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.methods.ipt import restore
from pretrain.methods.ipt.degrade import degrade, resize
from pretrain.methods.ipt.scores import score
from pretrain.methods.ipt.sets import CLEAN, DEGRADED, list_images, pair_up
from pretrain.methods.ipt.tasks import SIX_TASKS, parse_task
from pretrain.methods.ipt.tiles import restore_tiled, self_ensemble
from tests.ipt.restorers import tiny_network, write_images, write_restorer
from virtex_d2.engine.errors import InputError


def _pixels(path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float()


def _expected(image: torch.Tensor, task: str, **kwargs) -> torch.Tensor:
    number = SIX_TASKS.index(task)
    with torch.no_grad():
        network = tiny_network()
        scale = network.sizes.scales[number]
        restored = restore_tiled(lambda x: network(x, number), image, 12, scale, **kwargs)
    return restored.clamp(0, 255).round()


def _files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- what is written


def test_a_folder_is_restored_under_its_names(six_tasks, tool, tmp_path):
    images = write_images(tmp_path / "in", a=(30, 17), sub__b=(12, 12), tiny=(5, 1))
    code, out, err = tool(six_tasks, images, tmp_path / "out", "--task", "x3")
    assert (code, out) == (0, "")
    assert "x3: 3 to restore, 0 kept; 23 tiles of 12 pixels on cpu" in err
    assert _files(tmp_path / "out") == {"a.png", "sub/b.png", "tiny.png"}
    for name in ("a", "sub/b", "tiny"):
        found = _pixels(tmp_path / "out" / f"{name}.png")
        assert torch.equal(found, _expected(_pixels(images / f"{name}.png"), "x3"))
    assert 20 < found.mean() < 235  # neither clipped nor a constant
    # one file, the sparse rule, other batches
    more = ("--task", "derain", "--stride", 36, "--batch-size", 2)
    assert tool(six_tasks, images / "a.png", tmp_path / "one", *more)[0] == 0
    expected = _expected(_pixels(images / "a.png"), "derain", stride=36)
    assert torch.equal(_pixels(tmp_path / "one" / "a.png"), expected)
    assert not torch.equal(expected, _expected(_pixels(images / "a.png"), "derain"))


def test_the_ensemble_is_the_mean_of_eight(six_tasks, tool, tmp_path):
    images = write_images(tmp_path / "in", a=(12, 13))
    code, _, err = tool(six_tasks, images, tmp_path / "out", "--task", "x2", "--ensemble")
    assert code == 0
    assert "16 tiles" in err
    network = tiny_network()
    with torch.no_grad():
        expected = self_ensemble(
            lambda image: restore_tiled(lambda x: network(x, 0), image, 12, 2),
            _pixels(images / "a.png"),
        )
    assert torch.equal(_pixels(tmp_path / "out" / "a.png"), expected.clamp(0, 255).round())


def _save(image: Image.Image, path, **kwargs):
    path.parent.mkdir(exist_ok=True)
    image.save(path, **kwargs)
    return path


@pytest.mark.parametrize("task", ["noise30", "x2"])
def test_alpha_grey_orientation_and_profile_are_kept(task, six_tasks, tool, tmp_path):
    folder, scale = tmp_path / "in", 2 if task == "x2" else 1
    with Image.open(write_images(tmp_path / "made", a=(20, 14)) / "a.png") as opened:
        rgb = opened.convert("RGB")
    grey, alpha = rgb.convert("L"), rgb.getchannel("G")
    profile = b"a profile's bytes"
    _save(grey, folder / "grey.png")
    _save(Image.merge("LA", (grey, alpha)), folder / "grey_alpha.png")
    _save(Image.merge("RGBA", (*rgb.split(), alpha)), folder / "alpha.png", icc_profile=profile)
    _save(rgb.quantize(8), folder / "palette.png", transparency=0)
    _save(rgb.convert("1"), folder / "bits.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # is to be turned by a quarter
    _save(rgb, folder / "turned.jpg", exif=exif, quality=100, subsampling=0)
    assert tool(six_tasks, folder, tmp_path / "out", "--task", task)[0] == 0
    modes = {"grey": "L", "grey_alpha": "LA", "alpha": "RGBA", "palette": "RGBA", "bits": "L"}
    modes |= {"turned": "RGB"}
    results = {name: Image.open(tmp_path / "out" / f"{name}.png") for name in modes}
    assert {name: image.mode for name, image in results.items()} == modes
    for name, image in results.items():
        size = (14, 20) if name == "turned" else (20, 14)
        assert image.size == (size[0] * scale, size[1] * scale)
    assert results["alpha"].info["icc_profile"] == profile
    larger = np.asarray(alpha.resize((20 * scale, 14 * scale), Image.Resampling.BICUBIC))
    for name in ("alpha", "grey_alpha"):
        assert np.array_equal(np.asarray(results[name].getchannel("A")), larger)
    expected = _expected(_pixels(folder / "alpha.png"), task)
    assert torch.equal(_pixels(tmp_path / "out" / "alpha.png"), expected)
    with torch.no_grad():
        network, number = tiny_network(), SIX_TASKS.index(task)
        colours = restore_tiled(
            lambda x: network(x, number), _pixels(folder / "grey.png"), 12, scale
        )
    luma = (0.299 * colours[0] + 0.587 * colours[1] + 0.114 * colours[2]).clamp(0, 255).round()
    found = torch.from_numpy(np.asarray(results["grey"]).copy()).float()
    assert (found - luma).abs().max() <= 1  # the sum of three, rounded
    assert (found - luma).abs().mean() < 0.01


# --- scores


def test_results_are_scored_against_clean_images(six_tasks, tool, tmp_path):
    images = write_images(tmp_path / "in", ax2=(20, 18), b=(14, 30))
    clean = write_images(tmp_path / "clean", a=(41, 36), b=(28, 61))
    arguments = (six_tasks, images, tmp_path / "out", "--task", "x2", "--reference", clean)
    code, out, _ = tool(*arguments, "--pictures", tmp_path / "pictures")
    assert code == 0
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (report["task"], report["border"], report["stride"]) == ("x2", 2, 12)
    for entry, name, truth in zip(report["scores"], ("ax2", "b"), ("a", "b"), strict=True):
        result = _pixels(tmp_path / "out" / f"{name}.png")
        reference = _pixels(clean / f"{truth}.png")[:, : result.shape[1], : result.shape[2]]
        psnr_y, psnr_rgb, ssim = score(result, reference, 2)
        assert (entry["psnr_y"], entry["psnr_rgb"], entry["ssim"]) == (psnr_y, psnr_rgb, ssim)
        bicubic = resize(_pixels(images / f"{name}.png")[None], 2)[0]
        assert entry["input_psnr_y"] == score(bicubic, reference, 2).psnr_y
        assert (tmp_path / "pictures" / f"{name}.png").exists()
    mean = np.mean([entry["ssim"] for entry in report["scores"]])
    assert report["mean"]["ssim"] == pytest.approx(mean)
    lines = out.splitlines()
    assert lines[0].split() == [
        *("image", "input", "PSNR", "Y", "PSNR", "Y", "PSNR", "RGB", "SSIM"),
    ]
    row = report["scores"][0]
    assert lines[2].split() == [
        *("ax2", f"{row['input_psnr_y']:.2f}", f"{row['psnr_y']:.2f}"),
        *(f"{row['psnr_rgb']:.2f}", f"{row['ssim']:.4f}"),
    ]
    assert lines[-1].startswith("mean of 2")


def test_a_perfect_result_is_infinite_and_no_number_of_json(six_tasks, tool, tmp_path):
    images = write_images(tmp_path / "in", a=(20, 18))
    assert tool(six_tasks, images, tmp_path / "first", "--task", "derain")[0] == 0
    more = ("--task", "derain", "--reference", tmp_path / "first")
    assert "inf" in tool(six_tasks, images, tmp_path / "out", *more)[1]
    text = (tmp_path / "out" / "scores.json").read_text()
    entry = json.loads(text, parse_constant=pytest.fail)["scores"][0]
    assert entry["psnr_y"] is None
    assert entry["ssim"] == pytest.approx(1)


@pytest.mark.parametrize("degraded", ["noise30", "noise70", "derain", "x2"])
def test_degradations_follow_from_the_name_alone(degraded, six_tasks, tool, tmp_path):
    images = write_images(tmp_path / "in", a=(33, 28), b=(33, 28))
    with Image.open(images / "b.png") as opened:
        opened.convert("L").save(images / "b.png")
    task = "noise50" if degraded == "noise70" else degraded
    flags = ("--task", task, "--degrade", *([degraded] if degraded != task else []))
    assert tool(six_tasks, images, tmp_path / "both", *flags)[0] == 0
    assert tool(six_tasks, images / "b.png", tmp_path / "one", *flags)[0] == 0
    for name in ("a.png", "b.png"):
        scale = parse_task(task).scale
        clean = _pixels(images / name)[:, : 28 // scale * scale, : 33 // scale * scale]
        worse = degrade(clean[None], parse_task(degraded), [zlib.crc32(name[:1].encode())])[0]
        assert torch.equal(_pixels(tmp_path / "both" / name), _expected(worse, task))
    # grey ones as three channels, each with noise of its own
    assert (tmp_path / "one" / "b.png").read_bytes() == (tmp_path / "both" / "b.png").read_bytes()
    with Image.open(tmp_path / "one" / "b.png") as image:
        assert image.mode == "RGB"
    report = json.loads((tmp_path / "both" / "scores.json").read_text())
    assert report["degraded"] == degraded
    assert len(report["scores"]) == 2


def test_pictures_show_what_changed_most(six_tasks, tool, tmp_path):
    before = torch.full((3, 200, 300), 128.0)
    after = before.clone()
    after[:, 150:170, 40:60] = 250
    picture = np.asarray(restore.compare([("input", before), ("restored", after)]))
    assert picture.shape[2] == 3
    white = (picture[-380:, picture.shape[1] // 2 :] == 250).all(-1)  # of the detail, enlarged
    assert white.sum() == (20 * 4) ** 2
    images = write_images(tmp_path / "in", a=(30, 17))
    arguments = (six_tasks, images, tmp_path / "out", "--task", "x4")
    assert tool(*arguments, "--pictures", tmp_path / "looks")[0] == 0
    assert _files(tmp_path / "looks") == {"a.png"}


# --- what was stopped goes on


def test_a_stopped_run_goes_on_and_keeps_what_is_whole(six_tasks, tool, tmp_path, monkeypatch):
    images = write_images(tmp_path / "in", a=(20, 18), b=(14, 30), c=(16, 16))
    flags = ("--task", "noise30", "--degrade")
    assert tool(six_tasks, images, tmp_path / "whole", *flags)[0] == 0

    def stop(photo, path, made, write=restore.write_photo):
        if path.endswith("b.png"):
            raise KeyboardInterrupt
        write(photo, path, made)

    with monkeypatch.context() as patch:
        patch.setattr(restore, "write_photo", stop)
        with pytest.raises(KeyboardInterrupt):
            tool(six_tasks, images, tmp_path / "out", *flags)
    assert _files(tmp_path / "out") == {"a.png"}
    before = (tmp_path / "out" / "a.png").stat()
    code, _, err = tool(six_tasks, images, tmp_path / "out", *flags)
    assert code == 2
    assert "a.png: exists already. --keep keeps" in err
    code, _, err = tool(six_tasks, images, tmp_path / "out", *flags, "--keep")
    assert code == 0
    assert "noise30: 2 to restore, 1 kept" in err
    after = (tmp_path / "out" / "a.png").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for name in _files(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_results_of_another_command_are_not_kept(six_tasks, tool, tmp_path):
    images = write_images(tmp_path / "in", a=(20, 18))
    out = tmp_path / "out"
    assert tool(six_tasks, images, out, "--task", "noise30")[0] == 0
    first = (out / "a.png").read_bytes()
    code, _, err = tool(six_tasks, images, out, "--task", "noise50", "--stride", 36, "--keep")
    assert code == 2
    assert "a.png: is not a result of this command" in err
    assert "it differs in task, number, stride" in err
    Image.new("RGB", (20, 18)).save(images / "a.png")
    code, _, err = tool(six_tasks, images, out, "--task", "noise30", "--keep")
    assert (code, "it differs in image_sha256" in err) == (2, True)
    assert (out / "a.png").read_bytes() == first
    assert tool(six_tasks, images, out, "--task", "noise30", "--overwrite")[0] == 0
    Image.new("RGB", (20, 18)).save(out / "a.png")
    code, _, err = tool(six_tasks, images, out, "--task", "noise30", "--keep")
    assert (code, "it does not say how it was made" in err) == (2, True)


# --- bad input


def _deep(path, channels):
    shape = (16, 16, channels) if channels > 1 else (16, 16)
    cv2.imwrite(str(path), np.full(shape, 40000, np.uint16))


def _frames(path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second])


BAD_IMAGES = {
    "grey16.png": (lambda path: _deep(path, 1), "more than 8 bits a channel"),
    "rgb16.png": (lambda path: _deep(path, 3), "more than 8 bits a channel"),
    "rgba16.png": (lambda path: _deep(path, 4), "more than 8 bits a channel"),
    "rgb16.tiff": (lambda path: _deep(path, 3), "more than 8 bits a channel"),
    "rgb16.ppm": (lambda path: _deep(path, 3), "more than 8 bits a channel"),
    "float.tiff": (lambda path: Image.new("F", (8, 8)).save(path), "the mode F"),
    "inks.jpg": (lambda path: Image.new("CMYK", (8, 8)).save(path), "the mode CMYK"),
    "two.gif": (_frames, "2 frames"),
    "cut.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "cannot be used: "),
    "text.jpg": (lambda path: path.write_text("no image"), "cannot be used: it is no image"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_cannot_be_kept_whole_are_refused(name, six_tasks, tool, tmp_path):
    images = write_images(tmp_path / "in", a=(20, 18))
    make, message = BAD_IMAGES[name]
    make(images / name)
    code, out, err = tool(six_tasks, images, tmp_path / "out", "--task", "x2")
    assert (code, out) == (2, "")
    assert f"error: {images / name}: cannot be used: " in err
    assert message in err
    assert not (tmp_path / "out").exists()  # not even of the good one


BAD_FOLDERS = {
    "nothing": (["{in}/none", "{out}"], "none: expected an image or a folder of them, found noth"),
    "no images": (["{empty}", "{out}"], "empty: it has no image"),
    "output within": (["{in}", "{in}/out"], "out: lies in the folder of IN, .*Choose another"),
    "output is input": (["{in}", "{in}"], "lies in the folder of IN"),
    "output of a file": (["{in}/a.png", "{in}"], "lies in the folder of IN"),
    "output is reference": (["{in}", "{clean}", "--reference", "{clean}"], "of --reference"),
    "pictures within": (["{in}", "{out}", "--pictures", "{in}/p"], "--pictures .*lies in the fol"),
    "pictures are results": (["{in}", "{out}", "--pictures", "{out}"], "is OUT itself"),
    "scores of others": (
        ["{one}", "{scored}", "--reference", "{in}/a.png"],
        "scores.json: exists already",
    ),
    "output is a file": (["{in}", "{clean}/a.png"], "expected a folder or nothing there, found a"),
    "twins": (["{twins}", "{out}"], "a.jpg and a.png would be one image by their names"),
    "alone": (["{in}", "{out}", "--reference", "{twins}/b"], "no counterpart of 1 of 2 images.*b"),
    "left over": (["{one}", "{out}", "--reference", "{clean}"], "1 of its 2 .* have no degraded"),
    "sizes": (
        ["{in}", "{out}", "--reference", "{in}/../small"],
        r"small/a.png: has 32x20 pixels, .*in/a.png 16x12\. They do not pair: .* has as many",
    ),
    "too small": (["{tiny}", "{out}", "--degrade"], "has 16x9 pixels; to be scored it needs 11 on"),
    "other scale": (
        ["{in}", "{out}", "--degrade", "x2"],
        "makes images 2 times smaller, --task",
    ),
    "no task": (["{in}", "{out}", "--degrade", "blur"], "'blur' is no task"),
}


@pytest.mark.parametrize("row", BAD_FOLDERS)
def test_folders_that_do_not_fit_are_refused(row, six_tasks, tool, tmp_path):
    arguments, message = BAD_FOLDERS[row]
    write_images(tmp_path / "in", a=(16, 12), b=(16, 12))
    write_images(tmp_path / "clean", a=(16, 12), b=(16, 12))
    write_images(tmp_path / "small", a=(32, 20), b=(16, 12))
    write_images(tmp_path / "one", a=(16, 12))
    write_images(tmp_path / "tiny", a=(16, 9))
    write_images(tmp_path / "twins", a=(16, 12), b__a=(16, 12))
    Image.new("RGB", (9, 9)).save(tmp_path / "twins" / "a.jpg")
    for name in ("empty", "scored"):
        (tmp_path / name).mkdir()
    (tmp_path / "scored" / "scores.json").write_text("{}")
    names = ("in", "clean", "one", "tiny", "twins", "empty", "scored", "out")
    places = {name: tmp_path / name for name in names}
    before = _files(tmp_path)
    code, _, err = tool(
        six_tasks, *(word.format(**places) for word in arguments), "--task", "derain"
    )
    assert code == 2
    assert re.search(f"error: .*{message}", err)
    assert _files(tmp_path) == before


def test_a_network_that_makes_nan_writes_nothing(tool, tmp_path):
    network = tiny_network(("x2",))
    with torch.no_grad():
        network.tail[0][1].weight.fill_(3e38)
    path = write_restorer(tmp_path / "a.safetensors", ("x2",), network)
    images = write_images(tmp_path / "in", a=(20, 18))
    code, _, err = tool(path, images, tmp_path / "out")
    assert code == 2
    assert "a.png: the network makes NaN or Inf of it, and nothing is written" in err
    assert not (tmp_path / "out").exists()


# --- the benchmark, whose figures mean nothing at this size


def test_both_rules_of_tiles_are_measured(six_tasks, tmp_path):
    from benchmarks import restore as benchmark

    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    image = str(write_images(tmp_path / "in", a=(40, 30)) / "a.png")
    found = benchmark.measure(
        parser.parse_args(["--checkpoint", six_tasks, "--task", "x2", "--image", image])
    )
    assert {stride: row["tiles"] for stride, row in found["strides"].items()} == {12: 77, 36: 15}
    for row in found["strides"].values():
        expected = row["seconds"] / row["tiles"] * row["tiles_larger"]
        assert row["seconds_larger"] == pytest.approx(expected)
    rules = [_expected(_pixels(image), "x2", stride=stride) for stride in (12, 36)]
    assert found["psnr_y_between"] == pytest.approx(score(*rules, 0).psnr_y)
    assert "stride 36: 15 tiles in" in benchmark.report(found)
    with pytest.raises(InputError, match="--image: needs a --checkpoint"):
        benchmark.measure(parser.parse_args(["--image", image]))


# --- layouts


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def _pairs(place, reference, name):
    task = parse_task(name)
    degraded = list_images(place, DEGRADED, task)
    return [
        (found.path.removeprefix(place + "/"), clean.removeprefix(reference + "/"))
        for found, clean in zip(degraded, pair_up(degraded, reference, task))
    ]


def test_the_usual_layouts_pair(tmp_path):
    edsr = _touch(
        tmp_path / "Set5",
        *("HR/baby.png", "HR/bird.png", "LR_bicubic/X2/babyx2.png", "LR_bicubic/X2/birdx2.png"),
        *("LR_bicubic/X4/babyx4.png", "LR_bicubic/X4/birdx4.png"),
    )
    for scale in (2, 4):
        expected = [
            (f"LR_bicubic/X{scale}/{name}x{scale}.png", f"HR/{name}.png")
            for name in ("baby", "bird")
        ]
        assert _pairs(edsr, edsr, f"x{scale}") == expected
        folders = (f"{edsr}/LR_bicubic/X{scale}", f"{edsr}/HR")  # one by one
        assert _pairs(*folders, f"x{scale}") == [
            (f"{name}x{scale}.png", f"{name}.png") for name in ("baby", "bird")
        ]
    urban = _touch(
        tmp_path / "Urban100",
        *(f"image_SRF_2/img_00{n}_SRF_2_{kind}.png" for n in (1, 2) for kind in ("HR", "LR")),
        "image_SRF_2/img_001_SRF_2_bicubic.png",
    )
    expected = [f"img_00{n}_SRF_2_" for n in (1, 2)]
    for place, start in ((urban, "image_SRF_2/"), (f"{urban}/image_SRF_2", "")):
        assert _pairs(place, place, "x2") == [
            (f"{start}{name}LR.png", f"{start}{name}HR.png") for name in expected
        ]
    rain = _touch(tmp_path / "Rain100L", *(f"{k}rain-00{n}.png" for k in ("", "no") for n in "12"))
    expected = [(f"rain-00{n}.png", f"norain-00{n}.png") for n in "12"]
    assert _pairs(rain, rain, "derain") == expected
    apart = _touch(
        tmp_path / "apart", *(f"{k}rain/{k}rain-00{n}.png" for k in ("", "no") for n in "12")
    )
    assert _pairs(apart, apart, "derain") == [(f"rain/{a}", f"norain/{b}") for a, b in expected]
    # for another task they are images like others
    assert len(list_images(rain, DEGRADED, parse_task("noise30"))) == 4
    plain = _touch(tmp_path / "plain", "a.png", "b/a.jpg")
    other = _touch(tmp_path / "other", "a.jpg", "b/a.png")
    assert _pairs(plain, other, "noise30") == [("a.png", "a.jpg"), ("b/a.jpg", "b/a.png")]
    assert [found.key for found in list_images(edsr, CLEAN, parse_task("noise30"))] == [
        *("baby", "bird"),
    ]


def test_a_set_without_images_of_the_task_is_refused(tmp_path):
    edsr = _touch(tmp_path / "Set5", "HR/baby.png", "LR_bicubic/X2/babyx2.png")
    for task in ("x3", "noise30"):
        with pytest.raises(InputError, match=f"no images of task {task}. --degrade makes them"):
            list_images(edsr, DEGRADED, parse_task(task))
    only = _touch(tmp_path / "only", "norain-001.png", "norain-002.png")
    with pytest.raises(InputError, match="has no counterpart of 2 of 2"):
        _pairs(only, only, "derain")


def test_one_image_of_a_set_may_be_scored_alone(tmp_path):
    clean = _touch(tmp_path / "clean", "a.png", "b.png")
    task = parse_task("noise30")
    found = list_images(_touch(tmp_path / "in", "a.png") + "/a.png", DEGRADED, task)
    assert pair_up(found, clean, task, whole=False) == [f"{clean}/a.png"]
    assert pair_up(found, f"{clean}/b.png", task, whole=False) == [f"{clean}/b.png"]
