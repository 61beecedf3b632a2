"""What the processes of the tests' runs do.

What only some of them need is imported by those: it takes seconds, in each that is started anew.
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch
from detectron2.utils import comm

from virtex_d2.engine import preflight
from virtex_d2.engine.distributed import describe, wrap_ddp
from virtex_d2.engine.errors import InputError


def train(args: argparse.Namespace) -> None:
    """A step of a model, and what everybody knows afterwards, in <rank>.json."""
    from detectron2.config import get_cfg

    from virtex_d2.engine.run import setup_run

    torch.manual_seed(comm.get_rank())
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ddp = wrap_ddp(model)
    batch = torch.full((4, 3), float(comm.get_rank())) + torch.arange(4.0)[:, None]
    ddp(batch).pow(2).sum().backward()
    cfg = get_cfg()
    cfg.OUTPUT_DIR, cfg.SEED, cfg.MODEL.DEVICE = "run", -1, "auto"
    setup_run(cfg, args)
    report(
        wrapped=type(ddp).__name__,
        weight=model[0].weight.tolist(),
        gradient=model[0].weight.grad.tolist(),
        running_mean=model[1].running_mean.tolist(),
        gathered=comm.all_gather(comm.get_rank()),
        seed=cfg.SEED,
        random=torch.rand(1).item(),
    )


def tell(args: argparse.Namespace) -> None:
    report(description=describe(), threads=os.environ.get("OMP_NUM_THREADS"))


def report(**more: object) -> None:
    content = {
        "rank": comm.get_rank(),
        "world_size": comm.get_world_size(),
        "local_rank": comm.get_local_rank(),
        "local_size": comm.get_local_size(),
        **more,
    }
    Path(f"{comm.get_rank()}.json").write_text(json.dumps(content))


def set_up(args: argparse.Namespace) -> None:
    from detectron2.config import get_cfg

    from virtex_d2.engine.config import load_config
    from virtex_d2.engine.run import setup_run

    preflight.VISIBLE_WITHIN = 1.0
    setup_run(load_config(get_cfg(), None, args.opts), args)


def crash(args: argparse.Namespace) -> None:
    """The others are in a collective when the second one fails."""
    if comm.get_rank() == 1:
        raise ZeroDivisionError("the second one's own mistake")
    comm.synchronize()


def refuse(args: argparse.Namespace) -> None:
    if comm.get_rank() == int(os.environ.get("VICTIM", "1")):
        raise InputError("images/7.jpg: truncated.")
    comm.synchronize()


def vanish(args: argparse.Namespace) -> None:
    """As killed by the kernel, without a word."""
    if comm.get_rank() == int(os.environ.get("VICTIM", "1")):
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


def dawdle(args: argparse.Namespace) -> None:
    """Longer than the collective timeout of its test."""
    if comm.get_rank() == 1:
        oversleep()
    comm.synchronize()


def oversleep() -> None:
    time.sleep(8)


def stop_unfinished(args: argparse.Namespace) -> None:
    report()
    raise SystemExit(75)


def finish_apart(args: argparse.Namespace) -> None:
    """One has something to do alone after the others are done."""
    if comm.get_rank() == 0:
        time.sleep(3)
        report()


def await_signal(args: argparse.Namespace) -> None:
    """Until USR1 comes, and longer than that for the second one."""
    received = []
    signal.signal(signal.SIGUSR1, lambda *_: received.append(time.time()))
    report(parent=os.getppid())
    while not received:
        time.sleep(0.05)
    raise SystemExit(75)


# In the place of the project's own functions, in one process:


own_code, own_versions = preflight.code, preflight.versions


def other_code() -> dict[str, str]:
    return {**own_code(), "virtex_d2/detection/trainer.py": "0123456789ab"}


def other_versions() -> dict[str, str]:
    return {**own_versions(), "torchvision": "0.1.0"}
