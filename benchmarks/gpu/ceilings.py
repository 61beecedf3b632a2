"""Step 10: what the machine reaches at all: copies and matrix products, twice."""

import torch

from benchmarks.measuring import ceilings

from .step import Step

SPREAD = 0.25  # relative: another job, or a card that throttles, shows as more
TENSOR_CORES = 3.0  # times float32's rate, which the units for float32 alone do not reach
SHARE_OF_BUS = 0.6


def run(step: Step) -> None:
    if step.cuda:
        # float32 as it is: TensorFloat-32 has tensor cores, too
        torch.backends.cuda.matmul.allow_tf32 = False
    found = [ceilings(step.device) for _ in range(2)]
    best = {name: max(turn[name] for turn in found) for name in found[0]}
    step.figure("ceilings", best)
    spread = max(abs(found[0][name] / found[1][name] - 1) for name in best)
    step.limit("two turns", spread, "apart", most=SPREAD)
    bfloat16, float32 = best["matmul_bfloat16_tflops"], best["matmul_float32_tflops"]
    step.limit("bfloat16 products", bfloat16 / float32, "times float32's", least=TENSOR_CORES)
    bus = _bus(step)
    if bus:
        step.limit("copies", best["copy_gb_per_s"] / bus, "of the bus", least=SHARE_OF_BUS, most=1)
    _right(step)
    step.headline(f"{bfloat16:.3g} TFLOP/s bfloat16, {float32:.3g} float32, "
                  f"copies {best['copy_gb_per_s']:.0f} GB/s")  # fmt: skip


def _bus(step: Step) -> float:
    """GB/s of the card's memory, by its clock and width; 0 where that is not told."""
    if not step.cuda:
        return 0
    properties = torch.cuda.get_device_properties(step.device)
    clock = getattr(properties, "memory_clock_rate", 0)  # kHz, two transfers each
    width = getattr(properties, "memory_bus_width", 0)  # bits
    if not clock or not width:
        step.note("the memory's clock and width are not told by this torch: copies have no limit")
    return 2 * clock * width / 8 / 1e6


def _right(step: Step) -> None:
    """Fast and wrong is no use: products and copies against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        given = [m.to(step.device, dtype) for m in (a, b)]
        found = (given[0] @ given[1]).double().cpu()
        apart = ((found - a @ b).norm() / (a @ b).norm()).item()
        name = f"a product in {str(dtype).removeprefix('torch.')}"
        step.check(name, apart <= most, f"{apart:.2g} from float64")
    there = a.to(step.device).clone().cpu()
    step.check("a copy there and back", torch.equal(a, there))
