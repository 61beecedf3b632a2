"""Anybody's methods: a module and a config, and nothing changed elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pretrain.config import load_pretrain_config
from pretrain.methods.method import METHODS, Method, build_method, find_method, import_method
from pretrain.trainer import PretrainTrainer
from tests.e2e.captioned_world import THIN_TOOL
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_safetensors

pytestmark = pytest.mark.usefixtures("thin_resnets")

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    "reconstruction": "tests.methods.reconstruction:Reconstruction",
    "taking_turns": "tests.methods.taking_turns:TakingTurns",
}
CONFIG = """\
MODEL: {{OBJECTIVE: "{method}", DEVICE: cpu, VISUAL: {{NAME: resnet18}}}}
DATA: {{FORMAT: images, TRAIN_IMAGES: {data}/train, VAL_IMAGES: {data}/val, IMAGE_SIZE: 64,
       NUM_WORKERS: 0}}
SOLVER: {{OPTIMIZER: adamw, CNN_LR: 0.001, IMS_PER_BATCH: 4, MAX_ITER: 6, WARMUP_ITERS: 1,
         CHECKPOINT_PERIOD: 3}}
TEST: {{IMS_PER_BATCH: 2, EVAL_PERIOD: 3, BEST_METRIC: val/{metric}}}
LOG_PERIOD: 1
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images of which nothing is said; five to validate on, which two processes share unequally."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        (folder / split).mkdir()
        for i in range(count):
            pixels = np.full((70, 80, 3), rng.integers(0, 256, 3), np.uint8)
            pixels[10:50, 20:60] = rng.integers(0, 256, 3)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
    return folder


def write_config(folder: Path, images: Path, name: str, more: str = "") -> Path:
    metric = {"reconstruction": "psnr", "taking_turns": "accuracy"}[name]
    text = CONFIG.format(method=CLASSES[name], data=images, metric=metric)
    (folder / "config.yaml").write_text(text + more)
    return folder / "config.yaml"


def train_here(config: Path, output: Path, *more: str) -> PretrainTrainer:
    cfg = load_pretrain_config(str(config), ["OUTPUT_DIR", str(output), *more])
    output.mkdir(exist_ok=True)
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


def final(output: Path) -> dict:
    return torch.load(output / "model_final.pth", weights_only=True)


def tensors(content, at: str = "") -> dict[str, torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return {at: content}
    items = content.items() if isinstance(content, dict) else ()
    if isinstance(content, list):
        items = enumerate(content)
    return {k: t for key, value in items for k, t in tensors(value, f"{at}/{key}").items()}


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def as_if_stopped(whole: Path, output: Path) -> Path:
    """The folder of a run that was killed behind its first checkpoint."""
    shutil.copytree(whole, output)
    for name in ("model_final.pth", "model_0000005.pth"):
        (output / name).unlink()
    (output / "last_checkpoint").write_text("model_0000002.pth")
    return output


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", CLASSES)
def test_it_trains_and_resumes_to_the_bit_and_exports(
    images, tmp_path, run_python, name, processes
):
    config = write_config(tmp_path, images, name)
    whole = tmp_path / "whole"
    if processes == 1:
        train_here(config, whole)
        train_here(config, as_if_stopped(whole, tmp_path / "resumed"))
    else:

        def run(output: Path, *more: str) -> None:
            flags = ["--config-file", config, *more, "OUTPUT_DIR", output]
            done = run_python(THIN_TOOL, *flags, processes=processes, cwd=ROOT)
            assert done.returncode == 0, done.stderr

        run(whole)
        run(as_if_stopped(whole, tmp_path / "resumed"), "--resume")

    one, other = tensors(final(whole)), tensors(final(tmp_path / "resumed"))
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    lines = metrics(whole)
    losses = [{key for key in line if key.startswith("loss_")} for line in lines]
    validated = {key for line in lines for key in line if key.startswith("val/")}
    method = import_method(CLASSES[name])
    assert validated >= {"val/loss", *(f"val/{n}" for n in (*method.losses, *method.metrics))}
    if name == "taking_turns":
        assert losses == [{"loss_maximum"}, {"loss_mean"}] * 3
    backbone, metadata = read_safetensors(whole / "backbone.safetensors")
    assert torch.equal(backbone["conv1.weight"], final(whole)["model"]["visual.cnn.conv1.weight"])
    assert metadata["source"] == f"pretrain {CLASSES[name]}"
    if name == "reconstruction":
        restorer, metadata = read_safetensors(whole / "restorer.safetensors")
        assert list(restorer) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert (metadata["width"], metadata["iteration"]) == ("8", "6")
        best = max((line["val/psnr"], line["iteration"]) for line in lines if "val/psnr" in line)
        kept = torch.load(whole / "model_best.pth", weights_only=True)
        assert kept["iteration"] == best[1], "the highest PSNR is the best"


def test_a_run_from_a_resnet_of_torchvisions_layout_begins_there_and_resumes_to_the_bit(
    images, tmp_path, monkeypatch
):
    monkeypatch.undo()  # no thin ResNet: which one a file holds is told by its stages
    weights = tmp_path / "resnet18.pth"
    torch.manual_seed(3)
    given = torchvision.models.resnet18().state_dict()
    torch.save(given, weights)
    config = write_config(tmp_path, images, "reconstruction")
    more = ("MODEL.WEIGHTS", str(weights))
    cfg = load_pretrain_config(str(config), ["OUTPUT_DIR", str(tmp_path / "run"), *more])
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume=False)
    # the slow weights, too: else Lookahead's first step leads half way back
    slow = dict(zip((id(p) for p in trainer.lookahead._fast), trainer.lookahead._slow))
    cnn = trainer.method.visual.cnn
    assert all(torch.equal(tensor, given[name]) for name, tensor in cnn.state_dict().items())
    assert all(torch.equal(slow[id(p)], given[name]) for name, p in cnn.named_parameters())

    whole = tmp_path / "whole"
    train_here(config, whole, *more)
    weights.unlink()
    train_here(config, as_if_stopped(whole, tmp_path / "resumed"), *more)
    one, other = tensors(final(whole)), tensors(final(tmp_path / "resumed"))
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_metric_is_a_mean_by_weight_over_batches(images, tmp_path):
    """Batches of two, two and one image."""
    trainer = train_here(write_config(tmp_path, images, "taking_turns"), tmp_path / "run")
    method, val = trainer.method.eval(), trainer.data.val
    right = []
    for first in (0, 2, 4):
        batch = trainer.data.samples.collate([val[i] for i in range(first, min(first + 2, 5))])
        mean, count = trainer._measure(batch)["accuracy"]
        right.append(mean.item() * count)
    assert trainer.evaluate()["accuracy"] == pytest.approx(sum(right) / 5)
    assert method.training is False


