"""A folder of images, each with its captions in a text file of the same name."""

import os
from collections.abc import Iterator

from virtex_d2.runtime.errors import InputError
from virtex_d2.runtime.files import read_text
from virtex_d2.runtime.images import IMAGE_SUFFIXES

from .checks import refuse, require_folder
from .records import Records


def load_folder_captions(captions_root: str | os.PathLike, image_root: str = "") -> Records:
    """Read name.jpg and name.txt, in the folder and the folders in it.

    Args:
        captions_root: the folder of the text files, a caption a line; blank lines count for none.
        image_root: the folder of the images; "" is the same.

    Returns:
        Records by name; the id is the image's path within the folder.

    Raises:
        InputError: there is no such folder or nothing in it; an image lacks its text, a text its
            image, or a text has no caption or is not UTF-8.
    """
    image_root = image_root or captions_root
    require_folder(captions_root, "name.txt for each name.jpg")
    require_folder(image_root, "the images")
    images: dict[str, str] = {}
    repeated = []
    for name in _files(image_root, IMAGE_SUFFIXES):
        stem = os.path.splitext(name)[0]
        if stem in images:
            repeated.append(f"{images[stem]} and {name}")
        images[stem] = name
    refuse(
        image_root, repeated, "images share a name", "Give each a name, and so a text, of its own."
    )
    texts = {os.path.splitext(name)[0]: name for name in _files(captions_root, ("txt",))}
    if not images:
        raise InputError(
            f"{image_root}: expected images ({', '.join(IMAGE_SUFFIXES)}), found none in it."
        )
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
    captions = [_captions(os.path.join(captions_root, texts[stem])) for stem in images]
    refuse(
        captions_root,
        [texts[stem] for stem, lines in zip(images, captions) if not lines],
        "texts have no caption",
        "Write one a line, or remove text and image.",
    )
    return Records.of_files(list(images.values()), list(images.values()), captions, image_root)


def captions_in_text(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def _captions(path: str) -> list[str]:
    return captions_in_text(read_text(path))


def _files(root: str | os.PathLike, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Paths within the folder of files with these suffixes, sorted; hidden ones are left out.

    Raises:
        InputError: a folder cannot be listed.
    """

    def stop(error: OSError) -> None:
        raise InputError(f"{error.filename}: the folder cannot be read: {error.strerror}.")

    found = []
    for folder, folders, names in os.walk(root, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name.rpartition(".")[2].lower() in suffixes and not name.startswith(".")
        ]
    return iter(sorted(found))
