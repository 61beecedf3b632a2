"""Detectors and their data: classes set or compared, what it cannot give refused by the key."""

import pytest
from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage

from virtex_d2.detection.checkpointer import DetectorCheckpointer
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets
from virtex_d2.detection.detectors import check_detector, set_classes
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError

pytestmark = pytest.mark.usefixtures("catalog_as_before")

RETINANET = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", "False"),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']", "MODEL.RETINANET.NUM_CONVS", 1),
]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("META_ARCHITECTURE", "PanopticFPN"), "META_ARCHITECTURE PanopticFPN: .*sem_seg"),
        (("META_ARCHITECTURE", "SemanticSegmentor"), "SemanticSegmentor: it learns from semantic"),
        (("META_ARCHITECTURE", "RetinaNet", "MASK_ON", True), "MODEL.MASK_ON True, .* Use False"),
        (("META_ARCHITECTURE", "ProposalNetwork", "MASK_ON", True), "no such head"),
        (("META_ARCHITECTURE", "RetinaNet", "KEYPOINT_ON", True), "MODEL.KEYPOINT_ON True, MODEL"),
        (("META_ARCHITECTURE", "Retinanet"), "MODEL.META_ARCHITECTURE is .*mean 'RetinaNet'"),
        (("META_ARCHITECTURE", "FCOS"), "MODEL.META_ARCHITECTURE is 'FCOS'; expected one of Gen"),
        (("BACKBONE.NAME", "build_resnet_fpn"), "mean 'build_resnet_fpn_backbone'"),
        (("ROI_HEADS.NAME", "CascadeROIHeads"), "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"),
        (("ROI_HEADS.NAME", "RROIHeads"), "ROI_HEADS.NAME RROIHeads: it learns from rotated"),
        (("PROPOSAL_GENERATOR.NAME", "RRPN"), "rotated boxes"),
        (("PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"), "Use MODEL.LOAD_PROPOSALS True"),
        (("LOAD_PROPOSALS", True), "PROPOSAL_FILES_TRAIN names 0 files for 1 data sets"),
        (("KEYPOINT_ON", True), "'t' names no keypoints .`keypoint_names`.*KEYPOINT_ON False"),
    ],
)
def test_what_the_data_cannot_give_is_refused_by_the_key(keys, message):
    cfg = get_virtex_cfg()
    cfg.DATASETS.TRAIN = ("t",)
    keys = [f"MODEL.{key}" if place % 2 == 0 else key for place, key in enumerate(keys)]
    cfg.merge_from_list(keys)
    with pytest.raises(InputError, match=message):
        check_detector(cfg)


def test_keypoints_that_the_data_names_are_taken_where_their_number_is_the_heads():
    cfg = get_virtex_cfg()
    cfg.DATASETS.TRAIN, cfg.MODEL.KEYPOINT_ON = ("t",), True
    MetadataCatalog.get("t").keypoint_names = ["nose", "tail"]
    with pytest.raises(InputError, match="'t' names 2, and .*NUM_KEYPOINTS, 17"):
        check_detector(cfg)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 2
    check_detector(cfg)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("GeneralizedRCNN", "ROI_HEADS"),
        ("RetinaNet", "RETINANET"),
        ("ProposalNetwork", "ROI_HEADS"),
    ],
)
def test_the_number_of_classes_is_that_of_the_detectors_own_key(name, group):
    cfg = get_virtex_cfg()
    cfg.MODEL.META_ARCHITECTURE = name
    set_classes(cfg, "'t'", ["cat", "dog"])
    assert cfg.MODEL[group].NUM_CLASSES == 2
    for wrong in (1, 80):
        cfg.MODEL[group].NUM_CLASSES = wrong
        with pytest.raises(InputError, match=f"{group}.NUM_CLASSES is {wrong}, but 't' has 2"):
            set_classes(cfg, "'t'", ["cat", "dog"])


@pytest.fixture
def retinanet(detection_cfg):
    """The config of a small RetinaNet on the small world."""
    detection_cfg.merge_from_list(RETINANET)
    return detection_cfg


def test_retinanet_learns_the_classes_of_the_data(retinanet):
    register_datasets(retinanet)
    assert retinanet.MODEL.RETINANET.NUM_CLASSES == 14
    model = DetectionTrainer.build_model(retinanet)
    assert model.head.cls_score.out_channels % 14 == 0
    batch = next(iter(DetectionTrainer.build_train_loader(retinanet)))
    with EventStorage():
        losses = model.train()(batch)
    assert all(loss.isfinite() for loss in losses.values())


def test_a_retinanets_checkpoint_of_other_classes_is_told_by_their_number(retinanet, tmp_path):
    retinanet.MODEL.RETINANET.NUM_CLASSES = 5
    DetectorCheckpointer(DetectionTrainer.build_model(retinanet), str(tmp_path)).save("five")
    retinanet.MODEL.RETINANET.NUM_CLASSES = 2
    model = DetectionTrainer.build_model(retinanet)
    message = r"It knows 5 classes, this config has 2 \(MODEL.RETINANET.NUM_CLASSES\)"
    with pytest.raises(InputError, match=message):
        DetectorCheckpointer(model, whole=True).load(str(tmp_path / "five.pth"), [])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.6]]
            + ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
            "assert cascade_ious.* == cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS",
        ),
        ([*RETINANET[:4], "MODEL.RETINANET.NUM_CLASSES", 2], "build MODEL.META_ARCHITECTURE Reti"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", 32], "Must set MODEL.RESNETS.RES2_OUT_CHANNELS = 64"),
        (["MODEL.ROI_BOX_HEAD.NUM_FC", 0], r"assert len\(conv_dims\)"),
    ],
)
def test_what_detectron2_asserts_when_it_builds_is_told_with_its_line(
    keys, message, detector_config
):
    cfg = detector_config("FPN", *keys)
    with pytest.raises(InputError, match=message):
        DetectionTrainer.build_model(cfg)
