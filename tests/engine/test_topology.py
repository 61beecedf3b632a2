import pytest

from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.topology import PORTS, Machine, resolve

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "mine",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
STEP = {  # the fourth of four tasks on two nodes
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURMD_NODENAME": "gpu08",
}
PER_NODE = {  # the second of two tasks on two nodes
    **STEP,
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def place(*flags, gpus=0, environment=()):
    args = argument_parser().parse_args([*flags])
    return resolve(args, dict(environment), Machine("here", gpus))


class TestPlain:
    @pytest.mark.parametrize("flags", [(), ("--num-gpus", "1"), ("--num-gpus", "0")])
    def test_a_plain_command_is_one_process(self, flags):
        found = place(*flags, gpus=1)
        assert (found.start, found.rank, found.world_size) == (0, 0, 1)

    def test_it_says_that_gpus_are_idle(self):
        assert "4 GPUs are visible, one is used: --num-gpus 4" in place(gpus=4).note

    def test_num_gpus_starts_so_many_here(self):
        found = place("--num-gpus", "4", gpus=8)
        assert (found.start, found.port, found.serves) == (4, 0, True)
        child = found.child(2)
        assert (child.rank, child.world_size, child.local_rank, child.gpu) == (2, 4, 2, 2)
        assert (child.start, child.serves) == (0, False)

    def test_processes_on_cpus_have_a_flag_of_their_own(self):
        found = place("--num-processes", "3")
        assert (found.start, found.gpu) == (3, None)

    @pytest.mark.parametrize(
        ("flags", "gpus", "message"),
        [
            ("--num-gpus 2", 0, "here shows 0 CUDA devices.*--num-processes"),
            ("--num-gpus 4", 2, "--num-gpus 4: here shows 2 CUDA devices"),
            ("--num-processes 4", 2, "--num-processes 4: here shows 2 CUDA.*MODEL.DEVICE cpu"),
            ("--num-gpus 2 --num-processes 3", 4, "each process has one GPU"),
            ("--num-gpus -1", 0, "--num-gpus -1: expected at least 0"),
            ("--num-processes 0", 0, "--num-processes 0: expected at least 1"),
        ],
    )
    def test_what_this_machine_cannot_do_is_refused(self, flags, gpus, message):
        with pytest.raises(InputError, match=message):
            place(*flags.split(), gpus=gpus)


class TestTorchrun:
    def test_its_variables_say_all(self):
        found = place(gpus=4, environment=TORCHRUN)
        assert found.launcher == "torchrun"
        assert (found.rank, found.world_size, found.local_rank, found.gpu) == (5, 8, 1, 1)
        assert (found.node, found.address, found.port) == (1, "node1", 29500)
        # A restart meets apart from what the attempt before has left.
        assert found.attempt == "2"
        assert not found.serves

    def test_the_first_opens_the_meeting_place_where_torchrun_has_not(self):
        environment = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
        assert not place(environment=environment).serves
        del environment["TORCHELASTIC_USE_AGENT_STORE"]
        assert place(environment=environment).serves

    def test_torchrun_within_a_step_wins(self):
        assert place(environment={**PER_NODE, **TORCHRUN}).launcher == "torchrun"

    def test_a_gpu_short_is_named(self):
        with pytest.raises(InputError, match="local rank 1 has no GPU.*shows 1.*MODEL.DEVICE cpu"):
            place(gpus=1, environment=TORCHRUN)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"RANK": None}, "expected a number in RANK, found ''.*torchrun sets"),
            ({"RANK": "one"}, "expected a number in RANK, found 'one'"),
            ({"RANK": "8"}, "RANK is 8 of WORLD_SIZE 8"),
            ({"LOCAL_RANK": None}, "expected a number in LOCAL_RANK"),
            ({"LOCAL_RANK": "4"}, "LOCAL_RANK is 4 of LOCAL_WORLD_SIZE 4"),
            ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
            ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
            ({"MASTER_PORT": "http"}, "MASTER_PORT: expected a port.*'http'"),
            ({"WORLD_SIZE": "two"}, "expected a number in WORLD_SIZE, found 'two'"),
        ],
    )
    def test_an_incomplete_environment_is_named(self, changes, message):
        environment = {k: v for k, v in {**TORCHRUN, **changes}.items() if v is not None}
        with pytest.raises(InputError, match=message):
            place(environment=environment)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--num-gpus 8", "--num-gpus 8: by torchrun there are 4 processes on this machine"),
            ("--num-machines 3", "--num-machines 3: by torchrun there are 2 machines"),
        ],
    )
    def test_flags_that_ask_for_other_sizes_are_refused(self, flags, message):
        with pytest.raises(InputError, match=message):
            place(*flags.split(), environment=TORCHRUN)

    def test_flags_that_ask_for_the_same_are_not(self):
        assert place("--num-gpus", "4", gpus=4, environment=TORCHRUN).world_size == 8


