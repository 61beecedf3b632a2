"""Mistakes in a job's command that would show hours later, when the job starts."""

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from virtex_d2.engine.cli import argument_parser, expanded
from virtex_d2.engine.errors import InputError
from virtex_d2.slurm.command import Command
from virtex_d2.slurm.options import JobOptions
from virtex_d2.slurm.values import array_numbers

Defaults = Mapping[str, Callable[[], Any]]

ARRAY = "{array}"  # in a command: the number of an array's job
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


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
    command: Command,
    options: JobOptions,
    cwd: Path,
    defaults: Defaults,
    earlier: Sequence[Command] = (),
) -> None:
    """Look whether a tool of this project would take its flags, its config file and its overrides.

    A config file that an earlier stage writes, or a job that this one depends on, is not asked for.

    Args:
        command, options: of the job.
        cwd: where it would run.
        defaults: by the file name of a tool with --resume, what makes its config, with every valid
            key; None from it: it cannot be made here, and keys are not looked at.
        earlier: commands that have ended before.
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
    if not command.resumes:
        return
    first = str(next(array_numbers(options.array))) if options.array else ""
    args = _parsed(command, [word.replace(ARRAY, first) for word in command.arguments])
    cfg = defaults[Path(command.program).name]() if all_there else None
    if cfg is not None:
        from virtex_d2.engine.config import load_config  # which needs more than a login node has

        file = args.config_file and str(cwd / expanded(args.config_file, "--config-file"))
        load_config(cfg, file, args.opts, expand=False)


def _parsed(command: Command, words: Sequence[str]) -> argparse.Namespace:
    def refuse(message: str) -> NoReturn:
        raise InputError(f"{command.program}: {message}")

    parser = argument_parser()
    parser.error = refuse
    return parser.parse_args(words)


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
