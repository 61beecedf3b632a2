"""Runs that write down what their model is given, to be compared with others."""

import json
import os
from pathlib import Path

from tests.e2e.forked_runs import shared_server
from tests.processes import python

ROOT = Path(__file__).resolve().parents[2]

# The tools' own main, with a trainer that ends after so many iterations, and that writes down what
# its model is given in training: a digest of each image as augmented, with what belongs to it.
RECORDER = """
import hashlib, json, os
from pathlib import Path

from detectron2.utils import comm


def digest(*parts):
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def record(trainer, model, samples_of):
    file = open(Path(trainer.cfg.OUTPUT_DIR) / f"seen-{comm.get_rank()}.jsonl", "a")

    def write(_, given, losses):
        if model.training:
            losses = {name: loss.item() for name, loss in losses.items()}
            line = {"iteration": trainer.iter, "samples": samples_of(given[0]), "losses": losses}
            print(json.dumps(line), file=file, flush=True)

    model.register_forward_hook(write)
    trainer.max_iter = int(os.environ["STOP_AFTER"])
"""
PRETRAIN = """
from pretrain.config import get_pretrain_cfg
from pretrain.trainer import PretrainTrainer
from tests.thin.resnets import install
from virtex_d2.engine.config import load_config
from virtex_d2.engine.distributed import launch
from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.run import setup_run


def main(args):
    install()
    cfg = load_config(get_pretrain_cfg(), args.config_file, args.opts)
    setup_run(cfg, args)
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(args.resume)
    record(trainer, trainer.method, lambda batch: [
        digest(image, tokens[tokens != 0])  # which are padded to the longest of the process
        for image, tokens in zip(batch["image"], batch["caption_tokens"])
    ])
    trainer.train()


launch(main, argument_parser().parse_args())
"""
DETECT = """
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.datasets import register_datasets
from virtex_d2.detection.modeling import resolve_norms
from virtex_d2.engine.config import load_config
from virtex_d2.engine.distributed import launch
from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.run import setup_run
from virtex_d2.detection.trainer import DetectionTrainer


def main(args):
    cfg = load_config(get_virtex_cfg(), args.config_file, args.opts)
    register_datasets(cfg)
    setup_run(cfg, args)
    resolve_norms(cfg)
    trainer = DetectionTrainer(cfg)
    trainer.resume_or_load(args.resume)
    record(trainer, getattr(trainer.model, "module", trainer.model), lambda batch: [
        digest(sample["image"], sample["instances"].gt_boxes.tensor) for sample in batch
    ])
    trainer.train()


launch(main, argument_parser().parse_args())
"""


def run(script: str, options: list, output: Path, processes: int, stop_after: int) -> list[dict]:
    """Train up to an iteration; what was seen in each, by all processes together."""
    command = [*python(processes)[1:], *recorder(script, options, output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = shared_server().run(
        list(map(str, command)), environment | {"STOP_AFTER": str(stop_after)}, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return seen(output)


def recorder(script: str, options: list, output: Path) -> list:
    """The command of such a run, without an interpreter; it ends after STOP_AFTER iterations."""
    file = output.parent / "record.py"
    file.write_text(RECORDER + script)
    return [file, "--resume", *options, "OUTPUT_DIR", output]


def seen(output: Path) -> list[dict]:
    """What the run has written down since this was last asked: a record for each iteration."""
    lines = []
    for path in output.glob("seen-*.jsonl"):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
    iterations = sorted({line["iteration"] for line in lines})
    return [combined([line for line in lines if line["iteration"] == i]) for i in iterations]


def combined(lines: list[dict]) -> dict:
    """One iteration of all processes: which samples, and the mean of each loss."""
    losses = {
        name: sum(line["losses"][name] for line in lines) / len(lines)
        for name in lines[0]["losses"]
    }
    samples = sorted(sample for line in lines for sample in line["samples"])
    return {"iteration": lines[0]["iteration"], "samples": samples, "losses": losses}


def samples(lines: list[dict]) -> list:
    return [line["samples"] for line in lines]
