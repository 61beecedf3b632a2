"""Submit a tool to a Slurm cluster: writes an sbatch script that can be read, and hands it over.

python tools/launch_slurm.py --nodes 2 --gpus-per-node 8 --time 24:00:00 -- \\
    tools/pretrain_net.py --config-file configs/pretrain/bicaptioning_R_50_L1_H1024.yaml \\
    OUTPUT_DIR output/pretrain

python tools/launch_slurm.py --pipeline pipeline.toml --follow
python tools/launch_slurm.py --status
python tools/launch_slurm.py --follow 1234

The job continues from its last checkpoint when it starts again, and requeues itself when it was
preempted or ran out of time. --dry-run prints the script and submits nothing. Defaults of a site
(partition, account, modules, ...) stand in ~/.config/virtex_d2/slurm.toml, or in --site FILE.
"""

import argparse
import signal
import sys
from pathlib import Path

from virtex_d2.engine.cli import expanded
from virtex_d2.engine.errors import InputError, exit_on_input_error
from virtex_d2.slurm import submit
from virtex_d2.slurm.command import read_command
from virtex_d2.slurm.follow import follow, status_table
from virtex_d2.slurm.options import (
    LOGS,
    Stage,
    add_arguments,
    given_options,
    make_options,
    read_pipeline,
    read_site,
)

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Do what the command line says.

    Raises:
        SystemExit: at its end, with the exit code.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    with exit_on_input_error():
        try:
            sys.exit(_run())
        except submit.SlurmError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            print("\nNo longer followed; the jobs go on.", file=sys.stderr)
            sys.exit(130)


def _run() -> int:
    args, command = _parse()
    layers = read_site(args.site), given_options(args)
    cwd = Path.cwd()
    logs = cwd / expanded({**layers[0], **layers[1]}.get("logs", LOGS), "logs")
    if command or args.pipeline:
        if command and args.pipeline:
            raise InputError("--pipeline: its file has the commands; leave the one after -- out.")
        if args.jobs or args.status:
            raise InputError("a job's id or --status: not together with a new job.")
        jobs = _submit(args, command, layers, cwd, logs)
    elif args.status or args.follow:
        jobs = submit.find_submitted(logs, args.jobs)
        if not args.jobs:
            jobs = jobs[-1:] if args.follow else jobs[-20:]
    else:
        raise InputError("nothing to do: expected -- tools/train_net.py ..., or --pipeline FILE.")
    if args.status:
        print(status_table(jobs))
    if args.follow and jobs:
        return 0 if follow(jobs) else 1
    return 0


def _submit(args, command, layers, cwd: Path, logs: Path) -> list:
    """The submitted jobs; none with --dry-run."""
    if args.pipeline:
        stages, name = read_pipeline(args.pipeline, *layers), args.pipeline.stem
    else:
        options = make_options(*layers)
        stages = [Stage("", tuple(command), options, ())]
        name = options.name or read_command(command, cwd, ROOT).name
    pairs = submit.stage_jobs(stages, submit.new_folder(logs, name), cwd, ROOT)
    if args.dry_run:
        for stage, job in pairs:
            after = f", after {', '.join(stage.after)}" if stage.after else ""
            print(f"# {job.folder}/job.sbatch{after}\n{job.text()}")
        return []
    jobs = submit.submit_pipeline(pairs)
    for job in jobs:
        print(f"job {job.job_id} {job.name}: {job.folder / job.log}")
    return jobs


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- tools/TOOL.py ... | --pipeline FILE | --status | --follow",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--site", type=Path, metavar="FILE", help="TOML file with defaults of the site")
    add("--pipeline", type=Path, metavar="FILE", help="TOML file with stages, instead of a command")
    add("--dry-run", action="store_true", help="print the script, submit nothing")
    add("--follow", action="store_true", help="print the log and the job's state until it ends")
    add("--status", action="store_true", help="print the states of jobs")
    add("jobs", nargs="*", metavar="JOB", help="ids or folders for --follow and --status")
    add_arguments(parser.add_argument_group("the job (each also a key of the TOML files)"))
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    args, unknown = parser.parse_known_args(words[:place])
    tool = next((word for word in args.jobs if word.endswith(".py")), "")
    if tool:
        parser.error(f"expected -- before the command: [options] -- {tool} ...")
    if unknown:
        hint = "" if "--" in words else " (is -- missing before the command?)"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args, words[place + 1 :]
