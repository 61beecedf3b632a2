"""A command as it would be typed without a cluster, taken apart for a job's script.

Mistakes in it that would show hours later, when the job starts, are told here.
"""

import difflib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from virtex_d2.engine.cli import expanded
from virtex_d2.engine.errors import EXIT_CODE, InputError
from virtex_d2.slurm.options import JobOptions, array_numbers

# Tools with --resume, which start the run's processes or are one of them. A job that starts again
# continues from the last checkpoint, and begins afresh where there is none.
RESUMING = ("pretrain_net.py", "train_net.py", "linear_probe.py")
CHECK = "check_gpu.py"  # one process for each GPU, and no --resume
_STARTERS = ("torchrun", "srun", "mpirun", "mpiexec")
_TORCHRUN = ("torch.distributed.run", "torch.distributed.launch")
ARRAY = "{array}"  # in a command: the number of an array's job
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")


@dataclass(frozen=True)
class Command:
    """What a job runs."""

    program: str  # a Python file, such as a tool, or any other program
    arguments: tuple[str, ...] = ()  # its own
    # the interpreter that stood before a Python file; "" where that was only "python", or nothing
    python: str = ""
    python_options: tuple[str, ...] = ()  # of that interpreter, such as -u
    is_own: bool = False  # whether the program is one of this project's tools
    # whether no shell has read the words: variables and ~ are for the job's to replace
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
    """Take a command line apart: "python tools/train_net.py ..." is "tools/train_net.py ..."."""
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


def processes_per_node(command: Command, options: JobOptions) -> int:
    """As --tasks-per-node says; else one for each GPU, and one of what is to run once."""
    default = 1 if command.runs_once else max(1, options.num_gpus)
    return options.tasks_per_node or default


def check_command(command: Command, options: JobOptions, cwd: Path) -> None:
    """Raise InputError if the command cannot run as the options say, or would do something else."""
    if command.is_python and not (cwd / command.program).is_file():
        raise InputError(f"{command.program}: no such file in {cwd}, where the job would run.")
    if command.python and options.python not in ("", command.python):
        raise InputError(
            f"{command.python} in the command, --python {options.python} (or python in a site's "
            "file): name one interpreter."
        )
    _check_array(command, options)
    _check_processes(command, options)


def _check_array(command: Command, options: JobOptions) -> None:
    for word in command.arguments:
        for name in _PLACEHOLDER.findall(word):
            if name != "array" and difflib.get_close_matches(name.lower(), ["array"], cutoff=0.75):
                raise InputError(f"{word} in the command: did you mean {ARRAY}?")
    numbered = any(ARRAY in word for word in (command.program, *command.arguments))
    if numbered and not options.array:
        raise InputError(f"{ARRAY} in the command: needs --array, e.g. --array 1-3.")
    if not options.array:
        return
    if not numbered:
        raise InputError(
            f"--array {options.array}: all its jobs would do the same. Put {ARRAY} into the "
            f"command, e.g. SEED {ARRAY} OUTPUT_DIR output/seed{ARRAY}."
        )
    folder = command.value("OUTPUT_DIR")
    # A config of each job's own may name its folder.
    own_config = folder is None and ARRAY in (command.value("--config-file") or "")
    if command.resumes and not own_config and ARRAY not in (folder or ""):
        found = f"OUTPUT_DIR {folder}" if folder else "the config's OUTPUT_DIR"
        raise InputError(
            f"--array {options.array}: all its jobs would write into one folder, {found}. Put "
            f"{ARRAY} into its name, e.g. OUTPUT_DIR output/seed{ARRAY}."
        )


def _check_processes(command: Command, options: JobOptions) -> None:
    per_node = processes_per_node(command, options)
    if command.runs_once:
        if options.nodes * per_node > 1:
            raise InputError(
                f"{command.program} is to run once, and would be started "
                f"{options.nodes * per_node} times. Give it --nodes 1 and --tasks-per-node 1; its "
                "process sees all GPUs of the node."
            )
        return
    own = sorted({"--num-gpus", "--num-processes"} & set(command.arguments))
    if own and per_node > 1:
        raise InputError(
            f"{own[0]} in the command: {options.launcher} starts the {per_node} processes of a "
            "node already. Leave it out, or add --tasks-per-node 1."
        )


def check_configs(
    command: Command, options: JobOptions, cwd: Path, earlier: Sequence[Command] = ()
) -> None:
    """Look for a tool's config files, and let a tool with --check look at all that it is given.

    A config file that an earlier stage writes, or a job that this one depends on, is not asked for.
    """
    if not command.is_own:
        return
    made = [(cwd / word).resolve() for other in earlier for word in other.arguments]
    all_there = True
    for file in _config_files(command):
        for number in array_numbers(options.array) if ARRAY in file else [0]:
            path = file.replace(ARRAY, str(number))
            later = options.dependency or set(made) & set((cwd / path).resolve().parents)
            unknown = later and "$" in path  # the variable may be set there alone
            if not unknown and (cwd / expanded(path, "--config-file")).is_file():
                continue
            all_there = False
            if not later:
                raise InputError(
                    f"--config-file {path}: no such file in {cwd}, where the job would run."
                )
    if command.resumes and all_there:
        first = str(next(array_numbers(options.array))) if options.array else ""
        _let_check(command, [word.replace(ARRAY, first) for word in command.arguments], cwd)


def _let_check(command: Command, arguments: Sequence[str], cwd: Path) -> None:
    if missing := [name for name in ("torch", "detectron2") if not find_spec(name)]:
        note = f"{missing[0]} is not in this Python: flags, config files and keys are not checked."
        print(note, file=sys.stderr)
        return
    tool = [sys.executable, cwd / command.program, "--check", *arguments]
    done = subprocess.run(tool, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        if done.returncode == EXIT_CODE:  # it refuses what it was given: the last line says why
            said = re.sub(r"^(\S+: )?error: ", "", said.splitlines()[-1])
        raise InputError(f"{command.program}: {said}")


def _config_files(command: Command) -> list[str]:
    """Those behind --config-file; comparisons have several there, up to the next flag."""
    words, files = command.arguments, []
    for place, word in enumerate(words):
        if word.startswith("--config-file="):
            files.append(word.partition("=")[2])
        elif word in ("--config-file", "--config-files"):
            files += words[place + 1 : place + 2]
            for more in words[place + 2 :]:
                if not more.endswith((".yaml", ".yml")):
                    break
                files.append(more)
    return files
