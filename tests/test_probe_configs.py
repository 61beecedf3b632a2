"""The probes' configs: each loads, and says what the paper's released ones do."""

from pathlib import Path

import pytest

from virtex_d2.engine.config import load_config
from virtex_d2.studies.probes.config import check_config, get_probe_cfg

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "probes"


def load(name: str):
    return load_config(get_probe_cfg(), str(FOLDER / name), [])


@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.glob("*.yaml")))
def test_every_config_loads_and_can_run(name):
    check_config(load(name))


@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.glob("*.yaml")))
def test_data_is_looked_for_where_the_detectors_configs_look(name, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/elsewhere")
    assert load(name).DATA.ROOT.startswith("/elsewhere/")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert load(name).DATA.ROOT.startswith("datasets/")


def test_the_svms_are_the_papers():
    cfg = load("voc07_svm.yaml")
    assert cfg.SVM.COSTS == [0.01, 0.1, 1.0, 10.0]
    assert (cfg.SVM.FOLDS, cfg.SVM.POSITIVE_WEIGHT, cfg.SVM.MAX_ITER) == (3, 2.0, 2000)
    assert (cfg.INPUT.RESIZE, cfg.INPUT.CROP) == (256, 224)


@pytest.mark.parametrize(
    ("name", "task", "rate", "decay", "schedule"),
    [
        ("imagenet_linear.yaml", "linear", 0.3, 0.0, "cosine"),
        ("inaturalist_finetune.yaml", "finetune", 0.025, 1e-4, "multistep"),
    ],
)
def test_classifiers_are_trained_as_in_the_paper(name, task, rate, decay, schedule):
    cfg = load(name)
    solver = cfg.SOLVER
    assert cfg.TASK == task
    assert cfg.INPUT.AUGMENT or task == "finetune"
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.SCHEDULE) == (rate, decay, schedule)
    assert (solver.EPOCHS, solver.IMS_PER_BATCH, solver.MOMENTUM) == (100, 256, 0.9)
    assert cfg.INPUT.CROP_SCALE == (0.08, 1.0)
    assert schedule == "cosine" or (solver.STEPS == [70, 90] and solver.GAMMA == 0.1)
