"""A training step keeps nobody waiting, and numbers that are read late are right."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import optim
from pretrain import transforms as colors
from pretrain.config import get_pretrain_cfg
from pretrain.trainer import PretrainTrainer
from pretrain.transforms import upload
from tests.pretrain.test_trainer import options, write_captioned_images
from tests.waits import Waits
from virtex_d2.engine.errors import InputError

pytestmark = pytest.mark.usefixtures("thin_resnets")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    write_captioned_images(folder, 24)
    return folder


def build(images: Path, output: Path, *more: object) -> PretrainTrainer:
    cfg = get_pretrain_cfg()
    cfg.merge_from_list(options(images, output, "LOG_PERIOD", 4, "DATA.VAL_CAPTIONS", "", *more))
    return PretrainTrainer(cfg)


OBJECTIVES = {
    "bicaptioning": ("MODEL.CAPTIONING.PARALLEL_SHARE", 0.5, "SOLVER.CLIP_GRAD_NORM", 0.0),
    "captioning": ("MODEL.CAPTIONING.CLASSIFICATION_WEIGHT", 0.5, "SOLVER.OPTIMIZER", "adamw"),
    "masked_lm": ("SOLVER.AMP.ENABLED", False),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_operation_of_a_step_needs_a_number_off_the_device(images, tmp_path, objective):
    more = ("MODEL.OBJECTIVE", objective, *OBJECTIVES[objective], "SOLVER.LOOKAHEAD.STEPS", 2)
    trainer = build(images, tmp_path / "run", *more)
    waits, found = Waits(), []

    def run_step(step=trainer.run_step):
        batches = trainer.loop._iterator
        trainer.loop._iterator = iter([next(batches)])  # what loading does is the host's
        with waits:
            step()
        trainer.loop._iterator = batches
        found.append(sorted(set(waits.found)))
        waits.found.clear()

    trainer.run_step, trainer.max_iter = run_step, 5
    trainer.train()
    assert found == [[]] * 5
    with waits:  # the counter does count
        torch.ones(3)[torch.ones(3) > 0].sum().item()
    assert waits.found == ["index", "_local_scalar_dense"]


class Copies(TorchDispatchMode):
    """Notes copies to `meta`, which stands in for a GPU, and whether they are waited for."""

    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.name() == "aten::_to_copy" and str(kwargs.get("device")) == "meta":
            self.blocking.append(not kwargs.get("non_blocking", False))
        return function(*args, **kwargs)


def test_jitter_and_normalisation_copy_nothing_that_is_waited_for_but_constants_once(monkeypatch):
    monkeypatch.setitem(colors._AT_A_TIME, "meta", 4)
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device="meta")
    jitter = torch.tensor([[[0, 1.2], [1, 0.8], [2, 1.1], [3, 0.05]]]).repeat(4, 1, 1)
    jitter[0] = -1
    colors._mean_and_std.cache_clear()
    copies = Copies()
    for turn in range(3):
        with copies:
            colors.normalize(pixels, jitter)
        assert copies.blocking.count(True) == 2, turn  # mean and standard deviation, at first
        assert copies.blocking.count(False) == 2 * (turn + 1)
    colors._mean_and_std.cache_clear()


def test_what_is_uploaded_comes_from_pinned_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: (device, non_blocking)
    )
    gpu, tensor = torch.device("cuda:0"), torch.ones(2)
    assert upload(tensor, gpu) == (gpu, True)
    assert pinned == [tensor]


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_every_line_of_metrics_has_its_losses(images, tmp_path):
    trainer = build(images, tmp_path / "run", "SOLVER.MAX_ITER", 10)
    trainer.train()
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [3, 7, 9]
    for line in lines:
        for name in ("total_loss", "grad_norm", "data_time", "lr", "loss_captioning_backward"):
            assert name in line, name


class Broken:
    """Makes something NaN at iterations from the third on: `what` is "gradient" or "loss"."""

    def __init__(self, trainer: PretrainTrainer, what: str, first: int = 3, last: int = 99):
        def hook(grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.nan if first <= trainer.iter <= last else grad

        if what == "gradient":
            next(trainer.method.textual.parameters()).register_hook(hook)
        else:
            losses = trainer.loop.losses
            trainer.loop.losses = lambda batch: {k: hook(v) for k, v in losses(batch).items()}


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("gradient", ("SOLVER.OPTIMIZER", "adamw")),
        ("gradient", ("SOLVER.CLIP_GRAD_NORM", 0.0, "SOLVER.AMP.ENABLED", False)),
        ("gradient", ("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.LOOKAHEAD.STEPS", 1)),
        ("loss", ("SOLVER.OPTIMIZER", "sgd")),
    ],
)
def test_nan_reaches_no_weight_and_no_checkpoint_and_is_told_by_its_iteration(
    images, tmp_path, what, more
):
    trainer = build(images, tmp_path / "run", *more)
    Broken(trainer, what)
    with pytest.raises(InputError, match=r"not finite at iteration 3: .*nan"):
        trainer.train()
    tensors = [*trainer.method.state_dict().values()]
    for key in ("optimizer", "lookahead"):
        state = trainer.checkpointer.checkpointables[key].state_dict()
        tensors += state["slow"] if key == "lookahead" else [
            v for of in state["state"].values() for v in of.values()
            if isinstance(v, torch.Tensor)
        ]  # fmt: skip
    assert all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())
    written = sorted((tmp_path / "run").glob("model_*.pth"))
    period = trainer.cfg.SOLVER.CHECKPOINT_PERIOD
    assert [path.name for path in written] == [
        f"model_{i:07d}.pth" for i in range(3) if (i + 1) % period == 0
    ]


@pytest.mark.parametrize("first", [0, 2])
def test_a_gradient_that_is_nan_once_leaves_the_weights_of_before(images, tmp_path, first):
    """The update is left out where it is made: on the device, before anybody has read the norm."""
    trainer = build(images, tmp_path / "run", "SOLVER.CHECKPOINT_PERIOD", 100)
    Broken(trainer, "gradient", first, first)
    before = {}

    def keep():
        before[trainer.iter] = [p.detach().clone() for p in trainer.method.parameters()]
        step()

    step, trainer.run_step = trainer.run_step, keep
    with pytest.raises(InputError, match=f"iteration {first}"):
        trainer.train()
    after = before.get(first + 1) or list(trainer.method.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before[first], after, strict=True))


def test_a_stop_behind_a_nan_leaves_no_checkpoint_of_it(images, tmp_path):
    """The vote to stop comes right behind the update: its checkpoint waits for the look, too."""
    from virtex_d2.engine import stopping

    trainer = build(images, tmp_path / "run", "SOLVER.CHECKPOINT_PERIOD", 100)
    Broken(trainer, "gradient")

    def check(original=stopping.check):
        if trainer.iter == 3 and trainer.storage.iter == 3 and 3 in trained:
            raise stopping.StopRequested("USR1")

    def run_step(step=trainer.run_step):
        step()
        trained.append(trainer.iter)

    trained, trainer.run_step = [], run_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "check", check)
        with pytest.raises(InputError, match="not finite at iteration 3"):
            trainer.train()
    assert not list((tmp_path / "run").glob("model_*.pth"))


@pytest.mark.parametrize(
    ("version", "fused"), [("2.4.1", False), ("2.5.0", True), ("2.15.0", True)]
)
def test_sgd_is_fused_from_torch_2_5_on_and_adamw_always(monkeypatch, version, fused):
    cfg = get_pretrain_cfg()
    monkeypatch.setattr(optim.torch, "__version__", torch.torch_version.TorchVersion(version))
    model = torch.nn.Linear(2, 2)
    assert optim.build_optimizer(cfg, optim.parameter_groups(cfg, model)).defaults["fused"] == fused
    cfg.SOLVER.OPTIMIZER = "adamw"
    assert optim.build_optimizer(cfg, optim.parameter_groups(cfg, model)).defaults["fused"]
