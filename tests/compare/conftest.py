"""A project whose detector trainings are quick stand-ins, to run the comparison's own code on."""

import shutil
from pathlib import Path

import pytest

from virtex_d2.engine.files import write_safetensors
from virtex_d2.studies import curves
from virtex_d2.studies.compare.comparison import Comparison
from virtex_d2.studies.compare.plan import make_plan, parse_inits

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMAND = (
    *("--config-file", "configs/tiny.yaml", "--fractions", "1", "0.1", "--seeds", "1"),
    *("--init", "random", "--init", "virtex=virtex.safetensors"),
)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a stand-in tool, a config and a checkpoint; to be copied."""
    folder = tmp_path_factory.mktemp("made") / "project"
    shutil.copytree(HERE / "fake_tools", folder / "tools")
    shutil.copy(ROOT / "tools" / "compare_inits.py", folder / "tools")
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.yaml").write_text("SOLVER: {MAX_ITER: 100}\n")
    write_resnet(folder / "virtex.safetensors")
    return folder


@pytest.fixture(scope="session")
def run_once(made: Path) -> Path:
    """Such a project with a finished comparison of three seeds and two fractions; to be copied."""
    folder = Path(shutil.copytree(made, made.parent / "finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        comparison(folder).run()
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a project; the current one."""
    return _current(made, tmp_path, monkeypatch)


@pytest.fixture
def finished(run_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a project whose comparison is finished; the current one."""
    return _current(run_once, tmp_path, monkeypatch)


def _current(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(curves, "DPI", 30)  # nobody looks at the pictures
    copied = Path(shutil.copytree(folder, tmp_path / folder.name))
    monkeypatch.chdir(copied)
    return copied


def write_resnet(path: Path, seed: int = 0) -> None:
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(seed)
    write_safetensors(path, resnet18().state_dict(), {})


def comparison(project: Path, seeds=(1, 2, 3), fractions=(1.0, 0.1), **options) -> Comparison:
    inits = parse_inits(["random", "virtex=virtex.safetensors"], options.pop("init_opts", ()))
    plan = make_plan(["configs/tiny.yaml"], inits, fractions, seeds, root=project, **options)
    return Comparison(plan, project, project / "out")
