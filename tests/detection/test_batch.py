"""Batch, passes and linear scaling: what is resolved, logged and refused."""

import json
import logging
import os
import textwrap
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from tests.e2e.forked_runs import shared_server
from tests.processes import python
from virtex_d2.detection.batch import resolve_batch
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.detection.trainer import DetectionTrainer
from virtex_d2.engine.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cfg():
    """The paper's 8 GPUs."""
    cfg = get_virtex_cfg()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 16, 0.02
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 180000, (120000, 160000)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD = 1000, 5000
    cfg.SOLVER.CHECKPOINT_KEEP_EVERY = 50000
    cfg.TEST.EVAL_PERIOD = 0
    cfg.VIRTEX.EMA.DECAY = 0.999
    return cfg


@pytest.fixture
def processes(monkeypatch):
    return lambda number: monkeypatch.setattr(comm, "get_world_size", lambda: number)


def test_accumulation_leaves_batch_and_schedule_as_they_are(cfg, processes, caplog):
    processes(2)
    cfg.VIRTEX.ACCUMULATE = 4
    cfg.freeze()
    with caplog.at_level(logging.INFO):
        assert resolve_batch(cfg) is cfg
    assert (
        "An iteration is one update from 16 images: 2 processes x 4 passes x 2; learning rate "
        "0.02, warm-up 1000, steps (120000, 160000), 180000 iterations." in caplog.text
    )


def test_linear_scaling_changes_all_that_is_counted_in_images_or_iterations(cfg, processes, caplog):
    processes(2)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.freeze()
    with caplog.at_level(logging.INFO):
        scaled = resolve_batch(cfg)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR) == (4, 0.005)
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.STEPS) == (720000, (480000, 640000))
    assert (scaled.SOLVER.WARMUP_ITERS, scaled.SOLVER.CHECKPOINT_PERIOD) == (4000, 20000)
    assert (scaled.SOLVER.CHECKPOINT_KEEP_EVERY, scaled.TEST.EVAL_PERIOD) == (200000, 0)
    assert scaled.VIRTEX.EMA.DECAY**4 == pytest.approx(0.999)
    assert scaled.is_frozen()
    assert "scaled from 8 processes with 16 images, learning rate 0.02 and 180000" in caplog.text
    assert cfg.SOLVER.MAX_ITER == 180000
    # As it was scaled, it is right for as many processes.
    assert resolve_batch(scaled) is scaled


def test_scaling_up_leaves_no_period_at_zero(cfg, processes):
    """detectron2's rounding would switch the evaluation off, and divide by a period of 0."""
    processes(64)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.TEST.EVAL_PERIOD = cfg.SOLVER.CHECKPOINT_PERIOD = cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.CHECKPOINT_KEEP_EVERY = 2
    scaled = resolve_batch(cfg)
    assert (scaled.TEST.EVAL_PERIOD, scaled.SOLVER.CHECKPOINT_PERIOD) == (1, 1)
    assert (scaled.SOLVER.CHECKPOINT_KEEP_EVERY, scaled.SOLVER.MAX_ITER) == (1, 1)


def test_a_number_of_processes_that_the_batch_does_not_fit_is_no_error_when_scaled(cfg, processes):
    processes(3)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    assert resolve_batch(cfg).SOLVER.IMS_PER_BATCH == 6


@pytest.mark.parametrize(
    ("number", "keys", "message"),
    [
        (3, {}, "IMS_PER_BATCH is 16, which 3 processes cannot share equally"),
        (2, {"accumulate": 3}, "ACCUMULATE is 3, but the 8 images.*possible are 1, 2, 4, 8"),
        (1, {"accumulate": 0}, "VIRTEX.ACCUMULATE is 0"),
        (1, {"accumulate": 32}, "possible are 1, 2, 4, 8, 16"),
        (1, {"reference": 5}, "REFERENCE_WORLD_SIZE is 5.*IMS_PER_BATCH 16 is shared"),
        (1, {"reference": -1}, "REFERENCE_WORLD_SIZE is -1"),
        (2, {"reference": 8, "accumulate": 4}, "ACCUMULATE is 4, but the 2 images"),
        (1, {"images": 0}, "IMS_PER_BATCH is 0"),
    ],
)
def test_what_cannot_be_shared_equally_is_refused(number, keys, message, cfg, processes):
    processes(number)
    cfg.VIRTEX.ACCUMULATE = keys.get("accumulate", 1)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = keys.get("reference", 0)
    cfg.SOLVER.IMS_PER_BATCH = keys.get("images", 16)
    with pytest.raises(InputError, match=message):
        resolve_batch(cfg)


def test_a_run_is_not_resumed_with_iterations_of_another_size(detection_cfg):
    state = DetectionTrainer(detection_cfg).state_dict()
    detection_cfg.SOLVER.IMS_PER_BATCH = 4
    with pytest.raises(InputError, match="an update from 2 images; here it would be one from 4"):
        DetectionTrainer(detection_cfg).load_state_dict(state)
    detection_cfg.SOLVER.IMS_PER_BATCH, detection_cfg.VIRTEX.ACCUMULATE = 2, 2
    DetectionTrainer(detection_cfg).load_state_dict(state)


