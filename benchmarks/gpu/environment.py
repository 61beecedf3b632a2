"""Step 1: whether all imports, what is installed, and whether detectron2's bridges hold."""

import importlib
import platform
import shutil
from importlib import metadata

import detectron2
import torch
from detectron2.utils.collect_env import collect_env_info

from benchmarks.measuring import machine
from virtex_d2.engine import compat

from .step import Step

MODULES = (
    *(
        "pretrain.trainer",
        "virtex_d2.detection.trainer",
        "virtex_d2.studies.probes.run",
        "virtex_d2.slurm.submit",
    ),
    *("lvis", "pycocotools.mask", "shapely", "simplejpeg", "sentencepiece", "safetensors"),
    *("webdataset", "braceexpand", "sklearn.svm", "scipy.stats", "cv2", "matplotlib"),
    *("tensorboard", "hydra", "omegaconf", "fvcore.nn.precise_bn", "iopath", "yacs.config"),
)
MEMORY_FOR_WORKERS = 4 << 30  # bytes of /dev/shm: batches of 256 in 12 loader workers


def run(step: Step) -> None:
    print(collect_env_info())
    failed = {}
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    step.check(
        "all modules import",
        not failed,
        "; ".join(f"{name}: {error}" for name, error in failed.items()) or f"{len(MODULES)}",
    )
    found = machine(step.device)
    if step.cuda:
        properties = torch.cuda.get_device_properties(step.device)
        found |= {"memory_gib": properties.total_memory >> 30, "cuda": torch.version.cuda}
        found |= {"capability": f"{properties.major}.{properties.minor}"}
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"nccl": nccl, "gpus": torch.cuda.device_count()}
        step.check("bfloat16 in hardware", properties.major >= 8, found["capability"])
    else:
        step.instead("the GPU's properties", "those of the CPU")
    for name in ("torchvision", "numpy", "detectron2"):
        module = importlib.import_module(name)
        found[name] = getattr(module, "__version__", "unknown")
    step.figure("machine", found)
    step.figure("packages", {d.metadata["Name"]: d.version for d in metadata.distributions()})
    _bridges(step)
    step.limit("/dev/shm", shutil.disk_usage("/dev/shm").free / 2**30, "GiB free",
               least=MEMORY_FOR_WORKERS / 2**30)  # fmt: skip
    free = shutil.disk_usage(step.folder).free
    step.check("room for checkpoints", free > 8 << 30, f"{free / 2**30:.0f} GiB free")
    step.headline(f"{found['device']}, torch {torch.__version__}, Python "
                  f"{platform.python_version()}, detectron2 {detectron2.__version__}")  # fmt: skip


def _bridges(step: Step) -> None:
    """What detectron2 0.6 lacks of newer versions: its own modules import, and its ops compute."""
    for name in ("detectron2.model_zoo", "detectron2.evaluation", "detectron2.data.transforms"):
        importlib.import_module(name)
    from detectron2.layers import ROIAlign, batched_nms

    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 9], [20, 20, 30, 30]], device=step.device).float()
    kept = batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=step.device),
                       torch.zeros(3, dtype=torch.int64, device=step.device), 0.5)  # fmt: skip
    plane = torch.arange(64.0, device=step.device).view(1, 1, 8, 8)
    box = torch.tensor([[0.0, 2, 2, 6, 6]], device=step.device)
    pooled = ROIAlign((1, 1), 1.0, 0, aligned=True)(plane, box).item()
    # the mean of a linear image over a box is its value at the box's centre, here (3.5, 3.5)
    right = kept.tolist() == [0, 2] and abs(pooled - 3.5 * 9) < 1e-3
    step.check("detectron2's ops compute", right, f"kept {kept.tolist()}, pooled {pooled:.3f}")
    step.figure("compiled ops", bool(compat.has_compiled_ops()))
