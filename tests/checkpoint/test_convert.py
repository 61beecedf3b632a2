"""ResNets out of checkpoints, into files that other programs read."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.checkpoint.layout_files import (
    DETECTORS,
    EXAMPLES,
    FULL,
    random_resnet,
    torchvision,
    write,
)
from virtex_d2.checkpoint.convert import convert, inspect, verify
from virtex_d2.checkpoint.layouts import DETECTRON2, SUFFIXES, TORCHVISION, translate
from virtex_d2.checkpoint.source import read_backbone
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import checksum_damage, save_with_checksum

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def networks():
    return random_resnet(seed=1), random_resnet(seed=2)


@pytest.mark.parametrize(("to", "suffix"), [(to, s) for to in SUFFIXES for s in SUFFIXES[to]])
@pytest.mark.parametrize("name", ["moco v2", "msra"])
def test_a_written_file_holds_the_same_network(name, to, suffix, networks, tmp_path):
    source = EXAMPLES[name].write(tmp_path, *networks)
    dest = str(tmp_path / f"out{suffix}")
    original = convert(str(source), dest, to)
    written = read_backbone(dest)
    assert written.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(written.tensors[n], t) for n, t in original.tensors.items())
    if to in ("backbone", "detectron2"):
        assert written.preprocessing == original.preprocessing
    assert verify(dest, original).passed


def test_names_go_from_layout_to_layout_and_back(networks, tmp_path):
    source = str(write(tmp_path / "a.pth", torchvision(*networks)))
    convert(source, str(tmp_path / "b.safetensors"), "backbone")
    convert(str(tmp_path / "b.safetensors"), str(tmp_path / "c.pkl"), "detectron2")
    convert(str(tmp_path / "c.pkl"), str(tmp_path / "d.pth"), "torchvision")
    back = torch.load(tmp_path / "d.pth", weights_only=True)
    assert back.keys() == {n for n in networks[0] if "num_batches" not in n}
    assert all(torch.equal(tensor, networks[0][name]) for name, tensor in back.items())


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detectors_backbone_comes_out_as_torchvision(name, networks, tmp_path):
    source = write(tmp_path / "model_final.pth", DETECTORS[name](*networks))
    convert(str(source), str(tmp_path / "resnet.pth"), "torchvision")
    back = torch.load(tmp_path / "resnet.pth", weights_only=True)
    assert len(back) == 265
    assert all(torch.equal(tensor, networks[0][key]) for key, tensor in back.items())


def test_verification_finds_a_changed_tensor(networks, tmp_path):
    source = str(write(tmp_path / "a.pth", torchvision(*networks)))
    original = convert(source, str(tmp_path / "b.pth"), "torchvision")
    changed = torch.load(tmp_path / "b.pth", weights_only=True)
    changed["layer1.0.bn1.bias"] += 1e-6
    torch.save(changed, tmp_path / "b.pth")
    with pytest.raises(InputError, match="1 tensors differ, the first: layer1.0.bn1.bias"):
        verify(str(tmp_path / "b.pth"), original)


def test_a_backbone_file_is_not_written_of_what_does_not_say_how_it_was_trained(networks, tmp_path):
    source = EXAMPLES["detectron2 backbone"].write(tmp_path, *networks)
    with pytest.raises(InputError, match="does not say what the network was trained with"):
        convert(str(source), str(tmp_path / "b.safetensors"), "backbone")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("dest", "to", "match"),
    [
        ("a.pth", "backbone", "ends in .safetensors"),
        ("a.pth", "caffe2", "expected one of backbone, detectron2"),
        ("there.pth", "torchvision", "exists already"),
        ("file/a.pth", "torchvision", "cannot be written"),
    ],
)
def test_a_destination_that_cannot_be_is_refused(dest, to, match, networks, tmp_path):
    source = str(write(tmp_path / "source.pth", torchvision(*networks)))
    (tmp_path / "there.pth").write_text("precious")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=match):
        convert(source, str(tmp_path / dest), to)
    assert (tmp_path / "there.pth").read_text() == "precious"


def test_a_full_disk_leaves_nothing_behind(networks, tmp_path, monkeypatch):
    source = str(write(tmp_path / "source.pth", torchvision(*networks)))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        convert(source, str(tmp_path / "new" / "b.safetensors"), "backbone")
    assert list((tmp_path / "new").iterdir()) == []


def test_inspection_says_what_a_file_is(networks, tmp_path):
    found = inspect(str(EXAMPLES["dino"].write(tmp_path, *networks)))
    assert (found["layout"], found["copy"], found["tensors"]) == ("dino", "teacher", 265)
    assert {tuple(item["layouts"]) for item in found["found"]} == {
        ("dino: teacher",),
        ("dino: student",),
    }
    assert found["beside"] == ["args", "dino_loss", "optimizer", "student"]


def test_a_conversion_says_how_its_result_must_be_fed(networks, tmp_path):
    source = str(EXAMPLES["msra"].write(tmp_path, *networks))
    notes = " ".join(convert(source, str(tmp_path / "a.pkl"), "detectron2").notes)
    assert "feed it with INPUT.FORMAT BGR" in notes
    assert "detectron2's own defaults are others" in notes
    notes = " ".join(convert(source, str(tmp_path / "a.pth"), "torchvision").notes)
    assert "readers will take it for RGB" in notes
    assert "no classifier" in notes


def test_the_tool_inspects_converts_and_verifies(networks, tmp_path, run_python):
    source = EXAMPLES["moco v2"].write(tmp_path, *networks)
    result = run_python(TOOL, source, "--inspect")
    assert result.returncode == 0, result.stderr
    assert "moco" in result.stdout
    result = run_python(TOOL, source, tmp_path / "b.safetensors", "--copy", "momentum", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["copy"] == "momentum"
    result = run_python(TOOL, source, tmp_path / "b.safetensors", "--verify", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert "verified" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.pth", "--inspect"), "absent.pth: expected a file, found nothing there"),
        (("source.pth",), "DEST is missing"),
        (("source.pth", "there.safetensors"), "exists already"),
    ],
)
def test_the_tool_reports_bad_input_in_one_line(arguments, message, networks, tmp_path, run_python):
    write(tmp_path / "source.pth", torchvision(*networks))
    (tmp_path / "there.safetensors").touch()
    result = run_python(TOOL, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


# A detectron2 that knows nothing of this project. Its release 0.6 cannot be imported beside today's
# Pillow and torch, so the bridges for that are loaded from their file, and nothing else.
STOCK = """
import importlib.util, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("virtex_d2", "pretrain"):
            raise ImportError(name)

