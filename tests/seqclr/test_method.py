"""SeqCLR on the engine: it trains, resumes, exports, and starts from other networks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from pretrain.config import load_pretrain_config
from pretrain.methods.method import build_method
from pretrain.methods.seqclr.encoder import build_encoder, frozen_frames, load_encoder, read_encoder
from pretrain.methods.seqclr.loss import nt_xent
from pretrain.trainer import PretrainTrainer
from tests.seqclr.images import write_words
from virtex_d2.checkpoint.source import Source
from virtex_d2.checkpoint.transfer import load_backbone
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors

ROOT = Path(__file__).resolve().parents[2]
OPTS = """MODEL.OBJECTIVE seqclr MODEL.DEVICE cpu MODEL.VISUAL.NAME resnet18 DATA.WORD_SIZE (16,32)
DATA.NUM_WORKERS 0 SOLVER.OPTIMIZER adamw SOLVER.CNN_LR 0.001 SOLVER.IMS_PER_BATCH 4
SOLVER.MAX_ITER 6 SOLVER.WARMUP_ITERS 1 SOLVER.CHECKPOINT_PERIOD 3 TEST.IMS_PER_BATCH 3
TEST.EVAL_PERIOD 3 LOG_PERIOD 1 SEQCLR.WINDOWS 3 SOLVER.AMP.ENABLED False
SOLVER.LOOKAHEAD.ENABLED False"""
TINY = OPTS.split()


def config(*more: object):
    return load_pretrain_config(None, [*TINY, *map(str, more)])


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_words(folder / "train", 9)
    write_words(folder / "val", 5, seed=100)
    return folder


def of(words: Path) -> list[object]:
    return ["DATA.WORDS", [str(words / "train")], "DATA.VAL_WORDS", [str(words / "val")]]


def train_here(output: Path, *more: object) -> PretrainTrainer:
    output.mkdir(exist_ok=True)
    trainer = PretrainTrainer(config("OUTPUT_DIR", output, *more))
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(words, tmp_path_factory) -> Path:
    """A run with BiLSTMs."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    train_here(output, *of(words), "ENCODER.CONTEXT", "bilstm")
    return output


def final(output: Path) -> dict:
    return torch.load(output / "model_final.pth", weights_only=True)


def as_if_stopped(whole: Path, output: Path) -> Path:
    shutil.copytree(whole, output)
    for name in ("model_final.pth", "model_0000005.pth"):
        (output / name).unlink()
    (output / "last_checkpoint").write_text("model_0000002.pth")
    return output


