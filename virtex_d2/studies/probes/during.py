"""The VOC07 SVMs on a network that is still being trained, as `tools/linear_probe.py` has them.

A pretraining knows nothing of studies: its tool hands `build_probe` to it. Imports nothing heavy at
its top, for that tool's --help.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from virtex_d2.engine.errors import InputError

if TYPE_CHECKING:
    import torch
    from detectron2.config import CfgNode

    Tensors = Mapping[str, torch.Tensor]


def build_probe(
    run: "CfgNode",
) -> "Callable[[Tensors, Mapping[str, str]], dict[str, float]]":
    """Read the sets of TEST.PROBE; what comes back judges a backbone by them.

    Args:
        run: a pretraining's config, with TEST.PROBE, SEED, OUTPUT_DIR and MODEL.DEVICE.

    Returns:
        (tensors, metadata) of a backbone file -> {"mAP11", "mAP"} in percent. Collective; of the
        first process's tensors. It draws random numbers, and leaves nothing on disk.
    """
    from virtex_d2.engine.cli import expanded
    from virtex_d2.studies.probes.config import check_config, get_probe_cfg
    from virtex_d2.studies.probes.data import load_datasets

    probe, cfg = run.TEST.PROBE, get_probe_cfg()
    folder = Path(run.OUTPUT_DIR, "probe")
    cfg.SEED, cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = run.SEED, run.MODEL.DEVICE, str(folder)
    cfg.MODEL.WEIGHTS = str(folder / "backbone.safetensors")
    cfg.DATA.CACHE_DIR = str(folder / "features")
    cfg.DATA.ROOT = expanded(probe.ROOT, "TEST.PROBE.ROOT")
    cfg.DATA.TRAIN, cfg.DATA.TEST = probe.TRAIN, probe.TEST
    cfg.DATA.CLASSES, cfg.DATA.NUM_WORKERS = list(probe.CLASSES), run.DATA.NUM_WORKERS
    cfg.INPUT.RESIZE, cfg.INPUT.CROP = probe.RESIZE, probe.CROP
    try:
        check_config(cfg)
        sets = load_datasets(cfg)
    except InputError as error:
        raise InputError(f"TEST.PROBE (its keys are those of DATA and INPUT): {error}") from error

    def judge(tensors: "Tensors", metadata: Mapping[str, str]) -> dict[str, float]:
        from detectron2.utils import comm

        from virtex_d2.engine.files import write_safetensors
        from virtex_d2.studies.probes.features import build_network, complete_config
        from virtex_d2.studies.probes.run import extraction, voc_svm

        own = cfg.clone()  # which the file completes
        try:
            if comm.is_main_process():
                folder.mkdir(exist_ok=True)
                write_safetensors(own.MODEL.WEIGHTS, tensors, metadata)
            comm.synchronize()
            complete_config(own)
            network, _ = build_network(own)
            metrics, _ = voc_svm(own, extraction(own, network), *sets, about={})
            return comm.all_gather(metrics)[0]
        finally:
            if comm.is_main_process():
                shutil.rmtree(folder, ignore_errors=True)

    return judge
