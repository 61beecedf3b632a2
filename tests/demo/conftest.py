"""A project whose tools are quick stand-ins, to run the demo's own code on."""

import shutil
from pathlib import Path

import pytest

from virtex_d2.studies.demo.line import run_demo

HERE = Path(__file__).parent
CONFIGS = {
    "configs/pretrain/shapes_R_50.yaml": """
SOLVER: {MAX_ITER: 200, WARMUP_ITERS: 20, CHECKPOINT_PERIOD: 100, IMS_PER_BATCH: 32}
TEST: {EVAL_PERIOD: 50}
""",
    "configs/shapes/Base.yaml": """
SOLVER: {MAX_ITER: 999, STEPS: "(70, 90)", IMS_PER_BATCH: 4}
""",
    "configs/shapes/mask_rcnn_R_50_FPN.yaml": """
_BASE_: Base.yaml
SOLVER: {MAX_ITER: 100}
TEST: {EVAL_PERIOD: 20, PRECISE_BN: {NUM_ITER: 50}}
""",
}


def make_project(folder: Path) -> Path:
    shutil.copytree(HERE / "fake_tools", folder / "tools")
    for name, content in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The folder of a project with stand-in tools."""
    return make_project(tmp_path / "project")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished demo of two seeds; to be read only."""
    project = make_project(tmp_path_factory.mktemp("finished") / "project")
    run_demo(project, project / "demo", scale=0.1, num_seeds=2)
    return project / "demo"
