"""Which steps there are, in the order of their value, and how long each may take.

Needs no torch, so that tools/check_gpu.py answers at once.
"""

from dataclasses import dataclass

# Seconds. Less is not worth a start: Python, torch and CUDA alone take some ten.
FLOOR = 60.0


@dataclass(frozen=True)
class StepPlan:
    """A step of the check.

    Attributes:
        module: of benchmarks.gpu, with `run(step)`.
        share: of the time, relative to the other steps.
        what: it looks at.
        needs: the step whose files it uses.
    """

    module: str
    share: float
    what: str
    needs: str = ""


STEPS = {
    "environment": StepPlan("environment", 1, "imports, versions, detectron2's bridges"),
    "pretraining": StepPlan("pretraining", 3, "40 iterations, a checkpoint, --resume, variants"),
    "numbers": StepPlan("numbers", 1, "CPU against CUDA, jitter, decoders, RoI features"),
    "timing": StepPlan("timing", 1.5, "whole steps: seconds, busy share, waits, memory"),
    "variants": StepPlan("variants", 3, "COMPILE against eager, bfloat16 against float16"),
    "detection": StepPlan(
        "detection", 2, "Mask R-CNN in three precisions, EMA, PreciseBN, TTA", "pretraining"
    ),
    "processes": StepPlan("processes", 1, "NCCL with one rank, DDP, a clean end"),
    "loading": StepPlan("loading", 1.5, "the loader alone, and training at the best"),
    "checkpoints": StepPlan("checkpoints", 2.5, "in the background; a stop by USR1"),
    "ceilings": StepPlan("ceilings", 1, "copies and matrix products"),
    "photographs": StepPlan("photographs", 100, "two pretrainings on photographs, VOC07 mAP"),
}
LAST = "photographs"  # only where data is given; takes what is left


def limit(name: str, following: list[str], left: float) -> float | None:
    """Seconds that a step may take: its share of what is left, and at least FLOOR.

    What earlier steps have not used is shared out among the later ones. `LAST` counts for nothing
    as long as others are to come.

    Args:
        name: of the step.
        following: names of those after it.
        left: seconds, of all steps.

    Returns:
        None where there is no time for it.
    """
    if left < FLOOR:
        return None
    shares = [STEPS[other].share for other in following if other != LAST]
    share = STEPS[name].share
    return min(left, max(FLOOR, left * share / (share + sum(shares))))
