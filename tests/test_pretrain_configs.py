"""The pretraining configs: each states what its name says, on the paper's recipe."""

import re
from pathlib import Path

import pytest
import torch

from pretrain.config import WITH_OWN_KEYS, load_pretrain_config
from pretrain.methods.method import METHODS, build_method, find_method

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "pretrain"
PAPERS = sorted(file.name for file in FOLDER.glob("*_R_*.yaml") if file.name[0].islower())
PAPERS = [name for name in PAPERS if not name.startswith(("shapes", "small", *WITH_OWN_KEYS))]
BACKBONES = {"R_50": "resnet50", "R_101": "resnet101", "R_50W2X": "wide_resnet50_2"}


def load(name: str):
    return load_pretrain_config(str(FOLDER / name), [])


@pytest.mark.parametrize("name", PAPERS)
def test_a_config_of_the_paper_is_what_its_name_says_on_the_papers_recipe(name):
    cfg = load(name)
    task, backbone, layers, width = re.fullmatch(
        r"([a-z_]+)_(R_\d+(?:W2X)?)(?:_L(\d)_H(\d+))?\.yaml", name
    ).groups()
    assert cfg.MODEL.OBJECTIVE == task
    assert cfg.MODEL.VISUAL.NAME == BACKBONES[backbone]
    if layers:
        assert (cfg.MODEL.TEXTUAL.NUM_LAYERS, cfg.MODEL.TEXTUAL.HIDDEN_SIZE) == (
            int(layers),
            int(width),
        )
    solver = cfg.SOLVER
    assert (solver.OPTIMIZER, solver.CNN_LR, solver.BASE_LR) == ("sgd", 0.2, 1e-3)
    assert (solver.MAX_ITER, solver.WARMUP_ITERS, solver.IMS_PER_BATCH) == (500000, 10000, 256)
    assert (solver.WEIGHT_DECAY, solver.CLIP_GRAD_NORM) == (1e-4, 10.0)
    assert solver.LOOKAHEAD.ENABLED
    assert cfg.DATA.STRIP_ACCENTS, "as the released vocabularies"
    assert not any(cfg.MODEL.CAPTIONING.values()), "the paper knows none of these additions"
    with torch.device("meta"):  # sizes without memory
        model = build_method(cfg, 10000)
    assert model.visual.feature_size == 2048


def test_every_task_of_the_paper_has_a_config():
    tasks = {load(name).MODEL.OBJECTIVE for name in PAPERS}
    assert tasks == set(METHODS) - {"backward_captioning", *WITH_OWN_KEYS}


@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.glob("*.yaml")))
def test_every_config_loads_and_its_method_has_nothing_against_it(name):
    find_method(load(name))
