"""The SVMs on a network that is still being pretrained."""

import json

import pytest
import torch

from pretrain.config import load_pretrain_config
from pretrain.trainer import PretrainTrainer
from tests.conftest import ROOT
from tests.probes.small_sets import COLOURS
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors
from virtex_d2.studies.probes import folder
from virtex_d2.studies.probes.during import build_probe
from virtex_d2.studies.probes.folder import probe_folder

CLASSES = str([*COLOURS])


def options(voc, output, *more) -> list[str]:
    pairs = {
        "MODEL.OBJECTIVE": "tests.methods.reconstruction:Reconstruction",
        "MODEL.DEVICE": "cpu",
        "MODEL.VISUAL.NAME": "resnet18",
        "DATA.FORMAT": "images",
        "DATA.TRAIN_IMAGES": voc / "JPEGImages",
        "DATA.IMAGE_SIZE": 32,
        "DATA.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.WARMUP_ITERS": 1,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "OUTPUT_DIR": output,
    }
    pairs.update(zip(more[::2], more[1::2], strict=True))
    return [str(word) for pair in pairs.items() for word in pair]


@pytest.fixture
def make_trainer(voc, tmp_path):
    """`make_trainer(name, KEY, value, ...)` -> a trainer of four updates; its folder by name."""

    def make(name, *opts, build_probe=build_probe):
        (tmp_path / name).mkdir(exist_ok=True)
        cfg = load_pretrain_config(None, options(voc, tmp_path / name, *opts))
        return PretrainTrainer(cfg, build_probe=build_probe)

    return make


@pytest.fixture
def probing(voc) -> list:
    sizes = ["TEST.PROBE.RESIZE", 36, "TEST.PROBE.CROP", 32]
    return ["TEST.PROBE.ROOT", voc, "TEST.PROBE.CLASSES", CLASSES, *sizes]


def test_a_run_is_judged_as_its_backbone_would_be_and_trains_as_if_it_were_not(
    make_trainer, probing, probe, tmp_path, voc
):
    plain = make_trainer("plain")
    plain.resume_or_load()
    plain.train()
    judged = make_trainer(
        "judged", *probing, "TEST.PROBE.PERIOD", 2, "TEST.BEST_METRIC", "probe/mAP", "LOG_PERIOD", 1
    )
    judged.resume_or_load()
    judged.train()
    states = [trainer.checkpointer.states()["model"] for trainer in (plain, judged)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    lines = [json.loads(s) for s in (tmp_path / "judged/metrics.json").read_text().splitlines()]
    found = {line["iteration"]: line["probe/mAP"] for line in lines if "probe/mAP" in line}
    assert list(found) == [1, 3]
    assert not (tmp_path / "judged" / "probe").exists()

    weights = ("MODEL.WEIGHTS", tmp_path / "judged" / "backbone.safetensors")
    alone = probe("DATA.ROOT", voc, "DATA.CLASSES", CLASSES, *weights)
    assert found[3] == alone["mAP"]
    words = ("DATA.ROOT", voc, "DATA.CLASSES", CLASSES, "MODEL.WEIGHTS", tmp_path / "judged")
    curve = probe(*words, "OUTPUT_DIR", tmp_path / "curve", judge=probe_folder)
    assert {iteration: metrics["mAP"] for iteration, metrics in curve.items()} == found
    afterwards = [json.loads(s) for s in (tmp_path / "curve/metrics.json").read_text().splitlines()]
    of_run = [
        {key: line[key] for key in ("iteration", "probe/mAP11", "probe/mAP")}
        for line in lines
        if "probe/mAP" in line
    ]
    assert afterwards == of_run
    best = torch.load(tmp_path / "judged" / "model_best.pth", weights_only=True)["iteration"]
    assert best == max(found, key=lambda iteration: (found[iteration], -iteration))


@pytest.fixture
def checkpoints(tmp_path, thin_backbone):
    """A folder of two checkpoints of VirTex's names, the later one blind, and another file."""
    folder = tmp_path / "pretraining"
    folder.mkdir()
    tensors, _ = read_safetensors(thin_backbone())
    for number, sight in ((20, 1), (100, 0)):
        tensors["conv1.weight"] = sight * tensors["conv1.weight"]
        state = {f"visual.cnn.{name}": tensor for name, tensor in tensors.items()}
        torch.save({"model": state, "iteration": number}, folder / f"checkpoint_{number}.pth")
    (folder / "model_best.pth").write_bytes(b"not numbered")
    return folder


def test_a_folder_is_judged_on_while_it_grows(probe, checkpoints, voc, tmp_path, monkeypatch):
    words = ("DATA.ROOT", voc, "DATA.CLASSES", CLASSES, "MODEL.WEIGHTS", checkpoints)
    first = probe(*words, judge=probe_folder)
    assert list(first) == [19, 99]  # by number, not by name
    assert first[99]["mAP"] < 60 < first[19]["mAP"]
    content = (checkpoints / "checkpoint_20.pth").read_bytes()
    (checkpoints / "checkpoint_20.pth").unlink()  # as SOLVER.CHECKPOINT_KEEP_LAST does
    (checkpoints / "checkpoint_200.pth").write_bytes(content)
    judged = []
    real = folder._judge
    monkeypatch.setattr(folder, "_judge", lambda *a: judged.append(a[1]) or real(*a))
    second = probe(*words, judge=probe_folder, resume=True)
    assert [file.rpartition("/")[2] for file in judged] == ["checkpoint_200.pth"]
    assert second == {**first, 199: first[19]}
    with pytest.raises(InputError, match="INPUT.CROP was 32, now it is 24"):
        probe(*words, "INPUT.CROP", 24, judge=probe_folder, resume=True)
    with pytest.raises(InputError, match="holds the results.json of another run"):
        probe(*words, judge=probe_folder)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("TASK", "linear", "DATA.FORMAT", "folders"), "TASK voc_svm alone"),
        (("OUTPUT_DIR", "{folder}"), "would be replaced"),
        (("MODEL.WEIGHTS", "{voc}"), "a folder without checkpoints such as model_0001999.pth"),
    ],
)
def test_folders_that_cannot_be_judged_are_refused(probe, checkpoints, voc, opts, message):
    words = [word.format(folder=checkpoints, voc=voc) for word in opts]
    before = sorted(checkpoints.iterdir())
    with pytest.raises(InputError, match=message):
        probe("DATA.ROOT", voc, "MODEL.WEIGHTS", checkpoints, *words, judge=probe_folder)
    assert sorted(checkpoints.iterdir()) == before


