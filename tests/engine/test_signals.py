"""Signals to real processes."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.e2e.forked_runs import ROOT


@pytest.fixture
def program():
    """`program(code)` -> a running process; its lines of output are read one by one."""
    processes = []

    def start(code):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


LISTENING = """
    import virtex_d2.engine.listening
    from virtex_d2.engine import signals
    print("listening", flush=True)
    input_ = __import__("time").sleep(0.2)
"""


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_that_comes_before_anything_can_answer_is_noted(program, name):
    process = program(LISTENING + "    print(signals.received())")
    process.stdout.readline()
    process.send_signal(signal.Signals[f"SIG{name}"])
    assert process.communicate()[0].strip() == name
    assert process.returncode == 0


def test_a_noted_signal_ends_a_run_that_has_nothing_to_save(program):
    process = program(LISTENING + "    signals.stop_listening()\n    print('went on')")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGTERM


def test_a_late_signal_does_not_change_how_a_run_ends(program):
    """Guards against Python's own shutdown, which takes its handlers away and then is killed."""
    process = program(
        LISTENING + "    signals.ignore()\n    import atexit, os\n"
        "    atexit.register(lambda: os.kill(os.getpid(), 15))"
    )
    assert process.wait() == 0


WORKER = """
    import os, time, torch
    import virtex_d2.engine.listening
    from virtex_d2.engine import signals

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return 1000
        def __getitem__(self, index):
            time.sleep(0.01)
            return os.getpid()

    loader = torch.utils.data.DataLoader(
        Samples(), num_workers=1, worker_init_fn=signals.start_helper
    )
    batches = signals.held_back(lambda: iter(loader))
    print(int(next(batches)), flush=True)
    for _ in range(60):
        last = int(next(batches))
    print(last, flush=True)
"""


def test_loader_workers_survive_what_a_scheduler_sends_to_all(program):
    process = program(WORKER)
    worker = process.stdout.readline().strip()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        subprocess.run(["kill", f"-{int(number)}", worker], check=True)
    assert process.stdout.readline().strip() == worker
    assert process.wait() == 0


def test_a_loader_worker_ends_when_the_training_process_ends_it(program):
    """Else Python's exit, which ends workers by TERM and then waits for them, would hang."""
    process = program(
        WORKER + "    child = __import__('multiprocessing').active_children()[0]\n"
        "    child.terminate(); child.join(20); print(child.exitcode, flush=True)\n"
        "    os._exit(0)"
    )
    assert process.communicate(timeout=60)[0].split()[-1] == "0"


def test_a_process_that_is_started_while_signals_are_held_back_gets_them_later(program):
    process = program("""
        import os, signal, subprocess, sys, time
        from virtex_d2.engine import signals
        child = signals.held_back(lambda: subprocess.Popen([sys.executable, "-c", '''
        import time; print("started", flush=True); time.sleep(0.3)
        import virtex_d2.engine.listening; from virtex_d2.engine import signals
        time.sleep(0.1); print(signals.received(), flush=True)
        '''.replace("\\n        ", "\\n")], stdout=subprocess.PIPE, text=True))
        child.stdout.readline()
        child.send_signal(signal.SIGUSR1)
        print(child.communicate()[0])
    """)
    start = time.monotonic()
    assert process.communicate(timeout=60)[0].strip() == "USR1"
    assert time.monotonic() > start
