"""A folder of images, each with its captions in a text file of the same name."""

import os

from pretrain.data.checks import refuse, require_folder
from pretrain.data.records import Records
from virtex_d2.engine.files import read_text
from virtex_d2.engine.images import files_in, images_in


def load_folder_captions(captions_root: str | os.PathLike, image_root: str = "") -> Records:
    """Read name.jpg and name.txt, in the folder and the folders in it.

    Args:
        captions_root: the folder of the text files, a caption a line; blank lines count for none.
        image_root: the folder of the images; "" is the same.

    Returns:
        Records by name; the id is the image's path within the folder.
    """
    image_root = image_root or captions_root
    require_folder(captions_root, "name.txt for each name.jpg")
    require_folder(image_root, "the images")
    images: dict[str, str] = {}
    repeated = []
    for name in images_in(str(image_root), beside=("txt",)):
        stem = os.path.splitext(name)[0]
        if stem in images:
            repeated.append(f"{images[stem]} and {name}")
        images[stem] = name
    refuse(
        image_root, repeated, "images share a name", "Give each a name, and so a text, of its own."
    )
    found = (os.path.splitext(name) for name in files_in(str(captions_root)))
    texts = {stem: stem + suffix for stem, suffix in found if suffix.lower() == ".txt"}
    refuse(
        image_root,
        [name for stem, name in images.items() if stem not in texts],
        f"images have no text (name.txt in {captions_root})",
        "Write one for each or remove the images.",
    )
    refuse(
        captions_root,
        [name for stem, name in texts.items() if stem not in images],
        f"texts have no image in {image_root}",
        "Add the images or remove the texts.",
    )
    captions = [
        captions_in_text(read_text(os.path.join(captions_root, texts[stem]))) for stem in images
    ]
    refuse(
        captions_root,
        [texts[stem] for stem, lines in zip(images, captions) if not lines],
        "texts have no caption",
        "Write one a line, or remove text and image.",
    )
    return Records.of_files(list(images.values()), list(images.values()), captions, image_root)


def load_images(root: str | os.PathLike) -> Records:
    """Read all images of a folder and the folders in it; none has a caption."""
    require_folder(root, "the images")
    names = images_in(str(root))
    return Records.of_files(names, names, [()] * len(names), root)


def captions_in_text(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line.strip() for line in text.split("\n") if line.strip()]
