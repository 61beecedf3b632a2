"""Restoring by the released rule of tiles against the sparse one: seconds, memory, difference.

An IPT of the released x2 size with random weights, or a checkpoint, restores one image by both
rules of `pretrain.methods.ipt.tiles`. Seconds are of the clock and of the processor (the machine
may do other things meanwhile); those of a larger image follow from its number of tiles, which is
all that the time depends on. The PSNR between the two results says something of trained networks
alone, so it needs a checkpoint.
"""

import argparse
import resource
import time

import torch

from benchmarks.measuring import machine
from benchmarks.rounds import count
from pretrain.methods.ipt.files import read_restorer
from pretrain.methods.ipt.network import IPT, Sizes
from pretrain.methods.ipt.photo import read_photo
from pretrain.methods.ipt.scores import psnr_y
from pretrain.methods.ipt.tiles import STRIDES, count_tiles, restore_tiled
from virtex_d2.engine.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", help="default: random weights")
    parser.add_argument("--task", default="", help="of the checkpoint; default: the only one")
    parser.add_argument("--image", metavar="FILE", help="to restore; default: random pixels")
    parser.add_argument(
        "--size", type=count, nargs=2, default=(192, 192), help="of random pixels, height and width"
    )
    parser.add_argument(
        "--to", type=count, nargs=2, default=(768, 1024), help="height and width to scale up to"
    )
    parser.add_argument("--features", type=count, default=64, help="of random weights; default 64")
    parser.add_argument("--layers", type=count, default=12, help="of random weights; default 12")
    parser.add_argument("--batch-size", type=count, default=16, help="tiles at a time; default 16")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def measure(args: argparse.Namespace) -> dict:
    """All figures.

    Returns:
        "settings" and "machine"; "parameters"; by stride "tiles", "seconds" and "cpu_seconds", and
        the same "..._larger" of the image to scale up to; "peak_mib" of the process, "weights_mib"
        of that; with a checkpoint "psnr_y_between", dB.
    """
    if args.image and not args.checkpoint:
        raise InputError("--image: needs a --checkpoint; random weights restore nothing.")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.checkpoint:
        restorer = read_restorer(args.checkpoint)
        number = restorer.find(args.task)[1]
        network = restorer.network
    else:
        torch.manual_seed(0)
        network, number = IPT(Sizes(features=args.features, layers=args.layers)).eval(), 0
    network.to(args.device)
    image = torch.rand(3, *args.size) * 255
    if args.image:
        image = read_photo(args.image).pixels
    patch, scale = network.sizes.patch, network.sizes.scales[number]

    @torch.inference_mode()
    def forward(tiles: torch.Tensor) -> torch.Tensor:
        return network(tiles.to(args.device), number)

    forward(torch.rand(args.batch_size, 3, patch, patch) * 255)  # warm
    found, results = {}, {}
    for stride in STRIDES:
        start, busy = time.perf_counter(), time.process_time()
        results[stride] = restore_tiled(forward, image, patch, scale, stride, args.batch_size)
        seconds, cpu = time.perf_counter() - start, time.process_time() - busy
        tiles = count_tiles(*image.shape[1:], patch, stride)
        larger = count_tiles(*args.to, patch, stride)
        found[stride] = {
            "tiles": tiles,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "tiles_larger": larger,
            "seconds_larger": seconds / tiles * larger,
            "cpu_seconds_larger": cpu / tiles * larger,
        }
    more = {}
    if args.checkpoint:
        more["psnr_y_between"] = psnr_y(*results.values(), 0)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    return {
        "settings": {**vars(args), "size": list(image.shape[1:])},
        "machine": machine(torch.device(args.device)),
        "parameters": sum(p.numel() for p in network.parameters()),
        "strides": found,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "weights_mib": weights / 2**20,
        **more,
    }


def report(found: dict) -> str:
    """The figures as text."""
    height, width = found["settings"]["size"]
    tall, wide = found["settings"]["to"]
    lines = [
        f"{found['machine']['device']}, {found['machine']['threads']} threads; "
        f"{found['parameters']:,} parameters; {width}x{height} pixels",
    ]
    for stride, of in found["strides"].items():
        lines.append(
            f"stride {stride}: {of['tiles']} tiles in {of['seconds']:.1f} s "
            f"({of['cpu_seconds']:.1f} s of the processor); {wide}x{tall} pixels are "
            f"{of['tiles_larger']} tiles: {of['seconds_larger'] / 60:.1f} min "
            f"({of['cpu_seconds_larger'] / 60:.1f} of the processor)"
        )
    lines.append(
        f"memory at most {found['peak_mib']:.0f} MiB, of which weights {found['weights_mib']:.0f}"
    )
    if "psnr_y_between" in found:
        lines.append(f"PSNR Y between both results: {found['psnr_y_between']:.2f} dB")
    return "\n".join(lines)
