"""Command lines: of training tools, and for shells. Standard library alone: it answers at once."""

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from virtex_d2.engine.errors import InputError, exit_on_input_error, nearest
from virtex_d2.engine.topology import COLLECTIVE_TIMEOUT, LAUNCH_TIMEOUT

_DEFAULTS = {"DETECTRON2_DATASETS": "datasets"}  # detectron2's own
_VARIABLE = re.compile(r"\$(\{)?([A-Za-z_]\w*)(?(1)\})", re.ASCII)
_HOME = re.compile(r"(^|=)~(?=/|$)")


class _FlagsFirstParser(argparse.ArgumentParser):
    """Refuses flags after the KEY VALUE pairs, where detectron2's parser takes them for pairs."""

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            message += f".{nearest(unknown[0].partition('=')[0], self._option_string_actions)}"
        super().error(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        late = [opt for opt in parsed.opts if opt.startswith("--")]
        if late:
            self.error(
                f"{late[0]} stands after the KEY VALUE pairs, which begin with {parsed.opts[0]}. "
                "Put flags before them."
            )
        return parsed


def program_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a tool's own flags, whose --help keeps the description's lines."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """detectron2's flags for a training tool; KEY VALUE overrides arrive in `args.opts`.

    Flags after the overrides are an error; detectron2's own parser takes them for overrides.
    """
    parser = _FlagsFirstParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config file")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from OUTPUT_DIR/last_checkpoint; starts afresh where there is none",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="only evaluate MODEL.WEIGHTS, or where that is empty OUTPUT_DIR's last checkpoint",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check flags, config file and keys, then end",
    )
    parser.add_argument(
        "--time-budget",
        metavar="TIME",
        help="after so long (45m, 23.5h or [DAYS-]HH:MM:SS since the start) write a checkpoint and "
        "end with exit code 75; default: VIRTEX_TIME_BUDGET, else before a Slurm job ends",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="GPUs per machine, each with a process of its own (default 1; where srun starts one "
        "task per node, all). Not with torchrun, nor with several tasks per node: these start the "
        "processes themselves",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="processes per machine, for runs on CPUs too",
    )
    parser.add_argument("--num-machines", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="this machine's number, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where the processes meet, as tcp://HOST:PORT of the first machine; needed with "
        "--num-machines",
    )
    parser.add_argument(
        "--launch-timeout",
        type=_seconds,
        default=LAUNCH_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for all processes to come; who is missing is named (default "
        f"{LAUNCH_TIMEOUT})",
    )
    parser.add_argument(
        "--collective-timeout",
        type=_seconds,
        default=COLLECTIVE_TIMEOUT,
        metavar="SECONDS",
        help="how long one process may keep the others waiting, such as with its evaluation "
        f"(default {COLLECTIVE_TIMEOUT})",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides in pairs, e.g. SOLVER.BASE_LR 0.01 OUTPUT_DIR output/first",
    )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, found {text}")
    return seconds


def run_tool(description: str | None, main: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line, start the processes that it asks for, and run `main` in each.

    Args:
        main: given what was parsed. Its module should import nothing heavy at its top: --help and a
            mistyped flag need not wait for torch.
    """
    arguments = argument_parser(description).parse_args()
    from virtex_d2.engine.distributed import launch
    from virtex_d2.engine.unfinished import exit_at_once_if_unfinished

    with exit_on_input_error(), exit_at_once_if_unfinished():
        launch(main, arguments)


def run_program(main: Callable[[str], int | None], description: str) -> NoReturn:
    """Run a tool that starts no processes; a closed pipe and Ctrl-C end it without a word.

    Args:
        main: given `description`, for --help; its result is the exit code.
        description: of the tool.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head`
    for stream in (sys.stdin, sys.stdout):  # names of files need not be text
        stream.reconfigure(errors="surrogateescape")
    try:
        with exit_on_input_error():
            code = main(description)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    raise SystemExit(code)


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