def test_a_loss_over_the_instances_of_all_processes_has_the_gradient_of_one(tmp_path, run_python):
    done = run_python("tests/methods/gathered.py", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_passes_are_as_many_processes_and_synchronised_norms_make_processes_one(
    images, tmp_path, run_python
):
    train = images / "train"
    done = run_python("tests/methods/in_passes.py", train, tmp_path, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_method_that_may_compare_instances_refuses_passes(images, tmp_path):
    config = write_config(tmp_path, images, "taking_turns")
    for passes, message in (("2", "sees a batch whole.*in_passes"), ("3", "possible are 1, 2, 4")):
        with pytest.raises(InputError, match=message):
            more = ["OUTPUT_DIR", str(tmp_path), "SOLVER.ACCUMULATE", passes]
            PretrainTrainer(load_pretrain_config(str(config), more))


def test_a_methods_keys_are_known_and_its_new_head_may_start_anew(images, tmp_path):
    config = write_config(tmp_path, images, "reconstruction", "RECONSTRUCTION: {WIDTH: 4}\n")
    derived = tmp_path / "derived.yaml"
    derived.write_text("_BASE_: config.yaml\nSOLVER: {MAX_ITER: 3}\n")
    trained = train_here(derived, tmp_path / "run")
    assert trained.method.decoder[0].out_channels == 4

    weights = str(tmp_path / "run" / "model_final.pth")
    more = ("MODEL.WEIGHTS", weights, "RECONSTRUCTION.WIDTH", "6")
    other = PretrainTrainer(load_pretrain_config(str(config), ["OUTPUT_DIR", str(tmp_path), *more]))
    fresh = other.method.decoder[0].weight.clone()
    other.load_weights()
    assert torch.equal(other.method.decoder[0].weight, fresh)
    assert torch.equal(other.method.visual.cnn.conv1.weight, trained.method.visual.cnn.conv1.weight)
    with pytest.raises(InputError, match=r"decoder.0.weight has shape \(4, 128, 1, 1\)"):
        other.load_for_evaluation()
    with pytest.raises(InputError, match="WIDHT.*'RECONSTRUCTION.WIDTH'"):
        load_pretrain_config(str(config), ["RECONSTRUCTION.WIDHT", "6"])


def test_the_example_of_the_docs_is_a_method_that_computes_what_is_tested_here():
    text = (ROOT / "docs" / "methods.md").read_text()
    scope: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    cfg = load_pretrain_config(None, ["MODEL.OBJECTIVE", CLASSES["reconstruction"]])
    cfg.MODEL.VISUAL.NAME, cfg.MODEL.DEVICE = "resnet18", "cpu"
    assert cfg.RECONSTRUCTION.WIDTH == 8
    tested = build_method(cfg).eval()
    documented = scope["Reconstruction"](cfg, 0).eval()
    documented.load_state_dict(tested.state_dict())
    batch = {"image": torch.randn(2, 3, 64, 64)}
    with torch.no_grad():
        assert documented.measure(batch) == tested.measure(batch)


def test_every_word_names_a_method_that_says_what_it_is():
    for word in METHODS:
        method = import_method(word)
        assert issubclass(method, Method)
        assert method.__doc__ != Method.__doc__


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bicaptoning", "'bicaptoning' is not one of .*package.module:Class.*'bicaptioning'"),
        ("tests.methods.nothing:Method", "cannot be imported: No module named.*PYTHONPATH"),
        ("tests.methods.taking_turns:Turns", "cannot be imported: .*'Turns'"),
        ("tests.methods.taking_turns:HEADS", "expected a subclass of Method"),
    ],
)
def test_a_method_that_is_not_there_is_refused_by_name(name, message):
    with pytest.raises(InputError, match=message):
        import_method(name)


def test_a_captioner_refuses_images_without_captions(images, tmp_path):
    config = write_config(tmp_path, images, "reconstruction")
    more = ["MODEL.OBJECTIVE", "bicaptioning", "TEST.BEST_METRIC", "", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_pretrain_config(str(config), more)
    assert build_method(cfg, 50).directions == ("forward", "backward")
    with pytest.raises(InputError, match="8 of 8 images have no caption"):
        PretrainTrainer(cfg)
    assert find_method(cfg).losses == ()
