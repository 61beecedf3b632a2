"""A project whose detector trainings are quick stand-ins, to run the comparison's own code on."""

import shutil
from pathlib import Path

import pytest

from virtex_d2.engine.files import write_safetensors
from virtex_d2.studies.compare.main import Comparison
from virtex_d2.studies.compare.plan import make_plan, parse_inits

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMAND = (
    *("--config-file", "configs/tiny.yaml", "--fractions", "1", "0.1", "--seeds", "1"),
    *("--init", "random", "--init", "virtex=virtex.safetensors"),
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a project with a stand-in tool, a config and a checkpoint; the current one."""
    return make_project(tmp_path / "project", monkeypatch)


def make_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(HERE / "fake_tools", folder / "tools")
    shutil.copy(ROOT / "tools" / "compare_inits.py", folder / "tools")
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.yaml").write_text("SOLVER: {MAX_ITER: 100}\n")
    write_resnet(folder / "virtex.safetensors")
    monkeypatch.chdir(folder)
    return folder


def write_resnet(path: Path, seed: int = 0) -> None:
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    write_safetensors(path, resnet18().state_dict(), {})


def comparison(project: Path, seeds=(1, 2, 3), fractions=(1.0, 0.1), **options) -> Comparison:
    inits = parse_inits(["random", "virtex=virtex.safetensors"], options.pop("init_opts", ()))
    plan = make_plan(["configs/tiny.yaml"], inits, fractions, seeds, **options)
    return Comparison(plan, project, project / "out")
