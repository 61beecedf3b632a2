"""What a run does with a data set, and what a checked one holds."""

from dataclasses import dataclass

from detectron2.config import CfgNode


@dataclass(frozen=True)
class Use:
    """What a run does with a data set: it decides what the records must have.

    Attributes:
        trains, tests: whether the run learns from it, and is evaluated on it.
        masks: whether the detector has a mask head.
        mask_format: INPUT.MASK_FORMAT, "polygon" or "bitmask" (which takes polygons and RLE).
        max_bad_share: the fraction of the annotations whose box or mask may be unusable; they are
            named in a warning.
    """

    trains: bool = True
    tests: bool = True
    masks: bool = False
    mask_format: str = "polygon"
    max_bad_share: float = 0.0


def use_of(name: str, cfg: CfgNode, eval_only: bool = False) -> Use:
    """What the config does with the data set of this name."""
    return Use(
        name in cfg.DATASETS.TRAIN and not eval_only,
        name in cfg.DATASETS.TEST,
        cfg.MODEL.MASK_ON,
        cfg.INPUT.MASK_FORMAT,
        cfg.VIRTEX.MAX_BAD_BOX_SHARE,
    )


@dataclass(frozen=True)
class Found:
    """What a checked data set holds.

    Attributes:
        categories: names by category id, in the order of the ids; by class number where the format
            has no such ids.
        num_images: listed.
        num_annotations: listed, crowds included.
        num_singles: those that are no crowds, which a detector learns from and is measured by.
        notes: what people should know of it, a few words each.
    """

    categories: dict[int, str]
    num_images: int
    num_annotations: int
    num_singles: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = (
            f"{self.num_images} images, {self.num_annotations} annotations, "
            f"{len(self.categories)} categories"
        )
        return "; ".join([size, *self.notes])
