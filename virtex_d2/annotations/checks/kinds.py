"""The kinds of problems that a data set can have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Attributes:
        title: what the records have, for people.
        serious: whether it fails the check; the others are for the reader to judge.
    """

    title: str
    serious: bool = True


KINDS: dict[str, Kind] = {
    "unreadable": Kind("annotation file cannot be read"),
    "incomplete": Kind("field missing or of a wrong type"),
    "field-assumed": Kind("field missing that evaluators need", serious=False),
    "id-repeated": Kind("id there twice"),
    "file-repeated": Kind("image file there twice"),
    "content-repeated": Kind("image there twice, under two file names"),
    "object-repeated": Kind("object there twice: same image, class and box"),
    "category-repeated": Kind("class name there twice"),
    "image-unknown": Kind("object of an unknown image"),
    "category-unknown": Kind("unknown class"),
    "class-left-out": Kind("object of a class that the config leaves out", serious=False),
    "contradiction": Kind("class both annotated and declared absent"),
    "box-malformed": Kind("box that is not four finite numbers"),
    "box-empty": Kind("box of no width or height"),
    "box-outside": Kind("box outside its image"),
    "mask-missing": Kind("object without a mask, where others have one"),
    "mask-malformed": Kind("mask that cannot be read"),
    "mask-empty": Kind("mask of no area"),
    "mask-outside": Kind("mask outside its image"),
    "mask-size": Kind("run-length mask of another size than its image"),
    "mask-box": Kind("mask and box in different places"),
    "image-missing": Kind("image file missing"),
    "image-damaged": Kind("image that cannot be decoded"),
    "image-size": Kind("image of another size than recorded"),
    "leak-file": Kind("evaluation image that is also a training image: same file"),
    "leak-content": Kind("evaluation image that is also a training image: same pixels"),
    "leak-name": Kind("evaluation image with a training image's file name", serious=False),
}
