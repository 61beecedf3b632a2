"""Make one image file fit for fast loading: small, and with restart markers.

Needs no torch, so that a process that does nothing else starts at once.
"""

import io
import os
import shutil
import signal
from dataclasses import dataclass

from PIL import Image

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import atomic_path
from virtex_d2.engine.folders import image_suffix
from virtex_d2.engine.images import read_image
from virtex_d2.engine.parent import end_with_parent

_JPEG_SUFFIXES = ("jpg", "jpeg", "jfif", "jpe")


@dataclass(frozen=True)
class Settings:
    """How images are prepared.

    Attributes:
        shorter_side: pixels; images whose shorter side has no more are copied as they are, as are
            those so long that their format could not hold the result.
        quality: of JPEG, as libjpeg counts it.
    """

    shorter_side: int = 320
    quality: int = 90

    def __post_init__(self):
        if self.shorter_side < 1:
            raise InputError(f"--shorter-side {self.shorter_side}: expected 1 or more pixels.")
        if not 1 <= self.quality <= 95:
            raise InputError(
                f"--quality {self.quality}: expected 1 to 95; above, files grow and nothing else."
            )


@dataclass(frozen=True)
class Outcome:
    """What became of an image.

    Attributes:
        name: relative to the folder.
        size, mtime_ns: of the source, bytes and nanoseconds: they tell whether it has changed.
        what: "resized", "copied" or "unreadable".
        bytes: of the result.
        reason: why it is unreadable.
    """

    name: str
    size: int
    mtime_ns: int
    what: str
    bytes: int = 0
    reason: str = ""


def prepare_image(name: str, source: str, dest: str, settings: Settings) -> Outcome:
    """Write an image that loads fast, of the same name; one that cannot be decoded leaves none.

    One that is larger becomes upright, RGB and `settings.shorter_side` wide or high. JPEGs then get
    a restart marker after each block of pixels, so that crops can be decoded by themselves
    (`pretrain.jpeg`); other kinds stay what their name says. Smaller images are copied as they are.
    What has been written is decoded before it appears.

    Args:
        name: of the image, relative to both folders.
        source, dest: the folders.
        settings: size and quality.
    """
    origin, result = os.path.join(source, name), os.path.join(dest, name)
    size = mtime_ns = 0
    try:
        stat = os.stat(origin)
        size, mtime_ns = stat.st_size, stat.st_mtime_ns
        image = read_image(origin)
    except OSError as error:
        if os.path.lexists(result):  # of what the source was before
            os.unlink(result)
        return Outcome(name, size, mtime_ns, "unreadable", reason=error.strerror or str(error))
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
    return Outcome(name, size, mtime_ns, what, os.path.getsize(result))


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


def begin_worker(parent: int) -> None:
    """In a process of a pool: leave Ctrl-C to its parent, and do not outlive it.

    Args:
        parent: its id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL, parent)
