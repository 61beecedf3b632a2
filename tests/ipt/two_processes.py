"""`python two_processes.py FOLDER CONFIG`: gradients of two processes, each with half of a batch.

For each iteration, and so through all tasks: means over processes equal those of the whole batch
in one, in float64; with the contrast, that of each half.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from pretrain.config import load_pretrain_config
from pretrain.data.loader import TrainSet
from pretrain.data.sources import training_records
from pretrain.methods.ipt.method import Restoration
from virtex_d2.engine.distributed import wrap_ddp

ITERATIONS = 16


def gradients(model, batch: dict, method: Restoration) -> dict[str, torch.Tensor | None]:
    method.zero_grad(set_to_none=True)
    sum(model(method.prepare(batch)).values()).backward()
    grads = {name: parameter.grad for name, parameter in method.named_parameters()}
    return {name: None if grad is None else grad.clone() for name, grad in grads.items()}


def compare(rank: int, folder: str, config: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for weight in (0.0, 0.1):
        cfg = load_pretrain_config(config, ["IPT.CONTRAST_WEIGHT", str(weight)])
        samples = Restoration.build_samples(cfg, None, [])
        train = TrainSet(training_records(cfg), samples, cfg.SEED)
        torch.manual_seed(0)
        method = Restoration(cfg, 0).double().train()
        reference = copy.deepcopy(method)
        model = wrap_ddp(method, method.unused_parameters)
        seen = set()
        for iteration in range(ITERATIONS):
            seen.add(method.task_at(iteration))
            four = [train[4 * iteration + place] for place in range(4)]
            given = [four[rank::2], four] if weight == 0 else [four[rank::2], four[::2], four[1::2]]
            given = [{**samples.collate(part), "iteration": iteration} for part in given]
            found = gradients(model, given[0], method)
            alone = [gradients(reference, part, reference) for part in given[1:]]
            assert any(grad is None for grad in found.values()), "heads of other tasks"
            for name, grad in found.items():
                expected = [of_part[name] for of_part in alone]
                if grad is None:
                    assert expected == [None] * len(alone), name
                else:
                    torch.testing.assert_close(grad, sum(expected) / len(expected), msg=name)
        assert seen == set(range(6)), "all tasks"
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(compare, tuple(sys.argv[1:]), nprocs=2, start_method="fork")
