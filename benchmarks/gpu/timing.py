"""Step 4: whole training steps as they are, by the clock and by events, and what they wait for."""

import contextlib
import statistics
import time
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import ceilings, peak_memory

from . import runs
from .step import Step

PROFILED = 3  # iterations
# A step asks the device for nothing that it has to wait for but its losses, once.
WAITS = 2
# What makes the host wait for the device, where it is counted on a CPU.
_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


def run(step: Step) -> None:
    rates = {batch: _measure(step, batch) for batch in (step.scale.batch, step.scale.small_batch)}
    large, small = (rates[size] for size in (step.scale.batch, step.scale.small_batch))
    step.limit("rate of the large batch", large / small, "times the small one's", least=1)
    step.headline(f"{large:.0f} images/s at {step.scale.batch}, "
                  f"{small:.0f} at {step.scale.small_batch}")  # fmt: skip


def _measure(step: Step, batch: int) -> float:
    """Images a second; the whole table of a batch size is recorded."""
    trainer = runs.trainer(step, "SOLVER.IMS_PER_BATCH", batch)
    rounds = step.scale.rounds * (4 if step.cuda else 1)
    clock = runs.Clock(rounds, warm_up=5 if step.cuda else 1)
    with runs.same_batch(trainer):
        memory = peak_memory(lambda: runs.train(trainer, clock), step.device)
        used = _profile(step, trainer, clock.seconds / rounds)
        waits = _waits(step, trainer)
        flops = _flops(trainer)
    seconds = clock.seconds / rounds
    events = statistics.median(clock.by_events())
    at = f"batch {batch}"
    ceiling = ceilings(step.device)["matmul_bfloat16_tflops"]
    found = {
        "images_per_s": batch / seconds,
        "ms": 1000 * seconds,
        "ms_by_events": 1000 * events,
        "tflops": flops / seconds / 1e12,
        "share_of_matmul": flops / seconds / 1e12 / ceiling,
        "peak_mib": memory / 2**20,
        "waits": waits,
        **used,
    }
    step.figure(at, found)
    step.finite(at, clock.losses)
    step.check(f"{at}: waits for the device", waits <= WAITS, f"{waits:g} a step, of {WAITS}")
    step.limit(f"{at}: the clock against events", seconds / events, "times", least=0.9, most=1.15)
    if batch == step.scale.batch:
        step.limit(f"{at}: busy share", used["busy"], "of the time", least=0.85, most=1.05)
        share = found["share_of_matmul"]
        step.limit(f"{at}: arithmetic", share, "of a product's rate", least=0.1, most=1)
    step.free(trainer)
    return batch / seconds


def _profile(step: Step, trainer: runs.PretrainTrainer, seconds: float) -> dict:
    """The share of the time in which the device computes, launches a step, and the top kernels.

    Args:
        seconds: of a step without the profiler, which takes time itself.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    start = []

    @contextlib.contextmanager
    def around(number: int):
        if number == 1:
            if step.cuda:
                torch.cuda.synchronize()
            profile.__enter__()
            start.append((time.perf_counter(), time.process_time()))
        yield

    runs.train(trainer, runs.Clock(PROFILED, warm_up=1, around=around))
    wall, cpu = time.perf_counter() - start[0][0], time.process_time() - start[0][1]
    profile.__exit__(None, None, None)
    kind = torch.autograd.DeviceType.CUDA if step.cuda else torch.autograd.DeviceType.CPU
    # what ran: kernels and copies, on a CPU operators
    ran = [event for event in profile.key_averages() if event.device_type == kind]
    name = "self_device_time_total" if step.cuda else "self_cpu_time_total"
    ran.sort(key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in ran)
    if not step.cuda:
        step.instead("the GPU's busy share", "the share of one core that the process takes")
    return {
        "busy": total / 1e6 / PROFILED / seconds if step.cuda else cpu / wall,
        "launches": sum(event.count for event in ran) / PROFILED,
        "top": {
            event.key[:60]: round(getattr(event, name) / total, 3) for event in ran[:8] if total
        },
    }


class _CountReads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in _READS
        return func(*args, **(kwargs or {}))


def _waits(step: Step, trainer: runs.PretrainTrainer) -> float:
    """How often the host waits for the device, a step."""
    counts = []
    if not step.cuda:
        step.instead("waits by sync_debug_mode", "numbers read from tensors are counted")

    @contextlib.contextmanager
    def around(_: int):
        if step.cuda:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    yield
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            told = [str(warning.message) for warning in caught]
            counts.append(sum("synchronizing CUDA operation" in text for text in told))
        else:
            with _CountReads() as mode:
                yield
            counts.append(mode.count)

    runs.train(trainer, runs.Clock(PROFILED, warm_up=1, around=around))
    return statistics.mean(counts[1:])


def _flops(trainer: runs.PretrainTrainer) -> int:
    counter = FlopCounterMode(display=False)
    runs.train(trainer, runs.Clock(1, warm_up=0, around=lambda _: counter))
    return counter.get_total_flops()
