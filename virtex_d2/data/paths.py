"""Paths in configs, which may hold environment variables."""

import os

from virtex_d2.runtime.errors import InputError

# detectron2's own default for its data sets' folder.
_DEFAULTS = {"DETECTRON2_DATASETS": "datasets"}


def expanded(path: str, key: str) -> str:
    """A path with its variables and ~ replaced; $DETECTRON2_DATASETS is "datasets" where not set.

    Args:
        path: as in the config.
        key: the config key, for messages.

    Raises:
        InputError: there is no such variable.
    """
    for variable, value in _DEFAULTS.items():
        if variable not in os.environ:
            path = path.replace(f"${variable}", value).replace(f"${{{variable}}}", value)
    path = os.path.expanduser(os.path.expandvars(path))
    if "$" in path:
        raise InputError(f"{key}: {path}: the environment has no such variable.")
    return path
