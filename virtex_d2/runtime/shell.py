"""Command lines for people and scripts."""

import shlex
from collections.abc import Iterable


def quote(word: str) -> str:
    """A word for a shell; what has single quotes in it is put in double ones."""
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)


def shell(words: Iterable[str]) -> str:
    """A command line to paste."""
    return " ".join(map(quote, words))
