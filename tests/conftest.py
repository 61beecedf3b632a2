"""What all tests share: one thread, and where optional real data lies."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import virtex_d2  # noqa: F401  # before detectron2, so that its bridges are in place

ROOT = Path(__file__).resolve().parent.parent
SLURM_PROGRAMS = ("sbatch", "srun", "munged")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    # Several threads on a busy machine are slower than one, and tests are small.
    torch.set_num_threads(1)
    missing = [name for name in SLURM_PROGRAMS if shutil.which(name, path=_system_path()) is None]
    if os.environ.get("REQUIRE_SLURM") == "1" and missing:
        raise pytest.UsageError(
            f"REQUIRE_SLURM=1, but {', '.join(missing)} not found: apt-get install slurm-wlm munge"
        )


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python *arguments` in a process of its own, with the project importable.

    Keyword arguments: `env` (added to the environment), `timeout` (seconds), and others of
    subprocess.run. The result has text in stdout and stderr; a failure does not raise.
    """

    def run(*arguments: object, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            **{"capture_output": True, "text": True, "timeout": 300, "check": False, **kwargs},
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
        )

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real photographs (COCO and VOC layouts), from VIRTEX_TEST_DATA."""
    return _optional_folder("VIRTEX_TEST_DATA", ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def parity_cases() -> Path:
    """The folder with parity cases (losses and logits of the original), from PARITY_CASES."""
    return _optional_folder("PARITY_CASES", ROOT.parent / "shared" / "parity")


def _optional_folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable) or default)
    if not folder.is_dir():
        message = f"no folder {folder}; set {variable} to run this test"
        if os.environ.get("REQUIRE_REAL_DATA") == "1":
            pytest.fail(f"REQUIRE_REAL_DATA=1, but {message}")
        pytest.skip(message)
    return folder.resolve()


def _system_path() -> str:
    """PATH with the folders of daemons, which users' paths may lack."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
