"""A demo or a comparison is one process: of several, none begins."""

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.studies.stages import claim_output

STEP = {  # the second of two tasks on one node
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NODELIST": "gpu07",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
ALONE = {**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}


@pytest.mark.parametrize(
    ("environment", "starter"),
    [(STEP, "srun has started this 2 times"), ({"RANK": "0", "WORLD_SIZE": "4"}, "torchrun .* 4")],
)
def test_one_of_several_tasks_does_not_begin(environment, starter, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=starter):
        claim_output(tmp_path / "output", "comparison", {})
    assert not (tmp_path / "output").exists()


def test_the_only_task_of_a_step_begins(monkeypatch, tmp_path):
    for name, value in {**ALONE, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    claim_output(tmp_path / "output", "comparison", {})
    assert (tmp_path / "output" / "comparison.json").is_file()
