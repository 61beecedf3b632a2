"""benchmarks/seqclr_real_words.py, on a few rendered words in the place of real ones."""

import json
import sys

import pytest

from benchmarks import seqclr_real_words as benchmark
from pretrain.methods.seqclr.rendered import LIST, write_words
from virtex_d2.engine.files import read_safetensors

SCORES = {"words", "word_accuracy", "ed1", "cer", "one_minus_ned"}


@pytest.fixture
def run(tmp_path, backbone_file, monkeypatch):
    """A small run of the benchmark; returns what it has written."""
    captions = backbone_file()
    for split, count, seed in (("train", 40, 1), ("test", 12, 2)):
        write_words(tmp_path / split, count, seed, letters="ab", lengths=(2, 3))
        rows = [line.split() for line in (tmp_path / split / LIST).open()]
        lines = [f"{split}/{image}\t{word.upper()}\n" for image, word in rows]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    for name, value in (("RENDERED", 30), ("STEPS", 2), ("SHARES", (0.8, 1.0))):
        monkeypatch.setattr(benchmark, name, value)

    def call(*more):
        flags = ["--iiit5k", tmp_path, "--captions", captions, "--output", tmp_path / "out"]
        flags += ["--seeds", 1, "--iterations", 1, *more]
        monkeypatch.setattr(sys, "argv", ["seqclr_real_words.py", *map(str, flags)])
        benchmark.main()
        return json.loads((tmp_path / "out" / "results.json").read_text())

    call.captions = captions
    return call


@pytest.mark.slow
def test_every_start_reads_all_words_and_unseen_ones(run, tmp_path, capsys):
    found = run("--results", tmp_path / "kept.json")
    labels = {
        split: [line.split()[1].lower() for line in (tmp_path / f"{split}.txt").open()]
        for split in ("train", "test")
    }
    new = [label for label in labels["test"] if label not in labels["train"]]
    assert 0 < len(new) < 12
    assert list(found["scores"]) == list(benchmark.STARTS)
    for of_seeds in found["scores"].values():
        assert of_seeds.keys() == {"1"}
        assert list(of_seeds["1"]) == ["80%", "100%"]
        for parts in of_seeds["1"].values():
            assert parts["all"].keys() == parts["new"].keys() == SCORES
            assert (parts["all"]["words"], parts["new"]["words"]) == (12, len(new))
    assert json.loads((tmp_path / "kept.json").read_text()) == found
    # SeqCLR begins where it is said to begin, and goes on from there
    begun = read_safetensors(run.captions)[0]["conv1.weight"]
    after = {
        name: read_safetensors(tmp_path / "out" / name / "backbone.safetensors")[0]
        for name in ("SeqCLR_1", "captions_SeqCLR_1")
    }
    assert 0 < (after["captions_SeqCLR_1"]["conv1.weight"] - begun).abs().max() < 0.01
    assert (after["SeqCLR_1"]["conv1.weight"] - begun).abs().max() > 0.1
    # what is done is not repeated
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_*")}
    capsys.readouterr()
    assert run()["scores"] == found["scores"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "100% of the labels, new test words" in capsys.readouterr().out
