"""A real Slurm on this machine: munge, a controller and two nodes, and nothing left afterwards."""

import contextlib
import functools
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from virtex_d2.engine.parent import end_with_parent

NODES = ("node1", "node2")
PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "munged", "mungekey")
# PATH with the folders of daemons, which users' paths may lack.
DAEMONS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
# What one of the namespaces of a node needs: its own hosts, host name and processes.
UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
_NODE = "VIRTEX_TEST_NODE"  # in the environment of a node's slurmd, for nodes without namespaces

CONFIG = """\
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
KillWait=5
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={names} NodeHostname={hostnames} NodeAddr=127.0.0.[11-12] Port={ports} CPUs=2 Boards=1 \
SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=cancel Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_slurm_programs() -> list[str]:
    """What a machine lacks for a `Cluster`; nothing after `apt-get install slurm-wlm munge`."""
    return [name for name in PROGRAMS if shutil.which(name, path=DAEMONS) is None]


class Cluster:
    """Munge, slurmctld and a slurmd for each node, all of them children of this process.

    Each node lives in namespaces of its own where the system allows it, so that it has its own
    name and a crash takes all its processes with it. They die with this process.

    Attributes:
        folder: of configuration, logs and state; others may read it, because munge insists.
        env: the environment for Slurm's commands, without what an outer Slurm has left.
        nodes: the nodes' names.
    """

    def __init__(self) -> None:
        # Not pytest's tmp_path: munge refuses a socket below a folder that is its owner's alone.
        self.folder = Path(tempfile.mkdtemp(prefix="virtex-slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.env = {**clean, "PATH": DAEMONS, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._namespaces = _allows_namespaces()
        self.nodes = NODES if self._namespaces else ("127.0.0.11", "127.0.0.12")
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start everything, and wait until both nodes are idle."""
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(mode=0o755)
        munge = self.folder / "munge"
        self.command("mungekey", "--create", "--keyfile", munge / "munge.key")
        self._start(
            "munged",
            *("munged", "--foreground", f"--key-file={munge}/munge.key"),
            *(f"--{what}={munge}/munged.{what.split('-')[0]}" for what in ("pid-file", "log-file")),
            *(f"--seed-file={munge}/munged.seed", f"--socket={munge}/munge.socket"),
        )
        self.until((munge / "munge.socket").exists, "munged makes no socket")
        host, port = socket.gethostname().partition(".")[0], _free_ports(3)
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                host=host,
                # Clusters of other processes are on the same network, and ports come from ids.
                first_job=random.SystemRandom().randrange(1_000, 1_000_000),
                port=port,
                ports=f"{port + 1}-{port + 2}",
                user=getpass.getuser(),
                folder=self.folder,
                names="node[1-2]" if self._namespaces else "127.0.0.[11-12]",
                hostnames="node[1-2]" if self._namespaces else host,
            )
        )
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")
        lines = [
            f"127.0.0.1 localhost {host}",
            *(f"127.0.0.{11 + i} {n}" for i, n in enumerate(NODES)),
        ]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", self.env["SLURM_CONF"])
        for node in self.nodes:
            self.start_node(node)
        self.until(self.idle, "the nodes do not become idle")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        daemon = ["slurmd", "-D", "-c", "-N", node, "-f", self.env["SLURM_CONF"]]
        if self._namespaces:
            script = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
            daemon = [*UNSHARE, "sh", "-c", script, "sh", str(self.folder / "hosts"), node, *daemon]
        self._start(node, *daemon)

    def crash_node(self, node: str) -> None:
        """Kill a node and all that runs on it at once; the controller is told that it is down."""
        self._stop(node)
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=crashed")

    def stop(self) -> None:
        """Stop everything, remove the folder, and make sure that no process is left.

        Raises:
            AssertionError: something that was started here still runs.
        """
        if "slurmctld" in self._daemons:
            self.cancel_all()
        for name in reversed(self._daemons.copy()):
            self._stop(name)
        remaining = self.processes()
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        logs = {p.name: p.read_text(errors="replace")[-500:] for p in self.folder.glob("*.log")}
        shutil.rmtree(self.folder)
        assert not remaining, f"still running: {remaining}\n{logs}"

    def cancel_all(self) -> None:
        """Cancel every job, and wait until none is left and both nodes are idle."""
        for node in self.nodes:
            if node not in self._daemons:
                self.start_node(node)
        self.command("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
        self.command("scancel", "--user", getpass.getuser())
        self.until(lambda: not self.squeue("%i"), "jobs do not end")
        self.until(self.idle, "the nodes do not become idle again")

    def idle(self) -> bool:
        """Whether both nodes are up and have nothing to do."""
        for name, daemon in self._daemons.items():
            log = self.folder / f"{name}.log"
            assert daemon.poll() is None, f"{name} ended:\n{log.read_text()[-2000:]}"
        lines = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
        return lines == ["idle"] * len(self.nodes)

    def squeue(self, form: str, *options: str) -> list[str]:
        """Lines of `squeue` of the live jobs, one a job, in `form`."""
        return self.command("squeue", "-h", "-r", "-o", form, *options).splitlines()

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job`, by field."""
        words = self.command("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def command(self, *arguments: object, timeout: float = 60) -> str:
        """Run one of Slurm's commands; returns what it printed."""
        done = subprocess.run(
            [str(argument) for argument in arguments],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self, *variables: str) -> list[int]:
        """Processes of this cluster: daemons by their arguments, jobs' by SLURM_CONF.

        With `variables`, of those the ones that have one of them ("NAME=value").
        """
        found, own = [], os.getpid()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                environment = (folder / "environ").read_bytes().decode(errors="replace")
                text = (folder / "cmdline").read_bytes().decode(errors="replace") + environment
                chosen = not variables or set(variables) & set(environment.split("\0"))
                if str(self.folder) in text and chosen and int(folder.name) != own:
                    found.append(int(folder.name))
        return found

    @staticmethod
    def until(condition: Callable[[], object], problem: str, timeout: float = 120) -> None:
        """Wait for a condition, looking often; a busy machine may take its time."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, problem
            time.sleep(0.05)

    def _start(self, name: str, *command: object) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                [str(part) for part in command],
                env={**self.env, _NODE: name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=functools.partial(end_with_parent, signal.SIGKILL, os.getpid()),
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        # A node is its namespace: it goes as a machine does whose power is cut.
        daemon.send_signal(signal.SIGKILL if name in self.nodes else signal.SIGTERM)
        daemon.wait(timeout=60)
        if name in self.nodes and not self._namespaces:
            for pid in self.processes(f"{_NODE}={name}", f"SLURMD_NODENAME={name}"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _allows_namespaces() -> bool:
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False)
    return done.returncode == 0


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that the system gives to clients."""
    for _ in range(100):
        first = random.SystemRandom().randrange(11_000, 32_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise AssertionError("no free ports")
