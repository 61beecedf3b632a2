"""MODEL.WEIGHTS as an address: fetched, or refused in one line."""

import http.client
import re
import socket
from urllib.parse import unquote, urlsplit

import detectron2.checkpoint  # noqa: F401  # registers catalog://
from detectron2.utils.file_io import PathManager

from virtex_d2.engine.errors import InputError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FETCHED = ("http", "https", "ftp", "detectron2", "catalog")
_PATIENCE = 60.0  # seconds without a byte


def local_path(weights: str) -> str:
    """MODEL.WEIGHTS as a file of this machine; what has a scheme (https://, detectron2://) is
    fetched by detectron2 into its cache.
    """
    match = _ADDRESS.match(weights)
    if not match:
        return weights
    scheme = match[1].lower()
    if scheme == "file":
        return unquote(urlsplit(weights).path)
    advice = "Download it where that works, and give the file's path."
    if scheme not in _FETCHED:
        raise InputError(
            f"{weights}: {scheme}:// is not fetched here; expected a path, or one of "
            f"{', '.join(f'{name}://' for name in _FETCHED)}. {advice}"
        )
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        return PathManager.get_local_path(scheme + weights[len(scheme) :])
    except LookupError as error:
        raise InputError(f"{weights}: detectron2 has no {error}. {advice}") from error
    except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
        text = str(error).removeprefix("<urlopen error ").rstrip(">")
        reason = " ".join(text.split()) or type(error).__name__
        raise InputError(f"{weights}: cannot be fetched: {reason}. {advice}") from error
    finally:
        socket.setdefaulttimeout(before)
