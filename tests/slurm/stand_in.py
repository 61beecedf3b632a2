"""A run as the batch script sees one: it counts, stops when asked to, and says if it must go on.

    python stand_in.py FOLDER ITERATIONS [--late SECONDS] [--stuck] [--fail RANK] [--stop-file]
                       [ANYTHING ...]

One iteration takes 0.1 s. Rank 0 keeps the count in FOLDER, from which the next start continues.
The ranks stop when all of them have been asked to. Every start leaves its arguments and environment
in FOLDER/start<N>.json.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

UNFINISHED = 75


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("iterations", type=int)
    parser.add_argument("--late", type=float, default=0)
    parser.add_argument("--stuck", action="store_true")
    parser.add_argument("--fail", type=int, default=-1)
    parser.add_argument("--stop-file", action="store_true", help="a signal means as much as STOP")
    args, _ = parser.parse_known_args()
    rank, world = (int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    time.sleep(args.late)
    signals: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, frame: signals.append(received))

    count = args.folder / "count.txt"
    iteration = int(count.read_text()) if count.exists() else 0
    args.folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        start = {"argv": sys.argv[1:], "env": dict(os.environ), "from": iteration}
        number = len(list(args.folder.glob("start*.json")))
        (args.folder / f"start{number}.json").write_text(json.dumps(start))
    print(f"rank {rank} of {world} starts at {iteration}", flush=True)
    asked = f"asked{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    stop = False
    while iteration < args.iterations and not stop:
        time.sleep(0.1)
        if signals:
            (args.folder / f"{asked}-{rank}").touch()
        stop = len(list(args.folder.glob(f"{asked}-*"))) == world
        iteration += 0 if args.stuck else 1
        if rank == args.fail and iteration == 2:
            raise RuntimeError(f"rank {rank} fails on purpose")
        if rank == 0:
            whole = count.with_suffix(".new")
            whole.write_text(str(iteration))
            whole.rename(count)
    if not stop:
        print(f"rank {rank} finished", flush=True)
        return 0
    names = ", ".join(signal.Signals(number).name for number in signals)
    print(f"rank {rank} stopped unfinished at {iteration} ({names})", flush=True)
    if rank == 0:
        marker = {
            "iteration": iteration,
            "max_iter": args.iterations,
            "reason": names,
            "requeue": not args.stop_file,
        }
        Path(os.environ["VIRTEX_REQUEUE_MARKER"]).write_text(json.dumps(marker))
    return UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
