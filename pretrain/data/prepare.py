"""A folder of images made fit for fast loading: small, and with restart markers.

Beside the images lies `prepared.json` (settings, and what the last run came to). An image is done
again where it is newer than its result; files appear whole, so that a run that was killed anywhere
is taken up by the next. Imports no torch, which every process of the pool would wait for.
"""

import dataclasses
import io
import logging
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import TEMPORARY_PREFIX, atomic_path, read_json, write_json
from virtex_d2.engine.images import image_suffix, images_in, read_image
from virtex_d2.engine.parent import end_with_parent

logger = logging.getLogger(__name__)

MANIFEST = "prepared.json"
_FORMAT = {"format": "virtex_d2.prepared_images", "version": 1}
_JPEG_SUFFIXES = ("jpg", "jpeg", "jfif", "jpe")
_CHUNK = 8  # images that a process takes at a time


@dataclass(frozen=True)
class Settings:
    """How images are prepared."""

    # pixels; images whose shorter side has no more are copied as they are, as are those so long
    # that their format could not hold the result
    shorter_side: int = 320
    quality: int = 90  # of JPEG, as libjpeg counts it

    def __post_init__(self):
        if self.shorter_side < 1:
            raise InputError(f"--shorter-side {self.shorter_side}: expected 1 or more pixels.")
        if not 1 <= self.quality <= 95:
            raise InputError(
                f"--quality {self.quality}: expected 1 to 95; above, files grow and nothing else."
            )


@dataclass(frozen=True)
class Outcome:
    """What became of an image."""

    name: str  # relative to the folder
    what: str  # "resized", "copied", "unreadable", or "already": it was there and up to date
    # bytes_before, bytes_after: of its file
    bytes_before: int = 0
    bytes_after: int = 0
    reason: str = ""  # why it is unreadable


def prepare_folder(
    source: str | os.PathLike, dest: str | os.PathLike, settings: Settings, workers: int = 1
) -> list[Outcome]:
    """Prepare every image of a folder and its subfolders (`prepare_image`).

    Args:
        source: the folder; it is only read.
        dest: gets the same names. May hold what an earlier run of the same settings has left.
    """
    from virtex_d2.engine.lock import RunLock  # imports torch

    source, dest = os.path.realpath(source), os.path.realpath(dest)
    if workers < 1:
        raise InputError(f"--workers {workers}: expected 1 or more.")
    if os.path.commonpath([source, dest]) == source:
        raise InputError(f"{dest}: lies in the images' folder {source}. Choose one beside it.")
    if not os.path.isdir(source):
        raise InputError(f"{source}: expected a folder of images, found none.")
    names = images_in(source)
    _check_folder(Path(dest), settings)
    lost: list[InputError] = []
    try:
        os.makedirs(dest, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{dest}: cannot be made a folder: {error.strerror}. Choose another."
        ) from error
    lock = RunLock(dest, lost.append)
    lock.acquire()
    try:
        there = _clean(dest)
        if gone := sorted(there - set(names)):
            logger.warning(
                "%s: %d of its images are not in %s (any more); they stay. The first: %s.",
                *(dest, len(gone), source, ", ".join(gone[:3])),
            )
        manifest = {**_FORMAT, "settings": dataclasses.asdict(settings), "source": source}
        write_json(os.path.join(dest, MANIFEST), {**manifest, "finished": False})
        outcomes = []
        for outcome in tqdm(
            _prepared(names, source, dest, settings, workers),
            desc="images",
            total=len(names),
            unit="image",
            mininterval=0.5 if sys.stderr.isatty() else 10,
        ):
            if lost:
                raise lost[0]
            outcomes.append(outcome)
            if outcome.what == "unreadable":
                logger.warning("%s: it is left out: %s", outcome.name, outcome.reason)
        unreadable = [outcome.name for outcome in outcomes if outcome.what == "unreadable"]
        counts = Counter(outcome.what for outcome in outcomes)
        manifest |= {"finished": True, "counts": counts, "unreadable": unreadable}
        write_json(os.path.join(dest, MANIFEST), manifest)
    finally:
        lock.release()
    return outcomes


