"""tools/benchmark.py: small sizes, whose figures mean nothing, through all that it does."""

import argparse
import json

import pytest

pytestmark = pytest.mark.slow

CAPTIONS = "annotations/captions_train.json"
SMALL = {
    "pretrain": "--batch 4 --size 64 --width 64 --vocab 200 --rounds 2 --recompute blocks",
    "finetune": "--images 2 --size 96 128 --rounds 1 "
    "--config-file configs/shapes/mask_rcnn_R_50_FPN.yaml",
    "caption": "--images 2 --rounds 1 --hidden 64 --heads 4 --vocab 200",
}


def positive_leaves(found: dict, place: str) -> None:
    for key, value in found.items():
        if isinstance(value, dict):
            positive_leaves(value, f"{place}.{key}")
        else:
            assert value > 0, f"{place}.{key}"


@pytest.mark.parametrize("name", SMALL)
def test_both_ways_are_compared_and_their_figures_written(name, run_python, tmp_path):
    written = tmp_path / "found.json"
    options = [*SMALL[name].split(), "--threads", "1"]
    done = run_python("tools/benchmark.py", name, *options, "--json", str(written))
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout
    found = json.loads(written.read_text())
    assert found["machine"]["threads"] == 1
    measured = set(found) - {"settings", "machine", "losses"}
    assert measured
    for key in measured:
        positive_leaves({key: found[key]}, name)


def parsed(benchmark, *options):
    """A benchmark's arguments, for a test that calls it in its own process."""
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


LOADED = "--num-images 8 --rounds 1 --vocab 300 --workers 1"


def loader_of(world, *options):
    data = ("--images", world / "images/train", "--captions", world / CAPTIONS)
    return ("tools/benchmark.py", "loader", *data, *LOADED.split(), *options)


def test_loading_is_compared_and_its_figures_written(shapes_world, run_python, tmp_path):
    written = tmp_path / "found.json"
    done = run_python(*loader_of(shapes_world, "--json", written))
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    assert found["per_core"]["plain"]["ratio"] == 1
    assert f"{found['per_core']['prepared']['ratio']:.2f}" in done.stdout
    assert set(found["workers"]) == {"originals", "prepared"}
    difference = found.pop("difference")
    assert 0 <= difference["originals"] < difference["prepared"]
    for key in set(found) - {"settings", "machine"}:
        positive_leaves({key: found[key]}, "loader")


def test_pixels_that_are_not_the_plain_ways_stop_the_benchmark(shapes_world, monkeypatch):
    from benchmarks import loader

    def shifted(image, box, flip):
        return original(image, (box[0], box[1], box[2] - 60, box[3]), flip)

    original = loader.plain_crop
    monkeypatch.setattr(loader, "plain_crop", shifted)
    args = parsed(loader, *loader_of(shapes_world)[2:])
    with pytest.raises(AssertionError, match="levels from the plain way"):
        loader.measure(args)


def test_a_plain_step_with_other_weights_is_noticed(monkeypatch):
    import torch

    from benchmarks import pretrain_step
    from benchmarks.plain import PlainBicaptioner

    def with_another_bias(ours, dropout):
        plain = original(ours, dropout)
        with torch.no_grad():
            plain.output.bias[5] += 1.0
        return plain

    original = PlainBicaptioner.of
    monkeypatch.setattr(PlainBicaptioner, "of", with_another_bias)
    options = "--batch 4 --size 64 --width 64 --vocab 200 --device cpu"
    args = parsed(pretrain_step, *options.split())
    with pytest.raises(AssertionError):
        pretrain_step.Setting(args, ("ours", "plain")).check()


def test_growth_has_a_figure_for_each_size(run_python, tmp_path):
    written = tmp_path / "found.json"
    cases = ["caption files: images", "pretraining: words of a caption", "fine-tuning: classes"]
    resident = ["pretraining: new captions", "fine-tuning: new image sizes"]
    options = ["--doublings", "1", "--rounds", "1", "--iterations", "2", "--json", str(written)]
    options += ["--cases", *cases, *resident]
    done = run_python("tools/benchmark.py", "growth", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    assert list(found["resident"]) == resident
    for case in found["resident"].values():
        assert case["iterations"] == [1, 2]
        assert all(value > 2**26 for value in case["memory_bytes"])
    found = found["cases"]
    assert list(found) == cases
    assert found["caption files: images"]["sizes"] == [10_000, 20_000]
    for case in found.values():
        assert all(value > 0 for value in [*case["seconds"], *case["memory_bytes"]])
        assert len(case["seconds"]) == len(case["memory_bytes"]) == 2
    # twice as many are read: no clock is needed to see that this is linear
    assert found[cases[0]]["exponent_of_memory"] == pytest.approx(1, abs=0.5)
    assert "exponent" in done.stdout


def test_a_size_that_fails_is_named(monkeypatch, capfd):
    from benchmarks import growth

    def broken(size, folder):
        raise ValueError("no such thing")

    monkeypatch.setitem(growth.CASES, "broken", (7, broken))
    with pytest.raises(RuntimeError, match="size 7"):
        growth.measure(parsed(growth, "--cases", "broken"))
    assert "no such thing" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("pretrain --rounds 0", "--rounds: expected a whole number from 1, found '0'"),
        ("pretrain --recompute block", "choose from '', 'blocks'"),
        ("pretrain --profile --json figures.json", "--json: --profile has no figures to write"),
        ("loader --images nowhere --captions nowhere.json", "error: nowhere.json"),
    ],
)
def test_mistakes_are_told_in_a_line(run_python, arguments, told):
    done = run_python("tools/benchmark.py", *arguments.split())
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_measured_is_named(run_python):
    done = run_python("tools/benchmark.py", "pretrian")
    assert done.returncode == 2
    assert "pretrian" in done.stderr
    assert "startup" in done.stderr
