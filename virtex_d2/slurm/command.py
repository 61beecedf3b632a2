"""A command as it would be typed without a cluster, taken apart for a job's script."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from virtex_d2.engine.errors import InputError

# Tools with --resume, which start the run's processes or are one of them. A job that starts again
# continues from the last checkpoint, and begins afresh where there is none.
RESUMING = ("pretrain_net.py", "train_net.py", "linear_probe.py")
CHECK = "check_gpu.py"  # one process for each GPU, and no --resume
_STARTERS = ("torchrun", "srun", "mpirun", "mpiexec")
_TORCHRUN = ("torch.distributed.run", "torch.distributed.launch")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")


@dataclass(frozen=True)
class Command:
    """What a job runs.

    Attributes:
        program: a Python file, such as a tool, or any other program.
        arguments: its own.
        python: the interpreter that stood before a Python file; "" where that was only "python",
            or nothing.
        python_options: of that interpreter, such as -u.
        is_own: whether the program is one of this project's tools.
        unread: whether no shell has read the words: variables and ~ are for the job's to replace.
    """

    program: str
    arguments: tuple[str, ...] = ()
    python: str = ""
    python_options: tuple[str, ...] = ()
    is_own: bool = False
    unread: bool = False

    @property
    def name(self) -> str:
        """Of a job that gets no other."""
        return Path(self.program).stem

    @property
    def is_python(self) -> bool:
        return self.program.endswith(".py")

    @property
    def resumes(self) -> bool:
        """Whether the program has --resume."""
        return Path(self.program).name in RESUMING

    @property
    def runs_once(self) -> bool:
        """Whether it is a tool of one process, which several would do at the same time."""
        return self.is_own and not self.resumes and Path(self.program).name != CHECK

    def value(self, key: str) -> str | None:
        """What stands behind a word, such as a flag or a config key, the last time it is there."""
        words = self.arguments
        places = [i for i, word in enumerate(words[:-1]) if word == key]
        return words[places[-1] + 1] if places else None


def read_command(words: Sequence[str], cwd: Path, root: Path, unread: bool = False) -> Command:
    """Take a command line apart: "python tools/train_net.py ..." is "tools/train_net.py ...".

    Args:
        words: of the command line.
        cwd: where it is run.
        root: the project's folder.
        unread: as `Command`'s.
    """
    if not words:
        raise InputError("no command: expected -- tools/train_net.py ... after the options.")
    program = Path(words[0]).name
    if program in _STARTERS:
        raise _starts_processes(program)
    named, options, words = _without_python(words)
    if not words[0].endswith(".py"):
        _refuse_wrapped_tool(words)
    is_own = (cwd / words[0]).resolve().parent == root / "tools"
    return Command(words[0], tuple(words[1:]), named, options, is_own, unread)


def _without_python(words: Sequence[str]) -> tuple[str, tuple[str, ...], Sequence[str]]:
    """The interpreter, where it is a certain one, its options, and what it runs."""
    if not _PYTHON.fullmatch(Path(words[0]).name):
        return "", (), words
    place = 1
    while place < len(words) and words[place].startswith("-"):
        if words[place] in ("-m", "-c"):  # no file: a program as any other
            if set(words[place + 1 : place + 2]) & set(_TORCHRUN):
                raise _starts_processes(f"{words[0]} -m {words[place + 1]}")
            return "", (), words
        place += 2 if words[place] in ("-W", "-X") else 1
    if place >= len(words) or not words[place].endswith(".py"):
        found = f"'{words[place]}'" if place < len(words) else "nothing"
        raise InputError(
            f"{words[0]} in the command: expected a .py file behind it, found {found}."
        )
    named = "" if words[0] in ("python", "python3") else words[0]
    return named, tuple(words[1:place]), words[place:]


def _starts_processes(starter: str) -> InputError:
    options = "--launcher torchrun, " if "torch" in starter else ""
    return InputError(
        f"{starter} in the command: the job's script starts the processes. Begin with the tool, as "
        f"tools/train_net.py, and before -- say {options}--nodes, --gpus-per-node and, where "
        "it is not one a GPU, --tasks-per-node."
    )


def _refuse_wrapped_tool(words: Sequence[str]) -> None:
    """A tool behind another program would be started without --resume, by any interpreter."""
    tool = next((word for word in words if Path(word).name in RESUMING), "")
    if tool:
        raise InputError(
            f"{words[0]} in the command, before {tool}: begin with {tool}. What comes before it is "
            "said by options: --container, --env NAME=VALUE, --setup, --conda, --venv, --python."
        )