def prepare_image(name: str, source: str, dest: str, settings: Settings) -> Outcome:
    """Write an image that loads fast, of the same name; one that cannot be decoded leaves none.

    One that is larger becomes upright, RGB and `settings.shorter_side` wide or high. JPEGs then get
    a restart marker after each block of pixels, so that crops can be decoded by themselves
    (`pretrain.jpeg`); other kinds stay what their name says. Smaller images are copied as they are.
    What has been written is decoded before it appears.
    """
    origin, result = os.path.join(source, name), os.path.join(dest, name)
    try:
        before = os.stat(origin)
        after = os.stat(result) if os.path.lexists(result) else None
        if after and after.st_size and after.st_mtime_ns > before.st_mtime_ns:
            return Outcome(name, "already", before.st_size, after.st_size)
        image = read_image(origin)
    except OSError as error:
        if os.path.lexists(result):  # of what the source was before
            os.unlink(result)
        return Outcome(name, "unreadable", reason=error.strerror or str(error))
    try:
        with atomic_path(result) as temporary:
            encoded = _encoded(image, name, settings)
            if encoded is None:
                shutil.copyfile(origin, temporary)
            else:
                temporary.write_bytes(encoded)
            read_image(str(temporary))
    except OSError as error:
        raise InputError(
            f"{result}: cannot be written: {error.strerror or error}. Make room for it, and run "
            "the same command again: it goes on from here."
        ) from error
    what = "copied" if encoded is None else "resized"
    return Outcome(name, what, before.st_size, os.path.getsize(result))


def _encoded(image: Image.Image, name: str, settings: Settings) -> bytes | None:
    """The smaller image in the format of its name; None where it is better left as it is."""
    if min(image.size) <= settings.shorter_side:
        return None
    scale = settings.shorter_side / min(image.size)
    width, height = (max(settings.shorter_side, round(side * scale)) for side in image.size)
    # sizes are halved by averaging first, as long as twice the size is left: faster, and hardly
    # different
    image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    suffix = image_suffix(name)
    options = {"optimize": True, "restart_marker_blocks": 1} if suffix in _JPEG_SUFFIXES else {}
    stream = io.BytesIO()
    try:
        kind = Image.registered_extensions()[f".{suffix}"]
        image.save(stream, kind, quality=settings.quality, **options)
    except (OSError, ValueError):  # more pixels in a row than the format takes
        return None
    return stream.getvalue()


def _check_folder(dest: Path, settings: Settings) -> None:
    """Refuse a folder that is none of ours, or of other settings."""
    if not (dest / MANIFEST).is_file():
        if dest.is_dir() and not all(p.name.startswith(_PASSING) for p in dest.iterdir()):
            raise InputError(
                f"{dest}: expected an empty folder or one of prepared images, found something else "
                "in it. Choose another."
            )
        return
    manifest = read_json(dest / MANIFEST)
    found = {key: manifest.get(key) for key in _FORMAT}
    if found != _FORMAT:
        raise InputError(
            f"{dest / MANIFEST}: expected {_FORMAT}, found {found}. Choose another folder."
        )
    found, wanted = manifest.get("settings"), dataclasses.asdict(settings)
    if found != wanted:
        raise InputError(
            f"{dest}: its images were prepared with {found}, not with {wanted}. Use those "
            "settings, or another folder."
        )


# Names of files that are there only while a run writes, or was killed.
_PASSING = (TEMPORARY_PREFIX, "run.lock")


def _clean(dest: str) -> set[str]:
    """Remove what a killed run was writing; returns the images that are there."""
    there = set()
    for folder, _, files in os.walk(dest):
        for file in files:
            path = os.path.join(folder, file)
            if file.startswith(TEMPORARY_PREFIX):
                os.unlink(path)
            elif image_suffix(file):
                there.add(os.path.relpath(path, dest))
    return there


def _prepared(
    names: list[str], source: str, dest: str, settings: Settings, workers: int
) -> Iterator[Outcome]:
    """Outcomes in the names' order."""
    prepare = partial(prepare_image, source=source, dest=dest, settings=settings)
    if workers == 1:
        yield from map(prepare, names)
        return
    spawn, parent = get_context("spawn"), (os.getpid(),)
    pool = ProcessPoolExecutor(workers, spawn, initializer=_begin_worker, initargs=parent)
    try:
        yield from pool.map(prepare, names, chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise InputError(
            f"{dest}: a process was killed, probably for its memory. Run the same command again, "
            "with fewer --workers: it goes on from here."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL, parent)
