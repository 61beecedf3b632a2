import pytest
from detectron2.config import CfgNode

from virtex_d2.detection.config import MAY_CHANGE, get_virtex_cfg, may_change
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.identity import check_resumed, flat, matches


@pytest.fixture
def cfg(tmp_path):
    cfg = get_virtex_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return cfg


def change(cfg: CfgNode, key: str, value: object) -> None:
    node = cfg
    *groups, name = key.split(".")
    for group in groups:
        node = node[group]
    node[name] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.BASE_LR", 0.5),
        ("SOLVER.IMS_PER_BATCH", 3),
        ("SOLVER.STEPS", (7,)),
        ("SOLVER.AMP.ENABLED", True),
        ("SEED", 7),
        ("DATASETS.TRAIN", ("other",)),
        ("VIRTEX.FRACTION", 0.1),
        ("VIRTEX.EMA.DECAY", 0.5),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("INPUT.MIN_SIZE_TRAIN", (1,)),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 3),
        ("MODEL.RESNETS.NORM", "GN"),
        # Its statistics are in the weights.
        ("TEST.PRECISE_BN.NUM_ITER", 7),
    ],
)
def test_what_changes_the_weights_may_not_change(cfg, key, value):
    change(cfg, key, value)
    with pytest.raises(InputError, match=f"\\n  {key}: "):
        check_resumed(cfg, may_change(cfg))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("VIRTEX.DATASETS", [["a", "coco", "/scratch/a.json", "/scratch/a"]]),
        ("MODEL.WEIGHTS", "gone.safetensors"),
        ("MODEL.DEVICE", "cuda"),
        ("DATASETS.TEST", ("other",)),
        ("TEST.EVAL_PERIOD", 7),
        ("INPUT.MIN_SIZE_TEST", 7),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5),
        ("DATALOADER.NUM_WORKERS", 7),
        ("SOLVER.CHECKPOINT_PERIOD", 7),
        ("VIRTEX.ACCUMULATE", 7),
    ],
)
def test_places_periods_and_evaluation_may(cfg, key, value):
    change(cfg, key, value)
    check_resumed(cfg, may_change(cfg))


def test_a_run_may_be_longer_where_its_learning_rate_does_not_depend_on_that(cfg):
    cfg.SOLVER.MAX_ITER += 1
    check_resumed(cfg, may_change(cfg))
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    with pytest.raises(InputError, match="SOLVER.MAX_ITER: 40000 -> 40001"):
        check_resumed(cfg, may_change(cfg))


def test_a_run_from_before_retinanets_classes_came_from_the_data_goes_on(cfg):
    """detectron2's default stands in its config.yaml."""
    change(cfg, "MODEL.RETINANET.NUM_CLASSES", 80)
    check_resumed(cfg, may_change(cfg))
    change(cfg, "MODEL.META_ARCHITECTURE", "RetinaNet")
    assert not matches("MODEL.RETINANET.NUM_CLASSES", may_change(cfg))


def test_every_pattern_is_of_a_key_that_there_is(cfg):
    keys = dict(flat(cfg))
    assert [one for one in MAY_CHANGE if not any(matches(key, [one]) for key in keys)] == []
