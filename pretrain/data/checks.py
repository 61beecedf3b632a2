"""What the readers of annotation files check alike, and how they say what is wrong."""

import os
import unicodedata
from collections.abc import Iterable, Sequence

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import read_json


def refuse(path: str | os.PathLike, found: Iterable[str], what: str, what_to_do: str) -> None:
    """Raise where anything was found; the message counts all of it and names the first ten."""
    if found := list(found):
        first = ", ".join(found[:10])
        raise InputError(f"{path}: {len(found)} {what}; the first: {first}. {what_to_do}")


def read_annotations(path: str | os.PathLike, source_format: str) -> dict:
    """The JSON object of a file that is read as `source_format`."""
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(
            f"{error} It is read as DATA.FORMAT {source_format}; for tables that is csv or tsv."
        ) from error


def require_folder(folder: str | os.PathLike, of_what: str) -> None:
    """Raise InputError if there is no folder; the message says what was expected in it."""
    if not os.fspath(folder):
        raise InputError(
            f"No folder is given for {of_what}. Name it: DATA.TRAIN_IMAGES, DATA.VAL_IMAGES or "
            "--images."
        )
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "none"
        raise InputError(f"'{folder}': expected the folder of {of_what}, found {found} there.")


def refuse_absent(
    names: Sequence[str], annotations: str | os.PathLike, root: str | os.PathLike
) -> None:
    """Raise where images are not on the disk.

    One listing a folder, not one question an image: network file systems are slow to ask.
    """
    require_folder(root, f"the images of {annotations}")
    root = os.path.abspath(root)
    present: dict[str, set[str]] = {}
    absent = []
    for name in names:
        folder, base = os.path.split(name)
        if folder not in present:
            present[folder] = _names_in(os.path.join(root, folder))
        if base not in present[folder]:
            absent.append(name)
    advice = "Check the folder of images, or remove them from the file."
    for name in absent[:10]:
        if near := near_name(name, root):
            advice = f"{near!r} is there, for {name!r}: names must be the same to the letter."
            break
    refuse(
        annotations,
        (os.path.join(root, name) for name in absent),
        f"of its {len(names)} images are not on the disk",
        advice,
    )


def near_name(name: str, root: str | os.PathLike) -> str:
    """A file that differs from a name that is not there in case, suffix, leading zeros, quotes,
    Unicode form or in lying in `root` itself; "" where there is none."""
    folder, base = os.path.split(name)
    for place in dict.fromkeys((folder, "")):
        for other in sorted(_names_in(os.path.join(root, place))):
            if plain_name(other) == plain_name(base):
                return os.path.join(place, other)
    return ""


def plain_name(name: str) -> str:
    """What names of files have in common that differ as `near_name` says."""
    name = unicodedata.normalize("NFC", name).casefold().strip(" \"'")
    return os.path.splitext(name)[0].lstrip("0") or "0"


def _names_in(folder: str) -> set[str]:
    """Names in a folder; none where there is no such folder."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte in it
        return set()
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read: {error.strerror}.") from error
