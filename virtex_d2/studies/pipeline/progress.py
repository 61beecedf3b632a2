"""How far the running stages are: a line that is redrawn on a terminal, else one now and then."""

import re
import sys
import time
from collections.abc import Mapping
from typing import IO

PERIOD = 10.0  # seconds between lines where the output is no terminal
WIDTH = 100  # characters of the line on a terminal
FEW = 3  # processes that the line has room for from beginning to end

_ITERATION = re.compile(r"\biter: (\d+)")
_ETA = re.compile(r"\beta: ([\w:, ]+?)  ")
_LOSS = re.compile(r"\btotal_loss: ([\d.eE+-]+)")
_LOG_PREFIX = re.compile(r"^\[[\d/]+ [\d:]+ [\w.]+\]:? ")  # "[11/21 05:50:53 pretrain.trainer]: "


def clock(seconds: float) -> str:
    """75.4 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """One line about one or several processes; of many, about those that run.

    Understands detectron2's log lines ("iter: 120  total_loss: 1.9  eta: 0:03:10"), and shows the
    latest of the others; of a process that does not train, the latest line of any kind.

    Args:
        iterations: each process's name with its last iteration; 0 where it does not train.
        stream: where to.
    """

    def __init__(self, iterations: Mapping[str, int], stream: IO[str] | None = None):
        self._stream = stream or sys.stdout
        self._in_place = self._stream.isatty()
        self._period = 0.5 if self._in_place else PERIOD
        self._start = self._shown_at = time.monotonic()
        self._states = {name: _State(count) for name, count in iterations.items()}

    def update(self, line: str, name: str = "") -> None:
        """Take a line of a process's output."""
        self._states[name].update(line)
        self.show()

    def begin(self, name: str) -> None:
        """A process has started."""
        self._states[name].started = True

    def end(self, name: str) -> None:
        """A process has ended."""
        self._states[name].ended = True

    def show(self) -> None:
        """Write, where the last time is long enough ago."""
        now = time.monotonic()
        if now - self._shown_at < self._period:
            return
        self._shown_at = now
        text = f"  {clock(now - self._start)} · {' | '.join(self._parts())}"
        if self._in_place:
            print(f"\r\x1b[K{text[:WIDTH]}", end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)

    def _parts(self) -> list[str]:
        several = len(self._states) > 1
        many = len(self._states) > FEW
        begun = any(state.started for state in self._states.values())
        parts = [
            f"{name}: {state if state.started or not begun else 'waiting'}"
            if several
            else str(state)
            for name, state in self._states.items()
            if not many or (state.started and not state.ended)
        ]
        ended = sum(state.ended for state in self._states.values())
        return [f"{ended} of {len(self._states)} done", *parts] if many else parts

    def close(self) -> None:
        """End the line that is redrawn in place."""
        if self._in_place:
            print("\r\x1b[K", end="", file=self._stream, flush=True)


class _State:
    """What one process has last said."""

    def __init__(self, iterations: int):
        self.started = self.ended = False
        self._iterations = iterations
        self._at = ""
        self._latest = ""

    def update(self, line: str) -> None:
        iteration = _ITERATION.search(line)
        if iteration:
            done = f"iteration {int(iteration[1]) + 1}"
            parts = [f"{done} of {self._iterations}" if self._iterations else done]
            parts += [f"loss {float(found[1]):.3f}" for found in [_LOSS.search(line)] if found]
            parts += [f"{found[1]} to go" for found in [_ETA.search(line)] if found]
            self._at, self._latest = " · ".join(parts), ""
        elif _LOG_PREFIX.match(line) or (line and not self._iterations):
            self._latest = _LOG_PREFIX.sub("", line)[:70]

    def __str__(self) -> str:
        if self.ended:
            return "finished"
        return " · ".join(filter(None, [self._at, self._latest])) or "running"
