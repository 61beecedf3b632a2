"""The pretraining tool as users run it: train, stop, resume, evaluate, refuse."""

import io
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import get_pretrain_cfg, load_pretrain_config
from pretrain.methods.captioning.captioner import load_captioner
from pretrain.methods.captioning.tokenizer import Tokenizer, train_tokenizer
from pretrain.trainer import PretrainTrainer, _resolve_sizes
from tests.e2e.captioned_world import THIN_TOOL
from tests.e2e.forked_runs import shared_server
from tests.e2e.killing import kill_tree
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors
from virtex_d2.engine.loop import UpdateLoop

pytestmark = pytest.mark.usefixtures("thin_resnets")

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "pretrain_net.py"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


def write_captioned_images(folder: Path, num_images: int, split: str = "train") -> None:
    """Plain coloured images whose captions say the colour and the brighter side."""
    rng = np.random.RandomState(3)
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        colour = list(COLOURS)[i % 3]
        side = ("left", "right")[i // 3 % 2]
        pixels = np.full((48, 64, 3), COLOURS[colour], np.float32) * 0.6
        half = slice(0, 32) if side == "left" else slice(32, 64)
        pixels[:, half] *= 1.6
        pixels += rng.normal(0, 8, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 48, "width": 64})
        for text in (
            f"a {colour} picture bright on the {side}",
            f"the {side} of it is bright {colour}",
        ):
            annotations.append({"id": len(annotations), "image_id": i, "caption": text})
    (folder / f"{split}.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )


@pytest.fixture(scope="module")
def captioned_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    write_captioned_images(folder, 24)
    write_captioned_images(folder, 9, "val")
    return folder


def options(data: Path, output: Path, *more: object) -> list[str]:
    pairs = {
        "OUTPUT_DIR": output,
        "MODEL.DEVICE": "cpu",
        "MODEL.VISUAL.NAME": "resnet18",
        "MODEL.TEXTUAL.HIDDEN_SIZE": 64,
        "DATA.TRAIN_CAPTIONS": data / "train.json",
        "DATA.TRAIN_IMAGES": data / "train",
        "DATA.VAL_CAPTIONS": data / "val.json",
        "DATA.VAL_IMAGES": data / "val",
        "DATA.VOCAB_SIZE": 48,
        "DATA.IMAGE_SIZE": 32,
        "DATA.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 12,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 4,
        "TEST.EVAL_PERIOD": 6,
        "TEST.IMS_PER_BATCH": 8,
        "LOG_PERIOD": 2,
    }
    pairs.update(zip(more[0::2], more[1::2], strict=True))
    return [str(part) for pair in pairs.items() for part in pair]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*arguments: str, tool: Path = THIN_TOOL) -> subprocess.CompletedProcess:
    return shared_server().run([str(tool), *arguments], environment())


