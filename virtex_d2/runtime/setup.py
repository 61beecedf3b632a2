"""What every run does before its work: flags, output folder, log, seed, device."""

import argparse
import logging
import os
from typing import Any

import torch
import yaml
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from yacs.config import CfgNode

from .errors import InputError
from .files import atomic_path
from .last_checkpoint import has_checkpoint
from .preemption import watch
from .signals import stop_listening
from .stopping import remove_stale_marker

LOGGERS = ("virtex_d2", "pretrain", "detectron2", "fvcore")
# What a run that has trained leaves in its output folder. One that stopped at its first check has
# left config.yaml and log.txt at most, and may be started again in the same place.
TRACES = ("last_checkpoint", "metrics.json")


class _AnyOrderParser(argparse.ArgumentParser):
    """Lets flags stand before, between and after the KEY VALUE pairs."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        return self.parse_intermixed_args(args, namespace)


def argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """detectron2's flags for a training tool; KEY VALUE overrides arrive in `args.opts`.

    Unlike detectron2's own parser it also accepts flags after the overrides, instead of taking
    them for overrides.
    """
    parser = _AnyOrderParser(
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
        "--time-budget",
        metavar="TIME",
        help="after so long (45m, 23.5h or [DAYS-]HH:MM:SS since the start) write a checkpoint and "
        "end with exit code 75; default: VIRTEX_TIME_BUDGET, else before a Slurm job ends",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs per machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--machine-rank", type=int, default=0, help="this machine's number, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help='where the processes meet, e.g. tcp://HOST:PORT; "auto" picks a free port of this '
        "machine (one machine only)",
    )
    parser.add_argument(
        "opts",
        nargs="*",
        default=[],
        metavar="KEY VALUE",
        help="config overrides in pairs, e.g. SOLVER.BASE_LR 0.01 OUTPUT_DIR output/first",
    )
    return parser


def setup_run(cfg: CfgNode, args: argparse.Namespace, check_output: bool = True) -> CfgNode:
    """Prepare a run: checks the output folder, opens the log, seeds, resolves the device.

    In every process of the run: resolves MODEL.DEVICE "auto" to "cuda" or "cpu" and a negative
    SEED to a drawn one (the recorded one on --resume), both in `cfg` and in the log; logs to stdout
    (first process) and OUTPUT_DIR/log.txt; seeds Python, numpy and torch with SEED + rank. The
    first process writes OUTPUT_DIR/config.yaml, except with --eval-only, and except where --resume
    finds a checkpoint: then `write_config` is for after it has been loaded.

    Args:
        cfg: with OUTPUT_DIR, SEED and MODEL.DEVICE. Changed in place; frozen again if it was.
        args: of `argument_parser`; read are config_file, resume and eval_only.
        check_output: whether to refuse an OUTPUT_DIR that holds another run.

    Returns:
        `cfg`.

    Raises:
        InputError: OUTPUT_DIR holds another run and neither --resume nor --eval-only is given, or
            it cannot be written; MODEL.DEVICE is CUDA, and there is none.
    """
    resume, eval_only = getattr(args, "resume", False), getattr(args, "eval_only", False)
    was_frozen = cfg.is_frozen()
    cfg.defrost()
    _prepare_output(cfg.OUTPUT_DIR, check=check_output and not (resume or eval_only))
    rank = comm.get_rank()
    for name in LOGGERS:
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_not_about_input)
    logger = logging.getLogger("virtex_d2")
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Process %d of %d; command line: %s", rank, comm.get_world_size(), args)

    configured_device = cfg.MODEL.DEVICE
    cfg.MODEL.DEVICE = resolve_device(configured_device)
    logger.info("MODEL.DEVICE %s: running on %s", configured_device, cfg.MODEL.DEVICE)
    drawn = cfg.SEED < 0
    cfg.SEED = _resolved_seed(cfg.SEED, cfg.OUTPUT_DIR if resume else None)
    logger.info("SEED %d%s", cfg.SEED, " (drawn)" if drawn else "")
    seed_all_rng(cfg.SEED + rank)
    if eval_only:
        stop_listening()  # there is nothing to save
    else:
        watch(cfg.OUTPUT_DIR, getattr(args, "time_budget", None))
        if rank == 0:
            remove_stale_marker()
        torch.backends.cudnn.benchmark = cfg.get("CUDNN_BENCHMARK", False)

    logger.info("Config:\n%s", cfg.dump())
    # A run that goes on keeps its config until its checkpoint has agreed to the new one.
    goes_on = resume and has_checkpoint(cfg.OUTPUT_DIR)
    if not eval_only and not goes_on:
        write_config(cfg)
    if was_frozen:
        cfg.freeze()
    return cfg


def write_config(cfg: CfgNode) -> None:
    """Write OUTPUT_DIR/config.yaml, in the first process alone."""
    if comm.is_main_process():
        with atomic_path(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as temporary:
            temporary.write_text(cfg.dump(), encoding="utf-8")


def _is_not_about_input(record: logging.LogRecord) -> bool:
    """False for the traceback of an `InputError` that detectron2's loop logs: the tool tells it."""
    return not (record.exc_info and isinstance(record.exc_info[1], InputError))


def _prepare_output(folder: str, check: bool) -> None:
    """Look at the folder in the first process alone, and fail in all of them."""
    problem = ""
    if comm.is_main_process():
        try:
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(None, "it is not writable")
        except OSError as error:
            problem = f"OUTPUT_DIR {folder}: cannot be used: {error.strerror}. Choose another."
        traces = [name for name in TRACES if os.path.exists(os.path.join(folder, name))]
        if check and traces and not problem:
            problem = (
                f"OUTPUT_DIR {folder}: holds another run ({', '.join(traces)}). Continue it with "
                "--resume, choose another OUTPUT_DIR, or remove the folder."
            )
    problem = comm.all_gather(problem)[0]
    if problem:
        raise InputError(problem)


def resolve_device(device: str) -> str:
    """MODEL.DEVICE with "auto" resolved to "cuda" where there is a device, else to "cpu".

    Raises:
        InputError: it is CUDA, and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"MODEL.DEVICE {device}: no CUDA device is usable here. Use MODEL.DEVICE auto or cpu, "
            "or check the driver with nvidia-smi."
        )
    return device


def _resolved_seed(seed: int, resumed_folder: str | None) -> int:
    if seed >= 0:
        return seed
    recorded = os.path.join(resumed_folder, "config.yaml") if resumed_folder else ""
    if os.path.isfile(recorded):
        with open(recorded, encoding="utf-8") as file:
            seed = yaml.safe_load(file).get("SEED", -1)
    if seed < 0:
        seed = int.from_bytes(os.urandom(4), "little") >> 1
    return comm.all_gather(seed)[0]