def differing(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(words, run, tmp_path):
    resumed = as_if_stopped(run, tmp_path / "resumed")
    train_here(resumed, *of(words), "ENCODER.CONTEXT", "bilstm")
    assert differing(final(run)["model"], final(resumed)["model"]) == []
    moments, again = (final(f)["optimizer"]["state"] for f in (run, resumed))
    assert all(torch.equal(m["exp_avg"], again[i]["exp_avg"]) for i, m in moments.items())
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    assert {"val/loss_contrast", "val/pair_accuracy"} <= {key for line in lines for key in line}


@pytest.mark.slow
def test_two_processes_resume_to_the_bit_and_with_synchronised_norms_train_what_one_does(
    words, tmp_path, run_python
):
    # sgd: where a gradient is next to nothing, the others divide it by its own size
    more = [*of(words), "MODEL.VISUAL.NORM", "SyncBN", "SOLVER.OPTIMIZER", "sgd"]
    more += ["SOLVER.CNN_LR", 0.02, "SOLVER.BASE_LR", 0.02]

    def start(output: Path, *flags: str) -> None:
        opts = ["OUTPUT_DIR", output, *TINY, *more]
        done = run_python("tools/pretrain_net.py", "--num-processes", 2, *flags, *opts, cwd=ROOT)
        assert done.returncode == 0, done.stderr

    start(tmp_path / "whole")
    start(as_if_stopped(tmp_path / "whole", tmp_path / "resumed"), "--resume")
    assert differing(*(final(tmp_path / f)["model"] for f in ("whole", "resumed"))) == []
    alone = train_here(tmp_path / "alone", *more).method
    began = dict(build_method_at_start(*more).named_parameters())
    found = final(tmp_path / "whole")["model"]
    for name, parameter in alone.named_parameters():
        moved = (parameter - began[name]).norm()
        assert moved > 0, name
        assert (parameter - found[name]).norm() < 0.01 * moved, name


def build_method_at_start(*more: object):
    cfg = config(*more)
    torch.manual_seed(cfg.SEED)
    return build_method(cfg)


@pytest.mark.slow
def test_loss_and_gradients_of_two_processes_are_those_of_one(tmp_path, run_python):
    done = run_python("tests/seqclr/two_processes.py", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_loss_does_not_care_which_view_is_first_but_whose_views_are_a_pair(words):
    cfg = config(*of(words))
    torch.manual_seed(0)
    method = build_method(cfg)
    with torch.no_grad():
        views = torch.randn(6, 3, 16, 32)
        one, other = method.instances(torch.cat([views, views + 0.3 * torch.randn(6, 3, 16, 32)]))[
            :12
        ].chunk(2)
    loss, found = nt_xent(one, other, 0.1)
    swapped, _ = nt_xent(other, one, 0.1)
    torch.testing.assert_close(loss, swapped)
    false, unfound = nt_xent(one, other.roll(1, 0), 0.1)
    assert false > loss + 1
    assert unfound < found


def test_a_sample_is_a_function_of_seed_and_position_and_its_views_differ(words, tmp_path):
    samples = [
        PretrainTrainer(config(*of(words), "OUTPUT_DIR", tmp_path)).data.train[7] for _ in range(2)
    ]
    for key in ("image", "draws", "noise"):
        assert torch.equal(samples[0][key], samples[1][key])
    assert samples[0]["image"].shape == (3, 16, 32)
    trainer = PretrainTrainer(config(*of(words), "OUTPUT_DIR", tmp_path))
    method, loaded = trainer.method, trainer.data.train
    together = method.prepare(loaded.samples.collate([loaded[i] for i in range(4)]))["image"]
    alone = method.prepare(loaded.samples.collate([loaded[2]]))["image"]
    assert together.shape == (8, 3, 16, 32)
    torch.testing.assert_close(together[[2, 6]], alone)
    assert (alone[0] - alone[1]).abs().mean() > 0.1
    plain = PretrainTrainer(config(*of(words), "OUTPUT_DIR", tmp_path, "SEQCLR.STYLE", False))
    assert "noise" not in plain.data.train[7]


def test_frames_are_columns_of_the_map_and_validation_uses_running_statistics(run):
    encoder, size = read_encoder(str(run / "encoder.safetensors"), joined=True)
    assert size == (16, 32)
    pixels = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    frames = frozen_frames(encoder.train(), pixels)
    assert encoder.training
    assert differing(before, encoder.state_dict()) == []
    assert frames.shape == (2, 8, encoder.out_features) == (2, 8, 512 + 256)
    torch.testing.assert_close(frozen_frames(encoder, pixels[:1]), frames[:1])
    narrow = frozen_frames(encoder, pixels[..., :16])
    assert narrow.shape[1] == 4


def test_both_files_hold_what_was_trained_and_a_detector_takes_the_backbone(run, detector_config):
    trained = final(run)["model"]
    tensors, metadata = read_safetensors(run / "encoder.safetensors")
    assert metadata["training_strides"] == "layer2 2x1, layer3 2x1, layer4 2x1"
    assert metadata["context"] == "bilstm"
    own = {k.removeprefix("encoder."): t for k, t in trained.items() if k.startswith("encoder.")}
    own = {k: t for k, t in own.items() if not k.endswith("num_batches_tracked")}
    assert differing(own, tensors) == []

    tensors, metadata = read_safetensors(run / "backbone.safetensors")
    assert (metadata["architecture"], metadata["crop"]) == ("resnet18", "16x32")
    assert torch.equal(tensors["conv1.weight"], trained["encoder.visual.cnn.conv1.weight"])
    cfg = detector_config()
    report = load_backbone(build_model(cfg), Source(str(run / "backbone.safetensors")), cfg)
    assert len(report.loaded) == 100
    assert report.probe
    assert max(report.probe.values()) < 1e-5


def start_of(words: Path, tmp_path: Path, weights: object, *more: object) -> dict:
    cfg = config(*of(words), "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", weights, *more)
    trainer = PretrainTrainer(cfg)
    trainer.load_weights()
    return trainer.method.state_dict()


def test_it_starts_from_any_resnet_an_encoder_or_a_whole_run(words, run, backbone_file, tmp_path):
    resnet = backbone_file("resnet18")
    found = start_of(words, tmp_path, resnet)
    tensors, _ = read_safetensors(resnet)
    assert all(torch.equal(found[f"encoder.visual.cnn.{k}"], t) for k, t in tensors.items())

    torch.save({"state_dict": tensors}, tmp_path / "elsewhere.pth")
    found = start_of(words, tmp_path, tmp_path / "elsewhere.pth", "ENCODER.CONTEXT", "bilstm")
    assert all(torch.equal(found[f"encoder.visual.cnn.{k}"], t) for k, t in tensors.items())

    trained = final(run)["model"]
    for name in ("encoder.safetensors", "model_final.pth"):
        found = start_of(words, tmp_path, run / name, "ENCODER.CONTEXT", "bilstm")
        named = [n for n in trained if not n.endswith("num_batches_tracked")]
        assert all(torch.equal(found[n], trained[n]) for n in named)


def test_what_does_not_fit_is_refused_and_nothing_loaded(run, backbone_file, tmp_path):
    cfg = config()
    encoder = build_encoder(cfg)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    msra = "other pixels than pretraining's.*INPUT.FORMAT BGR, here RGB;.*MODEL.PIXEL_STD"
    cases = {
        backbone_file("resnet34"): "holds a resnet34, and MODEL.VISUAL.NAME is resnet18",
        backbone_file(
            "resnet18", channel_order="BGR", pixel_mean="103.53,116.28,123.675", pixel_std="1,1,1"
        ): msra,
        run / "model_final.pth": "a whole run's checkpoint. Give the encoder.safetensors",
        run / "encoder.safetensors": "an encoder with ENCODER.CONTEXT bilstm, where this .* none",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_encoder(encoder, str(path), cfg)
    with pytest.raises(InputError, match="expected an encoder.safetensors .* virtex_d2.backbone"):
        read_encoder(str(run / "backbone.safetensors"))
    assert differing(before, encoder.state_dict()) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SEQCLR.MAPPING", "windows", "'windows' is not one of all, window, frame.*'window'"),
        ("SEQCLR.PROJECTION", "lstm", "'lstm' is not one of none, linear, mlp, bilstm"),
        ("SEQCLR.WINDOWS", 9, "expected 1 to 8, the frames of a word of 32 pixels.* found 9"),
        ("SOLVER.IMS_PER_BATCH", 1, "expected 2 or more"),
        ("SEQCLR.TEMPERATURE", 0, "expected more than 0"),
        ("SEQCLR.PROJECTION_SIZE", -1, "expected channels, or 0"),
        ("SEQCLR.AUGMENT.NUMBER", "(0, 8)", "NUMBER: expected a range within 0 and 7"),
        ("SEQCLR.AUGMENT.CROP_VERTICAL", "(0.4, 0.1)", r"found \(0.4, 0.1\)"),
        ("ENCODER.CONTEXT", "lstm", "'lstm' is not one of none, bilstm"),
        ("ENCODER.JOINED", True, "ENCODER.CONTEXT none: there is nothing to join"),
        ("DATA.WORD_SIZE", "(8, 100)", "each of at least 16 pixels"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(key, value, message):
    with pytest.raises(InputError, match=f"{key}.*{message}|{message}"):
        build_method(config(key, value))
