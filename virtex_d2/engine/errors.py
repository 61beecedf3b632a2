"""The one error that users cause, and how the tools report it."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator

EXIT_CODE = 2  # of a tool that reports an InputError


class InputError(ValueError):
    """Something that the user gave is wrong: a file, a record, a config key, a flag.

    The message names the file and the record or key, what was found, what was expected and what to
    do. Tools print it as one `error: ...` line and exit with code 2.
    """


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an `InputError` into `error: <message>` on stderr and exit code 2, without a traceback.

    Works as a context manager and as a decorator of a tool's `main`.
    """
    try:
        yield
    except InputError as error:
        report(error)
        raise SystemExit(EXIT_CODE) from None


def report(error: InputError) -> None:
    """Print the error's line on stderr, after all that is already on its way to stdout."""
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)


def some(names: Iterable[str], shown: int = 10, separator: str = ", ") -> str:
    """Join the first names, and count the others: "a, b and 3 more"."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return separator.join(names[:shown]) + more


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The end of an error message about an unknown name: " Did you mean 'X'?", or "".

    Args:
        candidates: what would have been valid. Case is ignored. A part of dotted keys counts as
            near when it is the last of one: "BASE_LR" suggests "SOLVER.BASE_LR". A dotted name is
            only near what differs in a few letters, or in the group alone: keys of another tool's
            config resemble many.
    """
    spelled = {candidate.lower(): candidate for candidate in candidates}
    dotted = "." in name
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.85 if dotted else 0.6)
    if not close:
        last_part = name.lower().rpartition(".")[2]
        by_last_part: dict[str, list[str]] = {}
        for key in spelled:
            by_last_part.setdefault(key.rpartition(".")[2], []).append(key)
        if dotted:
            close = by_last_part.get(last_part, [])
            close = close if len(close) == 1 else []  # ENABLED is in many groups
        else:
            matches = difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=0.75)
            close = [by_last_part[match][-1] for match in matches]
    return f" Did you mean '{spelled[close[0]]}'?" if close else ""