spec = importlib.util.spec_from_file_location("bridges", {compat!r})
sys.modules["bridges"] = bridges = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bridges)
bridges.apply()
sys.meta_path.insert(0, Refuse())

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

cfg = get_cfg()
cfg.MODEL.DEVICE = "cpu"
cfg.MODEL.RESNETS.NORM = "BN"
cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
cfg.MODEL.BACKBONE.FREEZE_AT = 0
cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
cfg.MODEL.FPN.OUT_CHANNELS = 8
cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
model = build_model(cfg)
assert "virtex_d2" not in sys.modules
"""


@pytest.fixture
def run_stock(tmp_path, run_python):
    """Runs lines in a process in which `model` is stock detectron2's; gives what they print."""

    def run(lines: str) -> str:
        script = tmp_path / "stock.py"
        compat = str(ROOT / "virtex_d2" / "engine" / "compat.py")
        script.write_text(STOCK.replace("{compat!r}", repr(compat)) + lines)
        result = run_python(script, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_stock_detectron2_sets_every_tensor_of_a_written_pkl(tmp_path, run_stock):
    tensors = random_resnet(FULL, seed=1)
    source = str(write(tmp_path / "source.pth", torchvision(tensors, tensors)))
    convert(source, str(tmp_path / "R-50.pkl"), "detectron2")
    printed = run_stock(
        """
with torch.no_grad():
    for tensor in model.state_dict().values():
        tensor.fill_(-77)
DetectionCheckpointer(model).load("R-50.pkl")
state = {n: t for n, t in model.backbone.bottom_up.state_dict().items() if "num_batches" not in n}
print(len(state), sum(bool((t != -77).all()) for t in state.values()))
torch.save(state, "state.pth")
"""
    )
    assert printed.split() == ["265", "265"]
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    for name, tensor in tensors.items():
        target = translate(name, TORCHVISION, DETECTRON2)
        if target:
            assert torch.equal(state[target], tensor)


def test_a_detector_that_stock_detectron2_saved_gives_its_backbone(tmp_path, run_stock):
    run_stock('DetectionCheckpointer(model, ".").save("model_final")\n')
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    convert(str(tmp_path / "model_final.pth"), str(tmp_path / "r.pth"), "torchvision")
    back = torch.load(tmp_path / "r.pth", weights_only=True)
    assert len(back) == 265
    for name, tensor in back.items():
        assert torch.equal(
            tensor, saved[f"backbone.bottom_up.{translate(name, TORCHVISION, DETECTRON2)}"]
        )


def test_stock_detectron2_resumes_from_a_checkpoint_with_a_checksum(tmp_path, run_stock):
    """Its own class, without a line of this project, finds it by last_checkpoint and reads it."""
    (tmp_path / "run").mkdir()
    run_stock('DetectionCheckpointer(model, "run").save("model_0000003", iteration=3)\n')
    path = tmp_path / "run" / "model_0000003.pth"
    content = torch.load(path, weights_only=True)
    content["model"]["proposal_generator.rpn_head.conv.bias"].fill_(0.25)
    save_with_checksum(content, path)
    assert checksum_damage(path) == ""
    printed = run_stock(
        """
rest = DetectionCheckpointer(model, "run").resume_or_load("", resume=True)
print(rest["iteration"], model.proposal_generator.rpn_head.conv.bias.unique().tolist())
"""
    )
    assert printed.split() == ["3", "[0.25]"]


# For every line it reads, starts a process that writes one of two networks after the other into the
# same file until it is killed. Importing takes longer than writing, so it is done once.
WRITERS = """
import os, sys
from virtex_d2.checkpoint.convert import convert
dest, *sources = sys.argv[1:]
for _ in sys.stdin:
    child = os.fork()
    while child == 0:
        for source in sources:
            convert(source, dest, "backbone", overwrite=True)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_old_file_or_the_new_one(networks, tmp_path):
    """Fifty times, at random moments; more until both were left, and a write was hit."""
    sources = [
        str(write(tmp_path / f"{i}.pth", torchvision(tensors, tensors)))
        for i, tensors in enumerate(networks)
    ]
    dest = tmp_path / "out" / "backbone.safetensors"
    rng = random.Random(0)
    started = time.perf_counter()
    convert(sources[0], str(tmp_path / "timed.safetensors"), "backbone")
    span = max(0.25, 5 * (time.perf_counter() - started))  # of several files, on a busy machine too
    seen = set()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(dest), *sources],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        for kills in range(1000):
            if kills >= 50 and {0, 1} <= seen and list(dest.parent.glob(".tmp*")):
                break
            server.stdin.write("go\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            time.sleep(rng.uniform(0, span))
            os.kill(child, signal.SIGKILL)
            assert server.stdout.readline().strip() == "ended"
            if not dest.exists():
                seen.add("absent")
                continue
            tensors = read_backbone(str(dest)).tensors
            whole = [
                all(torch.equal(tensors[name], network[name]) for name in tensors)
                for network in networks
            ]
            assert any(whole)
            seen.add(whole.index(True))
    finally:
        server.kill()
        server.wait()
    assert {0, 1} <= seen
    left = [path.name for path in dest.parent.iterdir() if path != dest]
    assert all(name.startswith(".tmp") for name in left)
    assert left  # some kills did hit a write