def final_model(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished_run(captioned_images, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "output"
    done = run(*options(captioned_images, output))
    assert done.returncode == 0, done.stderr
    return output


def test_a_run_leaves_what_the_next_step_needs(finished_run):
    tensors, metadata = read_safetensors(finished_run / "backbone.safetensors")
    assert metadata["format"] == "virtex_d2.backbone"
    assert metadata["architecture"] == "resnet18"
    assert metadata["iteration"] == "12"
    assert metadata["channel_order"] == "RGB"
    assert metadata["stride_in_1x1"] == "false"
    trained = final_model(finished_run)
    assert "layer4.0.bn2.running_var" in tensors
    for name, tensor in tensors.items():
        assert torch.equal(tensor, trained[f"visual.cnn.{name}"]), name
    left_out = {n.removeprefix("visual.cnn.") for n in trained if n.startswith("visual.cnn.")}
    assert all(n.endswith("num_batches_tracked") for n in left_out - set(tensors))

    for name in ("config.yaml", "log.txt", "tokenizer.model", "last_checkpoint"):
        assert (finished_run / name).is_file(), name
    lines = metrics(finished_run)
    last = {key: value for line in lines for key, value in line.items()}
    for key in (
        "loss_captioning_forward",
        "loss_captioning_backward",
        "lr",
        "lr_cnn",
        "data_time",
        "val/loss",
        "val/perplexity_captioning_forward",
        "val/unigram_entropy",
    ):
        assert np.isfinite(last[key]), key
    log = (finished_run / "log.txt").read_text()
    assert "iter: 11" in log
    assert "images/s" in log
    assert "lr_cnn" in log


def test_validation_draws_captions_for_tensorboard(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()["images"]
    assert len(tags) == 8
    steps = [event.step for event in events.Images(tags[0])]
    assert len(steps) == 2, "one picture each of the validations at 6 and at the end"
    picture = Image.open(io.BytesIO(events.Images(tags[0])[0].encoded_image_string))
    assert picture.width == 224


def test_a_killed_run_resumes_to_bit_identical_weights(captioned_images, finished_run, tmp_path):
    output = tmp_path / "output"
    arguments = options(captioned_images, output, "DATA.NUM_WORKERS", 1)
    process = shared_server().start([str(THIN_TOOL), *arguments], environment(), tmp_path / "log")
    deadline = time.time() + 120
    while not (output / "last_checkpoint").exists() and time.time() < deadline:
        assert not process.poll()
        time.sleep(0.005)
    kill_tree(process.pid)
    process.wait()
    assert not (output / "model_final.pth").exists(), "the run ended before it could be killed"

    done = run("--resume", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Resumed after iteration" in (output / "log.txt").read_text()
    whole, resumed = final_model(finished_run), final_model(output)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_a_damaged_last_checkpoint_costs_iterations_and_changes_nothing(
    captioned_images, finished_run, tmp_path
):
    """Two checkpoints of the finished run are damaged, the third is gone."""
    output = Path(shutil.copytree(finished_run, tmp_path / "output"))
    for name in ("model_final.pth", "model_0000011.pth"):
        content = bytearray((output / name).read_bytes())
        content[len(content) // 2] ^= 1
        (output / name).write_bytes(content)
    (output / "model_0000007.pth").unlink()
    done = run("--resume", *options(captioned_images, output, "SOLVER.CHECKPOINT_KEEP_LAST", 1))
    assert done.returncode == 0, done.stderr
    assert "THE LAST CHECKPOINT CANNOT BE USED" in done.stdout
    assert f"from an older one, {output}/model_0000003.pth" in done.stdout
    assert "Resumed after iteration 3" in (output / "log.txt").read_text()
    whole, resumed = final_model(finished_run), final_model(output)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    backbones = [read_safetensors(f / "backbone.safetensors")[0] for f in (finished_run, output)]
    assert all(torch.equal(backbones[0][name], backbones[1][name]) for name in backbones[0])
    assert [path.name for path in output.glob("model_0*.pth")] == ["model_0000011.pth"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("MODEL.OBJECTIVE", "captioning"),
            "MODEL.OBJECTIVE was bicaptioning, now it is captioning",
        ),
        (("SOLVER.MAX_ITER", 24), "SOLVER.MAX_ITER was 12, now it is 24"),
        (("DATA.FRACTION", 0.5), "training images was 24, now it is 12"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(
    captioned_images, finished_run, tmp_path, changes, message
):
    output = Path(shutil.copytree(finished_run, tmp_path / "output"))
    before = (output / "model_final.pth").read_bytes()
    config = (output / "config.yaml").read_bytes()
    done = run("--resume", *options(captioned_images, output, *changes))
    assert_refused(done, message)
    assert (output / "model_final.pth").read_bytes() == before
    assert (output / "config.yaml").read_bytes() == config


def test_a_finished_run_that_is_resumed_ends_well_with_its_backbone(
    captioned_images, finished_run, tmp_path
):
    """The last job of a chain must not fail."""
    output = Path(shutil.copytree(finished_run, tmp_path / "output"))
    before = (output / "metrics.json").read_bytes()
    backbone = output / "backbone.safetensors"
    whole, _ = read_safetensors(backbone)
    backbone.unlink()
    same_numbers = ("MODEL.VISUAL.RECOMPUTE", "blocks")
    done = run("--resume", *options(captioned_images, output, *same_numbers))
    assert done.returncode == 0, done.stderr
    assert "there is nothing to train" in (output / "log.txt").read_text()
    written, _ = read_safetensors(backbone)
    assert written.keys() == whole.keys()
    assert all(torch.equal(written[name], whole[name]) for name in whole)
    assert (output / "metrics.json").read_bytes() == before


def test_evaluation_alone_repeats_the_last_validation(captioned_images, finished_run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished_run.glob("*.pth")}
    done = run("--eval-only", *options(captioned_images, finished_run))
    assert done.returncode == 0, done.stderr
    last = [line["val/loss"] for line in metrics(finished_run) if "val/loss" in line][-1]
    assert f"loss: {last:.4g} " in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.glob("*.pth")}


def test_the_best_checkpoint_is_that_of_the_lowest_validation_also_after_a_resume(
    captioned_images, tmp_path
):
    """A learning rate that ruins the second half: the best is not the last."""
    output = tmp_path / "output"
    arguments = options(
        *(captioned_images, output, "TEST.BEST_METRIC", "val/loss", "TEST.EVAL_PERIOD", 2),
        *("SOLVER.WARMUP_ITERS", 11, "SOLVER.BASE_LR", 3.0, "SOLVER.LOOKAHEAD.ENABLED", False),
    )
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    losses = {m["iteration"]: m["val/loss"] for m in metrics(output) if "val/loss" in m}
    best = min(losses, key=losses.get)
    assert best < max(losses), losses
    assert torch.load(output / "model_best.pth", weights_only=True)["iteration"] == best
    assert read_safetensors(output / "backbone_best.safetensors")[1]["iteration"] == str(best + 1)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"

    # as if stopped after iteration 8, whose checkpoint knows of a better one before it
    for name in ("model_final.pth", "model_best.pth"):
        (output / name).unlink()
    (output / "last_checkpoint").write_text("model_0000007.pth")
    done = run("--resume", *arguments)
    assert done.returncode == 0, done.stderr
    assert (output / "model_best.pth").exists() == (best > 7)


def refused(message: str, *arguments: str, evaluate: bool = False) -> None:
    """In this process: the config, its trainer or what it loads is refused."""
    with pytest.raises(InputError, match=message):
        trainer = PretrainTrainer(load_pretrain_config(None, arguments), not evaluate)
        if evaluate:
            trainer.load_for_evaluation()
        else:
            trainer.resume_or_load(resume=False)


def test_evaluation_without_weights_is_refused(captioned_images, finished_run, tmp_path):
    words = ("DATA.TOKENIZER", finished_run / "tokenizer.model")
    given = options(captioned_images, tmp_path / "none", *words)
    refused("nothing to evaluate", *given, evaluate=True)


def test_a_checkpoint_of_another_model_is_refused_by_tensor(
    captioned_images, finished_run, tmp_path
):
    weights = ("MODEL.WEIGHTS", finished_run / "model_final.pth")
    given = options(captioned_images, tmp_path, *weights, "MODEL.TEXTUAL.HIDDEN_SIZE", 128)
    refused(r"textual.visual_projection.weight has shape \(64, 128\)", *given)


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf"])
def test_a_loss_that_is_no_number_says_truly_whether_there_is_a_checkpoint(tmp_path, loss):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop = UpdateLoop(model, optimizer, iter, folder=str(tmp_path))
    for words in (f"{tmp_path} has no checkpoint yet", f"last checkpoint in {tmp_path} is from"):
        with pytest.raises(
            InputError, match=f"at iteration 3: total_loss {loss}.*{words}.*: lower"
        ):
            loop._check(3, {"total_loss": float(loss)})
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")


def test_another_vocabulary_of_the_same_size_is_refused(captioned_images, finished_run, tmp_path):
    """Every tensor fits, and every number would mean another word."""
    size = Tokenizer(finished_run / "tokenizer.model").vocab_size
    words = [f"{a}{b}{c}" for a in "zxq" for b in "aeiou" for c in "wvk"]
    others = [" ".join(words[i : i + 4]) for i in range(40)]
    train_tokenizer(others, size, tmp_path / "other.model")
    other = ("DATA.TOKENIZER", tmp_path / "other.model")
    message = "trained with another vocabulary.*Nothing was loaded"
    refused(message, *options(captioned_images, finished_run, *other), evaluate=True)
    weights = ("MODEL.WEIGHTS", finished_run / "model_final.pth")
    refused(message, *options(captioned_images, tmp_path / "output", *weights, *other))
    with pytest.raises(InputError, match="trained with another vocabulary"):
        load_captioner(str(finished_run), tokenizer=str(tmp_path / "other.model"), device="cpu")


def test_a_folder_with_another_run_is_refused_without_resume(captioned_images, finished_run):
    done = run(*options(captioned_images, finished_run))
    assert_refused(done, str(finished_run), "--resume")


def test_a_truncated_image_is_skipped_with_a_count_and_many_are_refused(captioned_images, tmp_path):
    data = tmp_path / "data"
    write_captioned_images(data, 24)
    write_captioned_images(data, 3, "val")
    broken = data / "train" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    done = run(*options(data, tmp_path / "few", "DATA.MAX_SKIPPED_SHARE", 0.05), tool=TOOL)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "few" / "log.txt").read_text()
    assert str(broken) in log
    assert "images_skipped: 1" in log

    done = run(*options(data, tmp_path / "none", "DATA.MAX_SKIPPED_SHARE", 0.0))
    assert_refused(done, "7.jpg", "1 of 24", "DATA.MAX_SKIPPED_SHARE")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("MODEL.OBJECTVE", "captioning"), "MODEL.OBJECTIVE"),
        (("SOLVER.MAX_ITER", "many"), "SOLVER.MAX_ITER"),
        (("SOLVER.WARMUP_ITERS", 12), "SOLVER.WARMUP_ITERS"),
        (("SOLVER.AMP.DTYPE", "float16"), "needs a GPU"),
        (("DATA.TRAIN_CAPTIONS", ""), "DATA.TRAIN_CAPTIONS"),
        (("DATA.TRAIN_CAPTIONS", "absent.json"), "absent.json"),
        (("MODEL.WEIGHTS", "absent.pth"), "absent.pth"),
        (("TEST.BEST_METRIC", "val/los"), "'val/loss'"),
        (("MODEL.OBJECTIVE", "multilabel_classification"), "DATA.TRAIN_LABELS"),
    ],
)
def test_bad_input_is_refused_by_key(captioned_images, tmp_path, changes, message):
    refused(re.escape(message), *options(captioned_images, tmp_path / "output", *changes))


def assert_refused(done: subprocess.CompletedProcess, *messages: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for message in messages:
        assert message in done.stderr


@pytest.mark.parametrize(
    ("images", "processes", "possible"), [(5, 2, "4 or 6"), (2, 4, "4"), (256, 24, "240 or 264")]
)
def test_a_batch_that_the_processes_cannot_share_is_refused_with_one_that_they_can(
    images, processes, possible, monkeypatch
):
    monkeypatch.setattr("pretrain.trainer.comm.get_world_size", lambda: processes)
    cfg = get_pretrain_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.IMS_PER_BATCH = images
    message = f"IMS_PER_BATCH is {images}, .* set it to {possible}, or set"
    with pytest.raises(InputError, match=message):
        PretrainTrainer(cfg)


def scaled_config(**solver):
    cfg = get_pretrain_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def test_the_recipe_of_eight_processes_is_scaled_to_two_by_the_rule_of_detectors(
    monkeypatch, caplog
):
    monkeypatch.setattr("pretrain.trainer.comm.get_world_size", lambda: 2)
    cfg = scaled_config(ACCUMULATE=4, CHECKPOINT_KEEP_EVERY=100)
    cfg.TEST.PROBE.PERIOD = 500
    with caplog.at_level("INFO"):
        scaled = _resolve_sizes(cfg)
    solver = scaled.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.WARMUP_ITERS) == (64, 2000000, 40000)
    assert (solver.BASE_LR, solver.CNN_LR) == (0.00025, 0.05)
    assert (solver.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (8000, 8000)
    assert (solver.CHECKPOINT_KEEP_EVERY, scaled.TEST.PROBE.PERIOD) == (400, 2000)
    assert "STEPS" not in solver
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.CNN_LR) == (256, 0.2), "what was given stays"
    assert (
        "An iteration is one update from 64 images: 2 processes x 4 passes x 8; learning rate "
        "0.00025, of the CNN 0.05, warm-up 40000, 2000000 iterations; scaled from 8 processes "
        "with 256 images, learning rate 0.001 and 0.2 and 500000 iterations." in caplog.text
    )
    monkeypatch.setattr("pretrain.trainer.comm.get_world_size", lambda: 8)
    assert _resolve_sizes(cfg) is cfg


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"OPTIMIZER": "adamw"}, "a rule for sgd.*SOLVER.ACCUMULATE keeps batch"),
        ({"REFERENCE_WORLD_SIZE": 7}, "REFERENCE_WORLD_SIZE is 7.*256 is shared equally"),
        ({"ACCUMULATE": 0}, "SOLVER.ACCUMULATE is 0"),
        ({"ACCUMULATE": 3}, "the 32 images that each of 1 process .* 1, 2, 4, 8, 16, 32"),
        ({"REFERENCE_WORLD_SIZE": 0, "IMS_PER_BATCH": 0}, "IMS_PER_BATCH is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(solver, message):
    with pytest.raises(InputError, match=message):
        _resolve_sizes(scaled_config(**solver))