class TestDetectron2Flags:
    FLAGS = ("--num-machines", "2", "--dist-url", "tcp://node1:29500")

    def test_each_machine_accounts_for_its_processes(self):
        found = place("--num-gpus", "4", "--machine-rank", "1", *self.FLAGS, gpus=4)
        assert (found.node, found.start, found.serves) == (1, 4, False)
        assert (found.address, found.port) == ("node1", 29500)
        assert (found.child(3).rank, found.child(3).world_size) == (7, 8)

    def test_the_first_machine_opens_the_meeting_place(self):
        assert place(*self.FLAGS).serves

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--num-machines 2", "--dist-url auto works on one machine"),
            ("--num-machines 2 --dist-url node1:1", "expected tcp://HOST:PORT"),
            ("--num-machines 2 --dist-url tcp://node1:99999", "between 1 and 65535.*'99999'"),
            (
                "--num-machines 2 --machine-rank 2 --dist-url tcp://node1:1",
                "--machine-rank 2 of --num-machines 2",
            ),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, flags, message):
        with pytest.raises(InputError, match=message):
            place(*flags.split())


class TestSlurm:
    def test_with_several_tasks_a_node_each_is_a_process(self):
        found = place(gpus=2, environment=STEP)
        assert found.launcher == "srun, one task per GPU"
        assert (found.rank, found.world_size, found.local_rank, found.gpu) == (3, 4, 1, 1)
        assert (found.host, found.node, found.address) == ("gpu08", 1, "gpu07")
        assert (found.serves, found.start) == (False, 0)

    def test_a_task_that_is_bound_to_its_gpu_sees_it_as_the_first(self):
        assert place(gpus=1, environment=STEP).gpu == 0

    def test_a_gpu_short_is_named(self):
        step = {**STEP, "SLURM_NTASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "2"}
        with pytest.raises(InputError, match="local rank 2 has no GPU.*gpu08 shows 2"):
            place(gpus=2, environment=step)

    @pytest.mark.parametrize(
        ("flags", "gpus", "processes"),
        [((), 4, 4), (("--num-gpus", "2"), 4, 2), (("--num-processes", "3"), 0, 3)],
    )
    def test_with_one_task_a_node_it_starts_the_processes(self, flags, gpus, processes):
        found = place(*flags, gpus=gpus, environment=PER_NODE)
        assert found.launcher == "srun, one task per node"
        assert (found.start, found.rank, found.world_size) == (processes, processes, 2 * processes)

    def test_nodes_may_have_different_numbers_of_tasks(self):
        found = place(environment={**STEP, "SLURM_NTASKS": "3", "SLURM_PROCID": "2"})
        assert (found.start, found.rank, found.world_size, found.local_rank) == (0, 2, 3, 1)

    def test_one_process_of_a_node_is_the_task_itself(self):
        found = place(environment=PER_NODE)
        assert (found.start, found.rank, found.world_size) == (0, 1, 2)

    @pytest.mark.parametrize(
        "changes",
        [
            {"SLURM_STEP_ID": None},  # a batch script
            {"SLURM_STEP_ID": "4294967291"},  # one of a newer Slurm
            {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
            {"SLURM_STEP_ID": "batch"},
            {"SLURM_NTASKS": "1"},
        ],
    )
    def test_scripts_and_shells_are_no_tasks(self, changes):
        environment = {k: v for k, v in {**STEP, **changes}.items() if v is not None}
        found = place(environment=environment)
        assert (found.launcher, found.world_size) == ("one process", 1)
        if environment["SLURM_NTASKS"] != "1":
            assert "Slurm has 4 tasks for this job, but srun has not started" in found.note

    def test_a_steps_own_number_of_tasks_counts(self):
        """`srun --ntasks 2` in a job of 8 leaves SLURM_NTASKS as it was at some versions."""
        environment = {**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}
        assert place(environment=environment).world_size == 4

    def test_a_meeting_place_can_be_given(self):
        found = place("--dist-url", "tcp://10.0.0.7:1234", environment=STEP)
        assert (found.address, found.port) == ("10.0.0.7", 1234)

    def test_ports_are_below_those_of_outgoing_connections_and_each_steps_own(self):
        ports = [
            place(environment={**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
            for job in range(123_456, 123_476)
            for step in range(10)
        ]
        assert len(set(ports)) == len(ports)
        assert all(1024 < port < 32768 for port in (*ports, PORTS[0], PORTS[-1]))

    @pytest.mark.parametrize(
        ("nodelist", "first"),
        [
            ("node1", "node1"),
            ("a,b", "a"),
            ("gpu[08-10,3],x", "gpu08"),
            ("r[1-2]n[1-2],s", "r1n1"),
            ("n[1]-ib", "n1-ib"),
            ("127.0.0.[11-12]", "127.0.0.11"),
        ],
    )
    def test_all_meet_on_the_first_node_of_a_list(self, nodelist, first):
        assert place(environment={**STEP, "SLURM_STEP_NODELIST": nodelist}).address == first

    @pytest.mark.parametrize(("shares", "fits"), [("2(x2)", True), ("1,3", True), ("4", False)])
    def test_without_their_number_nodes_are_counted_by_their_shares_of_tasks(self, shares, fits):
        environment = {**STEP, "SLURM_STEP_TASKS_PER_NODE": shares}
        del environment["SLURM_STEP_NUM_NODES"]
        if fits:
            assert place(environment=environment).node == 1
        else:
            with pytest.raises(InputError, match="4 tasks on 1 nodes"):
                place(environment=environment)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"SLURM_STEP_NUM_NODES": "5"}, "contradict each other: 4 tasks on 5 nodes"),
            ({"SLURM_PROCID": "4"}, "contradict each other.*SLURM_PROCID 4"),
            ({"SLURM_NODEID": "2"}, "contradict each other.*SLURM_NODEID 2"),
            ({"SLURM_NODEID": None}, "expected a number in SLURM_NODEID, found ''"),
            ({"SLURM_PROCID": "x"}, "expected a number in SLURM_PROCID, found 'x'"),
            ({"SLURM_STEP_NODELIST": "gpu[07-"}, "2 nodes 'gpu\\[07-'"),
            ({"SLURM_STEP_NODELIST": None}, "2 nodes ''"),
        ],
    )
    def test_variables_that_do_not_fit_are_named(self, changes, message):
        environment = {k: v for k, v in {**STEP, **changes}.items() if v is not None}
        with pytest.raises(InputError, match=message):
            place(environment=environment)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--num-gpus 4", "--num-gpus 4: by srun there are 2 processes on this machine"),
            ("--num-processes 3", "--num-processes 3: by srun there are 2"),
        ],
    )
    def test_flags_that_ask_for_other_sizes_are_refused(self, flags, message):
        with pytest.raises(InputError, match=message):
            place(*flags.split(), gpus=4, environment=STEP)


