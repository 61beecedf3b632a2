"""What benchmarks read off the machine: time, memory, and what it can do."""

import platform
import time
from collections.abc import Callable

import torch


class Clock:
    """Seconds of named parts of a turn; on a GPU what was queued is waited for."""

    def __init__(self, device: torch.device):
        self._device = device
        self.parts: dict[str, float] = {}

    def start(self) -> None:
        self.parts = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """All since the last lap belongs to this part."""
        now = self._now()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

    def timed(self, action: Callable[[], object]) -> Callable[[], dict[str, float]]:
        """`action` as one of the ways that take turns; its part is named "all"."""

        def way() -> dict[str, float]:
            self.start()
            action()
            self.lap("all")
            return dict(self.parts)

        return way

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def ceilings(device: torch.device) -> dict[str, float]:
    """What the machine reaches just now: matrix products in TFLOP/s by type, copies in GB/s."""
    found = {}
    size = 8192 if device.type == "cuda" else 2048
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"matmul_{str(dtype).removeprefix('torch.')}_tflops"] = (
            2 * size**3 / _least_seconds(lambda a=a, b=b: a @ b, device) / 1e12
        )
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()  # read and written
    found["copy_gb_per_s"] = moved / _least_seconds(lambda: target.copy_(source), device) / 1e9
    return found


def _least_seconds(action: Callable[[], object], device: torch.device, turns: int = 5) -> float:
    way = Clock(device).timed(action)
    way()
    return min(way()["all"] for _ in range(turns))


def machine(device: torch.device) -> dict[str, str | int]:
    """What figures depend on."""
    found: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = dict(
                (part.strip() for part in line.split(":", 1)) for line in file if ":" in line
            )
        return f"{lines['model name']} (family {lines['cpu family']}, model {lines['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def peak_memory(action: Callable[[], object], device: torch.device) -> int:
    """Bytes in use at most while `action` runs: allocated on the GPU, resident in this process.

    Raises:
        RuntimeError: this system does not say (Linux does).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the peak begins anew (man 5 proc)
    except OSError as error:
        raise RuntimeError("peak memory on a CPU is read from Linux's /proc") from error
    action()
    return _status("VmHWM")


def resident_memory(device: torch.device) -> int:
    """Bytes in use now, by the measure of `peak_memory`."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