@pytest.mark.slow
def test_two_processes_of_the_tool_judge_the_backbone_that_they_write(
    probing, probe, tmp_path, voc, run_python
):
    words = options(voc, tmp_path / "two", *probing)
    done = run_python("tools/pretrain_net.py", "--num-processes", 2, *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(s) for s in (tmp_path / "two/metrics.json").read_text().splitlines()]
    weights = ("MODEL.WEIGHTS", tmp_path / "two" / "backbone.safetensors")
    alone = probe("DATA.ROOT", voc, "DATA.CLASSES", CLASSES, *weights)
    assert [line["probe/mAP"] for line in lines if "probe/mAP" in line] == [alone["mAP"]]
    assert not (tmp_path / "two" / "probe").exists()


def test_what_cannot_be_judged_is_refused_before_the_run(make_trainer, probing, tmp_path, voc):
    with pytest.raises(InputError, match="^TEST.PROBE .*expected a VOC folder"):
        make_trainer("wrong", *probing, "TEST.PROBE.ROOT", tmp_path / "wrong")
    with pytest.raises(InputError, match="INPUT.RESIZE 16 is smaller"):
        make_trainer("wrong", *probing, "TEST.PROBE.RESIZE", 16)
    with pytest.raises(InputError, match="or TEST.PROBE .probe/mAP, probe/mAP11"):
        make_trainer("wrong", "TEST.BEST_METRIC", "probe/mAP")
    with pytest.raises(InputError, match="'probe/map' is none of .*probe/mAP11.*'probe/mAP'"):
        make_trainer("wrong", *probing, "TEST.BEST_METRIC", "probe/map", "DATA.VAL_IMAGES", "")
    best = ("TEST.BEST_METRIC", "probe/mAP", "DATA.VAL_IMAGES", voc / "JPEGImages")
    evaluating = options(voc, tmp_path, *probing, *best)
    PretrainTrainer(load_pretrain_config(None, evaluating), False)  # judges nothing
    with pytest.raises(InputError, match="only tools/pretrain_net.py"):
        make_trainer("wrong", *probing, build_probe=None)
