"""Start a run's processes: one, those of torchrun or a scheduler, or one per GPU of a machine."""

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from .errors import EXIT_CODE, InputError, exit_on_input_error, report
from .preemption import Unfinished

Main = Callable[[argparse.Namespace], Any]


def launch(main: Main, args: argparse.Namespace) -> None:
    """Call `main(args)` in every process of the run, with detectron2's `comm` ready.

    - With RANK and WORLD_SIZE above 1 in the environment (torchrun, or srun with a mapping of its
      variables) this process is one of many: it joins the others by MASTER_ADDR and MASTER_PORT,
      over NCCL where there is CUDA, else over gloo.
    - Else with `--num-gpus` times `--num-machines` above 1, detectron2's own launcher starts one
      process per GPU of this machine.
    - Else `main` runs in this process.

    Raises:
        InputError: the environment or the flags do not fit together or this machine.
    """
    if "WORLD_SIZE" in os.environ and _number("WORLD_SIZE") > 1:
        _join(main, args)
    elif args.num_gpus * args.num_machines > 1:
        _spawn(main, args)
    else:
        main(args)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, on its own device; as it is where there is one process.

    Buffers (norm statistics) are not broadcast: each process keeps its own, as in detectron2.
    """
    from detectron2.engine import create_ddp_model

    return create_ddp_model(model, broadcast_buffers=False)


def _join(main: Main, args: argparse.Namespace) -> None:
    rank, world_size, local_rank = (_number(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(key):
            raise InputError(f"environment: WORLD_SIZE is {world_size} but {key} is not set.")
    on_gpu = torch.cuda.is_available() and not _asks_for_cpu(args)
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"environment: LOCAL_RANK {local_rank} has no GPU of its own: this machine shows "
                f"{torch.cuda.device_count()}. Start fewer processes, or add MODEL.DEVICE cpu."
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world_size)
    comm._LOCAL_PROCESS_GROUP = _local_group(rank - local_rank)
    try:
        main(args)
    except Unfinished:  # all of them, at the same place
        _leave()
        raise
    except InputError as error:
        # The others may be gone, or wait in a collective: there is no orderly end of the group, and
        # gloo's threads abort the interpreter's (SIGABRT instead of the exit code) now and then.
        report(error)
        logging.shutdown()
        os._exit(EXIT_CODE)
    _leave()


def _leave() -> None:
    comm.synchronize()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()


def _local_group(first_rank_here: int) -> dist.ProcessGroup:
    """The process group of this machine's ranks; machines may hold different numbers of them."""
    first_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(first_ranks, first_rank_here)
    mine = None
    for first in sorted(set(first_ranks)):  # every rank creates every group, in one order
        group = dist.new_group([rank for rank, its in enumerate(first_ranks) if its == first])
        if first == first_rank_here:
            mine = group
    return mine


def _spawn(main: Main, args: argparse.Namespace) -> None:
    from detectron2.engine import launch as detectron2_launch
    from torch.multiprocessing.spawn import ProcessExitedException

    if args.num_gpus > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus {args.num_gpus}: this machine shows {torch.cuda.device_count()} CUDA "
            "devices. For several processes on CPUs use torchrun --nproc-per-node instead."
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise InputError("--dist-url auto works on one machine; give tcp://HOST:PORT of the first.")
    try:
        detectron2_launch(
            _exit_on_input_error,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
        )
    except ProcessExitedException as error:
        if error.exit_code == EXIT_CODE:  # the process has printed its InputError
            raise SystemExit(EXIT_CODE) from None
        raise


def _exit_on_input_error(main: Main, args: argparse.Namespace) -> None:
    with exit_on_input_error():
        main(args)


def _number(key: str) -> int:
    value = os.environ.get(key, "")
    if not value.isdigit():
        raise InputError(
            f"environment: expected a number in {key}, found '{value}'. torchrun sets RANK, "
            "WORLD_SIZE and LOCAL_RANK; under srun set them from SLURM_PROCID, SLURM_NTASKS and "
            "SLURM_LOCALID."
        )
    return int(value)


def _asks_for_cpu(args: argparse.Namespace) -> bool:
    opts = getattr(args, "opts", None) or []
    return ("MODEL.DEVICE", "cpu") in zip(opts[::2], opts[1::2])
