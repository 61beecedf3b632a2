"""tools/benchmark.py: small sizes, whose figures mean nothing, through all that it does."""

import json

import pytest

pytestmark = pytest.mark.slow

SMALL = {
    "pretrain": "--batch 4 --size 64 --width 64 --vocab 200 --rounds 2 --recompute",
    "finetune": "--images 2 --size 96 128 --rounds 1",
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


def test_a_plain_step_with_other_weights_is_noticed(monkeypatch):
    import argparse

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
    parser = argparse.ArgumentParser()
    pretrain_step.add_arguments(parser)
    args = parser.parse_args(
        ["--batch", "4", "--size", "64", "--width", "64", "--vocab", "200", "--device", "cpu"]
    )
    with pytest.raises(AssertionError):
        pretrain_step.Setting(args, ("ours", "plain")).check()


def test_what_cannot_be_measured_is_named(run_python):
    done = run_python("tools/benchmark.py", "pretrian")
    assert done.returncode == 2
    assert "pretrian" in done.stderr
    assert "startup" in done.stderr
