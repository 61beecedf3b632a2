"""What every run does before its work: output folder, log, seed, device."""

import argparse
import logging
import os
from collections.abc import Collection

import torch
import torch.distributed as dist
import yaml
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from yacs.config import CfgNode

from virtex_d2.engine.checkpointer import has_checkpoint
from virtex_d2.engine.device import resolve_device
from virtex_d2.engine.distributed import abort, describe
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import write_text
from virtex_d2.engine.identity import check_resumed, check_same
from virtex_d2.engine.lock import lock_folder, release_locks
from virtex_d2.engine.preflight import check_shared
from virtex_d2.engine.signals import stop_listening
from virtex_d2.engine.stopping import remove_stale_marker, watch

LOGGERS = ("virtex_d2", "pretrain", "detectron2", "fvcore")
# What a run that has trained leaves in its output folder. One that stopped at its first check has
# left config.yaml and log.txt at most, and may be started again in the same place.
TRACES = ("last_checkpoint", "metrics.json")


def setup_run(
    cfg: CfgNode,
    args: argparse.Namespace,
    may_change: Collection[str] | None = None,
) -> CfgNode:
    """Prepare a run: lock the output folder, open the log, seed, resolve the device.

    In every process: compares the config with that of the first one; resolves MODEL.DEVICE "auto"
    to "cuda" or "cpu" and a negative SEED to a drawn one (the recorded one on --resume); logs to
    stdout (first process) and OUTPUT_DIR/log.txt; seeds Python, numpy and torch with SEED + rank.
    The first process writes OUTPUT_DIR/config.yaml, except with --eval-only, and except where
    --resume finds a checkpoint: then `write_config` is for after it has been loaded.

    Args:
        cfg: with OUTPUT_DIR, SEED and MODEL.DEVICE. Changed in place, and returned.
        args: of `virtex_d2.engine.cli.argument_parser`.
        may_change: patterns of the keys that may differ from OUTPUT_DIR/config.yaml when the run
            goes on from a checkpoint. None: any, where something else looks at them.
    """
    resume, eval_only = getattr(args, "resume", False), getattr(args, "eval_only", False)
    was_frozen = cfg.is_frozen()
    cfg.defrost()
    rank = comm.get_rank()
    check_same(cfg)
    _prepare_output(cfg.OUTPUT_DIR, check=not (resume or eval_only))
    for name in LOGGERS:
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_not_about_input)
    logger = logging.getLogger("virtex_d2")
    logger.info("Environment:\n%s", collect_env_info())
    if comm.is_main_process():
        for line in describe():
            logger.info(line)
    logger.info("Process %d of %d; command line: %s", rank, comm.get_world_size(), args)

    configured_device = cfg.MODEL.DEVICE
    cfg.MODEL.DEVICE = resolve_device(configured_device, getattr(args, "num_gpus", None))
    _check_backend(cfg.MODEL.DEVICE)
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
    _as_given[cfg.OUTPUT_DIR] = cfg.dump()
    if not eval_only:
        if goes_on:
            check_resumed(cfg, may_change)
        else:
            write_config(cfg)
    if was_frozen:
        cfg.freeze()
    return cfg


# By OUTPUT_DIR, the config before what depends on the number of processes was put into it: so it
# can be compared with that of a run that is resumed.
_as_given: dict[str, str] = {}


def write_config(cfg: CfgNode) -> None:
    """Write OUTPUT_DIR/config.yaml as `setup_run` was given it. In the first process alone."""
    if comm.is_main_process():
        text = _as_given.get(cfg.OUTPUT_DIR, cfg.dump())
        write_text(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), text)


def _check_backend(device: str) -> None:
    """Refuse MODEL.DEVICE where the processes have met for another, or all would use one GPU."""
    if device == "cpu" and comm.get_world_size() > 1 and dist.get_backend() == "nccl":
        raise InputError(
            "MODEL.DEVICE cpu is in the config file, which is read after the processes have met to "
            "use GPUs. Give it on the command line, as MODEL.DEVICE cpu."
        )
    if ":" in device and comm.get_world_size() > 1:
        raise InputError(
            f"MODEL.DEVICE {device}: all {comm.get_world_size()} processes would use that one. Say "
            "cuda or auto, and each has its own; CUDA_VISIBLE_DEVICES chooses among them."
        )


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
            lock_folder(folder, on_lost=abort)
        except OSError as error:
            problem = f"OUTPUT_DIR {folder}: cannot be used: {error.strerror}. Choose another."
        except InputError as error:
            problem = str(error)
        traces = [name for name in TRACES if os.path.exists(os.path.join(folder, name))]
        if check and traces and not problem:
            release_locks()
            problem = (
                f"OUTPUT_DIR {folder}: holds another run ({', '.join(traces)}). Continue it with "
                "--resume, choose another OUTPUT_DIR, or remove the folder."
            )
    problem = comm.all_gather(problem)[0]
    if problem:
        raise InputError(problem)
    check_shared(folder)


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