# Two processes with two passes of two images each, against one process with all eight at once;
# and a run of a detector whose config is meant for one process.
_PROGRAM = """
    import json, sys
    import torch
    from detectron2.utils import comm
    import virtex_d2
    from virtex_d2.engine.loop import UpdateLoop
    from virtex_d2.engine.distributed import launch, wrap_ddp
    from virtex_d2.engine.cli import argument_parser

    exchanges = []

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2).double()

        def forward(self, batch):
            return {"loss": self.layer(torch.stack(batch)).tanh().pow(2).mean()}

    def count(state, bucket):
        exchanges.append(bucket.index())
        gradient = bucket.buffer() / comm.get_world_size()
        future = torch.distributed.all_reduce(gradient, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    def update(model, images, passes):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        UpdateLoop(model, optimizer, lambda _: [images], passes=passes).step(0)

    def main(args):
        torch.manual_seed(0)
        alone, together = Mean(), Mean()
        together.load_state_dict(alone.state_dict())
        images = list(torch.randn(8, 4, dtype=torch.float64))
        update(alone, images, 1)
        ddp = wrap_ddp(together)
        ddp.register_comm_hook(None, count)
        rank = comm.get_rank()
        update(ddp, images[4 * rank : 4 * rank + 4], 2)
        result = {
            "exchanges": exchanges,
            "alone": alone.layer.weight.grad.flatten().tolist(),
            "together": together.layer.weight.grad.flatten().tolist(),
        }
        with open(f"{sys.argv[1]}/rank{rank}.json", "w") as file:
            json.dump(result, file)

    launch(main, argument_parser().parse_args([]))
"""


def _run_two_processes(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    argv = [*python(2)[1:], *map(str, command)]
    done = shared_server().run(argv, {**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_processes_with_passes_sum_the_gradient_of_the_batch_in_one_exchange(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(_PROGRAM))
    _run_two_processes(program, tmp_path)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["together"] == results[1]["together"]
    assert results[0]["together"] == pytest.approx(results[0]["alone"], rel=1e-9)
    assert max(map(abs, results[0]["alone"])) > 1e-3
    assert [result["exchanges"] for result in results] == [[0], [0]]


@pytest.mark.slow
def test_two_processes_train_a_config_for_one_in_half_the_iterations(
    small_detector, shapes_world, tmp_path
):
    names = ["_two_train", "_two_test"]
    entries = [
        [name, "coco", str(shapes_world / f"annotations/instances_{split}.json")]
        + [str(shapes_world / "images" / split)]
        for name, split in zip(names, ("train", "test"))
    ]
    _run_two_processes(
        ROOT / "tools" / "train_net.py",
        *small_detector("thin FPN"),
        *("VIRTEX.DATASETS", entries, "DATASETS.TRAIN", f"('{names[0]}',)"),
        *("DATASETS.TEST", f"('{names[1]}',)", "OUTPUT_DIR", tmp_path / "run"),
        *("SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.MAX_ITER", 6, "VIRTEX.ACCUMULATE", 2),
        *("VIRTEX.EMA.ENABLED", True),
    )
    log = (tmp_path / "run/log.txt").read_text()
    assert (
        "one update from 4 images: 2 processes x 2 passes x 1; learning rate 0.004, warm-up 0, "
        "steps (50,), 3 iterations; scaled from 1 process with 2 images" in log
    )
    final = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    assert final["iteration"] == 2
    assert final["ema"]["updates"] == 3
    last = json.loads((tmp_path / "run/metrics.json").read_text().splitlines()[-1])
    assert last["iteration"] == 2
    assert "segm/AP" in last
    # The config that was given, not the scaled one: with it the run is resumed.
    assert "REFERENCE_WORLD_SIZE: 1" in (tmp_path / "run/config.yaml").read_text()


AMP = ("SOLVER.AMP.ENABLED", True)
CLIP = ("SOLVER.CLIP_GRADIENTS.ENABLED", True)
EMA = ("VIRTEX.EMA.ENABLED", True)
AUG = ("TEST.AUG.ENABLED", True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((*AMP, "SOLVER.AMP.DTYPE", "float16"), "float16 needs a GPU. On a CPU use bfloat16"),
        ((*AMP, "SOLVER.AMP.DTYPE", "bfloat"), "is 'bfloat'.*Did you mean 'bfloat16'"),
        ((*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full"), "is 'full'.*one of value, norm, full"),
        (
            (*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0),
            "CLIP_VALUE is 0.0; expected a positive",
        ),
        ((*EMA, "VIRTEX.EMA.DECAY", 1.0), "VIRTEX.EMA.DECAY is 1.0; expected a number between"),
        ((*AUG, "MODEL.META_ARCHITECTURE", "RetinaNet"), "found MODEL.META_ARCHITECTURE RetinaNet"),
        ((*AUG, "MODEL.KEYPOINT_ON", True), "found MODEL.KEYPOINT_ON True"),
        ((*AUG, "TEST.AUG.MIN_SIZES", ()), "TEST.AUG.MIN_SIZES is empty"),
    ],
)
def test_it_is_told_which_key_and_what_is_possible(keys, message, detection_cfg):
    for key, value in zip(keys[::2], keys[1::2]):
        *groups, name = key.split(".")
        node = detection_cfg
        for group in groups:
            node = node[group]
        node[name] = value
    with pytest.raises(InputError, match=message):
        DetectionTrainer(detection_cfg)


def test_values_of_what_is_off_do_not_matter(detection_cfg):
    detection_cfg.SOLVER.AMP.DTYPE = "float16"
    detection_cfg.VIRTEX.EMA.DECAY = 2.0
    assert DetectionTrainer(detection_cfg).ema is None


def test_a_gpu_without_bfloat16_is_not_made_to_emulate_it(detection_cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    detection_cfg.MODEL.DEVICE, detection_cfg.SOLVER.AMP.ENABLED = "cuda", True
    with pytest.raises(InputError, match="Tesla V100 has no such arithmetic. Use float16"):
        DetectionTrainer(detection_cfg)
