"""What a detector asks of its data sets: classes, and nothing that they cannot give."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from virtex_d2.engine.errors import InputError, nearest

_NO_SEM_SEG = "it learns from semantic segmentation (sem_seg), and data here has objects alone"
_NO_ROTATED = "it learns from rotated boxes, and data here has upright ones"
_BOXES_ALONE = "it has no such head. Use False"
# Keys with values that cannot be trained or evaluated here, and why; all of an entry must be so.
_REFUSED: list[tuple[dict[str, object], str]] = [
    ({"META_ARCHITECTURE": "PanopticFPN"}, f"{_NO_SEM_SEG}. Use GeneralizedRCNN"),
    ({"META_ARCHITECTURE": "SemanticSegmentor"}, f"{_NO_SEM_SEG}. Use GeneralizedRCNN"),
    *(
        ({head: True, "META_ARCHITECTURE": name}, _BOXES_ALONE)
        for head in ("MASK_ON", "KEYPOINT_ON")
        for name in ("RetinaNet", "ProposalNetwork")
    ),
    ({"PROPOSAL_GENERATOR.NAME": "RRPN"}, f"{_NO_ROTATED}. Use RPN"),
    ({"ROI_HEADS.NAME": "RROIHeads"}, f"{_NO_ROTATED}. Use StandardROIHeads"),
    (
        {"ROI_HEADS.NAME": "CascadeROIHeads", "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False},
        "detectron2's cascade regresses boxes for all classes together. Use "
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True",
    ),
    (
        {"PROPOSAL_GENERATOR.NAME": "PrecomputedProposals", "LOAD_PROPOSALS": False},
        "no proposals are loaded. Use MODEL.LOAD_PROPOSALS True and DATASETS.PROPOSAL_FILES_TRAIN, "
        "or RPN",
    ),
]


def check_detector(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check that the data sets of this project can feed the detector of a config."""
    for key, name, registry in (
        ("META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        known = [known for known, _ in registry]
        if name not in known:
            raise InputError(
                f"MODEL.{key} is '{name}'; expected one of {', '.join(sorted(known))}."
                f"{nearest(name, known)}"
            )
    for entry, why in _REFUSED:
        if all(_value(cfg, key) == value for key, value in entry.items()):
            found = ", ".join(f"MODEL.{key} {value}" for key, value in entry.items())
            raise InputError(f"{found}: {why}.")
    train = () if eval_only else cfg.DATASETS.TRAIN
    if cfg.MODEL.LOAD_PROPOSALS and len(cfg.DATASETS.PROPOSAL_FILES_TRAIN) != len(train):
        raise InputError(
            f"MODEL.LOAD_PROPOSALS True: DATASETS.PROPOSAL_FILES_TRAIN names "
            f"{len(cfg.DATASETS.PROPOSAL_FILES_TRAIN)} files for {len(train)} data sets; expected "
            "one for each."
        )
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(cfg, [*train, *cfg.DATASETS.TEST])


def set_classes(cfg: CfgNode, source: str, names: list[str]) -> None:
    """Set the number of classes where the detector's own key is -1, and compare it otherwise.

    That key is MODEL.ROI_HEADS.NUM_CLASSES, or of another meta-architecture the one in the group
    of its name (MODEL.RETINANET.NUM_CLASSES for RetinaNet).

    Args:
        cfg: the config; changed.
        source: the data set, for messages.
        names: of its classes.
    """
    group = cfg.MODEL.META_ARCHITECTURE.upper()
    if "NUM_CLASSES" not in cfg.MODEL.get(group, {}):
        group = "ROI_HEADS"
    key, count, configured = f"MODEL.{group}.NUM_CLASSES", len(names), cfg.MODEL[group].NUM_CLASSES
    if configured == -1:
        cfg.MODEL[group].NUM_CLASSES = count
    elif configured != count:
        shown = ", ".join(names[:10]) + (", ..." if count > 10 else "")
        raise InputError(
            f"{key} is {configured}, but {source} has {count} categories: {shown}. Use {key} "
            f"{count}, or -1."
        )


def _value(cfg: CfgNode, key: str) -> object:
    node = cfg.MODEL
    for part in key.split("."):
        node = node[part]
    return node


def _check_keypoints(cfg: CfgNode, datasets: list[str]) -> None:
    expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for name in datasets:
        points = MetadataCatalog.get(name).get("keypoint_names")
        if points is None or len(points) != expected:
            found = f"names {len(points)}" if points else "names no keypoints (`keypoint_names`)"
            raise InputError(
                f"MODEL.KEYPOINT_ON True: the data set '{name}' {found}, and a keypoint head needs "
                f"those of MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, {expected}. Use data such as "
                "keypoints_coco_2017_train, or MODEL.KEYPOINT_ON False."
            )