LEFT_OVER = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "otherhost",
    "MASTER_PORT": "29711",
}


class TestContradictions:
    @pytest.mark.parametrize(
        "left",
        [LEFT_OVER, {**LEFT_OVER, "RANK": "7", "WORLD_SIZE": "8"}, {"WORLD_SIZE": "2"}],
    )
    @pytest.mark.parametrize("step", [STEP, PER_NODE, {**STEP, "SLURM_NTASKS": "1"}])
    def test_in_a_step_slurms_numbers_win_over_leftovers(self, left, step):
        found = place(environment={**left, **step})
        alone = place(environment=step)
        assert "RANK and WORLD_SIZE are left over" in found.note
        assert (found.launcher, found.rank, found.world_size) == (
            *(alone.launcher, alone.rank, alone.world_size),
        )
        assert (found.address, found.port) == (alone.address, alone.port)

    def test_outside_of_steps_ranks_by_hand_count(self):
        for shell in ({}, {**STEP, "SLURM_STEP_ID": "4294967290"}):
            assert place(environment={**LEFT_OVER, **shell}).launcher == "RANK and WORLD_SIZE"
        typed = {**STEP, "SLURM_NTASKS": "1", "SLURM_PTY_PORT": "39999"}
        assert place(environment={**LEFT_OVER, **typed}).world_size == 2

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--num-gpus 3", "--num-gpus 3: by RANK and WORLD_SIZE there are an unknown number"),
            ("--num-processes 2", "--num-processes 2: by RANK"),
            ("--num-machines 2", "--num-machines 2: by RANK and WORLD_SIZE there"),
            ("--dist-url tcp://node9:1", "--dist-url tcp://node9:1: .*MASTER_ADDR"),
            ("--machine-rank 1", "--machine-rank 1 of --num-machines 1"),
        ],
    )
    def test_no_flag_is_passed_over_where_ranks_are_set_by_hand(self, flags, message):
        with pytest.raises(InputError, match=message):
            place(*flags.split(), gpus=8, environment=LEFT_OVER)

    def test_the_port_of_a_meeting_place_on_one_machine_is_taken(self):
        found = place("--num-processes", "2", "--dist-url", "tcp://127.0.0.1:29555")
        assert (found.address, found.port) == ("127.0.0.1", 29555)


class TestShellOfSrun:
    """What is typed there has a step's variables, and is none of its tasks."""

    TYPED = {**PER_NODE, "SLURM_PTY_PORT": "39999", "SLURM_TASK_PID": "17"}

    def place(self, *flags, pid=18, **more):
        args = argument_parser().parse_args([*flags])
        return resolve(args, {**self.TYPED, **more}, Machine("here", 0, pid))

    @pytest.mark.parametrize("step", [{}, STEP, {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}])
    def test_it_is_one_task_of_several_that_would_not_come(self, step):
        with pytest.raises(InputError, match="srun --pty.*salloc.*torchrun or --num-processes"):
            self.place(**step)

    def test_in_a_step_of_one_task_it_is_alone(self):
        alone = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
        assert self.place(**alone).world_size == 1

    def test_it_may_start_processes_of_its_own(self):
        found = self.place("--num-processes", "2")
        assert (found.launcher, found.start) == ("--num-processes 2", 2)
        assert self.place(**TORCHRUN).launcher == "torchrun"

    def test_what_srun_starts_in_it_is_a_task(self):
        assert self.place(pid=17).launcher == "srun, one task per node"
