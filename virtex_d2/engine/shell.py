"""Command lines for people and scripts, and what a shell would have replaced in texts."""

import os
import re
import shlex
from collections.abc import Iterable

from virtex_d2.engine.errors import InputError

_DEFAULTS = {"DETECTRON2_DATASETS": "datasets"}  # detectron2's own
_VARIABLE = re.compile(r"\$(\{)?([A-Za-z_]\w*)(?(1)\})", re.ASCII)
_HOME = re.compile(r"(^|=)~(?=/|$)")


def quote(word: str) -> str:
    """A word for a shell; what has single quotes in it is put in double ones."""
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)


def shell(words: Iterable[str]) -> str:
    """A command line to paste."""
    return " ".join(map(quote, words))


def expanded(text: str, where: str) -> str:
    """A text that no shell has read, with $NAME, ${NAME} and a leading ~ replaced.

    Args:
        text: such as a path of a config. $DETECTRON2_DATASETS is "datasets" where it is not set.
        where: the file and key, for messages.
    """

    def value(match: re.Match) -> str:
        found = os.environ.get(match[2], _DEFAULTS.get(match[2]))
        if found is None:
            raise InputError(
                f"{where}: {text} holds {match[0]}, and the environment has no such variable. "
                "Set it, or write the path out."
            )
        return found

    return os.path.expanduser(_VARIABLE.sub(value, text))


def quote_unread(word: str) -> str:
    """A word for a shell that is to replace variables and ~ in it: the rest is quoted."""
    parts = _VARIABLE.split(_HOME.sub(r"\1${HOME}", word))
    texts = [quote(text) if text else "" for text in parts[::3]]
    names = [f'"${name}"' for name in parts[2::3]]
    return "".join(a + b for a, b in zip(texts, [*names, ""])) or "''"
