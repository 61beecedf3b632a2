"""The script: what it asks for, how it quotes, what it refuses. Needs no Slurm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.slurm.command import read_command
from virtex_d2.slurm.options import JobOptions, read_pipeline
from virtex_d2.slurm.script import Job
from virtex_d2.slurm.submit import stage_jobs

ROOT = Path(__file__).resolve().parents[2]


def make(command=("tools/train_net.py",), folder="/logs/x", cwd=ROOT, **options) -> Job:
    options = JobOptions(**{"gpus_per_node": "0", **options})
    return Job(options, read_command(command, cwd, ROOT), Path(folder), cwd, ROOT)


def directives(job: Job) -> list[str]:
    return [line[8:] for line in job.text().splitlines() if line.startswith("#SBATCH ")]


def command_of(job: Job, **variables: str) -> list[str]:
    """What the script's `command` array holds, by bash."""
    text = job.text()
    array = text[text.index("command=(") : text.index("max_stuck=")]
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    script = f'{array}\n{sys.executable} -c "{show}" "${{command[@]}}"'
    done = subprocess.run(
        ["bash", "-c", script], env=variables, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_it_asks_slurm_for_all_that_was_given():
    job = make(
        name="mine",
        nodes=4,
        gpus_per_node="a100:8",
        cpus_per_task=6,
        memory="0",
        time="2-00:00:00",
        partition="gpu,preempt",
        account="vision",
        qos="long",
        constraint="a100|h100",
        dependency="afterok:12",
        sbatch=["exclude=node[7,9]", "-w node3"],
        stop_before=300,
    )
    expected = [
        *("job-name=mine", "nodes=4", "ntasks-per-node=8", "gpus-per-node=a100:8"),
        *("cpus-per-task=6", "mem=0", "time=2-00:00:00", "partition=gpu,preempt"),
        *("account=vision", "qos=long", "constraint=a100|h100", "dependency=afterok:12"),
        *("signal=B:USR1@300", "requeue", "open-mode=append", "exclude=node[7,9]"),
    ]
    assert {f"--{line}" for line in expected} < set(directives(job))
    assert "-w node3" in directives(job)
    assert "--cpus-per-task=6" in job.text()


def test_what_was_not_given_is_left_to_slurm():
    keys = {line.partition("=")[0] for line in directives(make())}
    asked = {"--job-name", "--nodes", "--ntasks-per-node", "--chdir", "--output", "--open-mode"}
    assert keys == asked | {"--signal", "--requeue", "--kill-on-invalid-dep"}


def test_any_word_reaches_the_tool_as_it_was():
    words = ["a b", "", "it's", '"', "$HOME", "`id`", "\\", "[['n', 'coco']]", "*", "é\n!", "-x"]
    assert command_of(make(["tools/demo.py", *words]))[1:] == ["tools/demo.py", *words]


def test_the_number_of_an_arrays_job_stands_where_the_command_says():
    command = ["tools/demo.py", "SEED", "{array}", "OUT", "my out/{array}/{array}.pth"]
    job = make(command, array="1-3")
    assert command_of(job, SLURM_ARRAY_TASK_ID="2")[2:] == ["SEED", "2", "OUT", "my out/2/2.pth"]
    assert "--output=/logs/x/log_%a.txt" in directives(job)


@pytest.mark.parametrize("tool", ["train_net", "pretrain_net", "linear_probe"])
def test_tools_that_can_resume_do(tool):
    assert command_of(make([f"tools/{tool}.py", "SEED", "1"]))[2:] == ["--resume", "SEED", "1"]
    given = ["SEED", "1", "--resume"]
    assert command_of(make([f"tools/{tool}.py", *given]))[2:] == given
    assert command_of(make([f"tools/{tool}.py", "--eval-only"]))[2:] == ["--eval-only"]


def test_tools_without_resume_and_other_programs_run_as_they_are():
    assert command_of(make(["tools/convert_checkpoint.py", "x"]))[1:] == [
        "tools/convert_checkpoint.py",
        "x",
    ]
    assert command_of(make(["nvidia-smi", "-L"])) == ["nvidia-smi", "-L"]


def test_the_interpreter_is_this_one_unless_an_environment_has_its_own():
    assert command_of(make())[0] == sys.executable
    for given in ({"conda": "virtex"}, {"venv": "/my env"}, {"container": "x"}):
        assert "python" in command_of(make(**given))[:2]
    assert command_of(make(conda="virtex", python="python3.12"))[0] == "python3.12"
    container = command_of(make(container="apptainer exec --nv 'my image.sif'"))
    assert container[:5] == ["apptainer", "exec", "--nv", "my image.sif", "python"]


def test_torchrun_is_one_task_a_node_with_all_its_processors():
    job = make(launcher="torchrun", nodes=2, gpus_per_node="4", cpus_per_task=3)
    asked = {"--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=12"}
    assert asked < set(directives(job))
    command = command_of(job, rendezvous="node1:10012")
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=node1:10012"} < set(command)
    assert command[-2:] == ["tools/train_net.py", "--resume"]


def test_the_environment_is_prepared_in_order_before_the_run():
    text = make(modules=["a", "b c"], venv="/my env", setup=["ulimit -n 4096"], env={"X": "1 2"})
    lines = text.text().splitlines()
    expected = [
        *("set -euo pipefail", "set +euo pipefail"),
        *("module load a", "module load 'b c'"),
        *("source '/my env'/bin/activate", "ulimit -n 4096", "set -euo pipefail"),
        *("export X='1 2'", "command=("),
    ]
    lines = [line.partition(" || ")[0] for line in lines]  # what follows where they fail
    assert [line for line in lines if line in expected] == expected


def test_paths_of_directives_may_hold_blanks_and_percents():
    lines = directives(make(folder="/my logs/100%/x"))
    assert '--output="/my logs/100%%/x/log.txt"' in lines


@pytest.mark.parametrize("options", [{}, {"launcher": "torchrun", "array": "1-2", "venv": "a b"}])
def test_it_is_a_script_that_bash_accepts(options):
    command = ["tools/demo.py", *(["{array}"] if "array" in options else []), "it's"]
    done = subprocess.run(
        ["bash", "-n"], input=make(command, **options).text(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "before",
    [
        ("python",),
        ("python3", "-u"),
        ("python", "-W", "ignore", "-X", "dev"),
        ("python3.12",),
        ("/opt/env/bin/python", "-u", "-O"),
    ],
)
def test_python_before_a_tool_changes_nothing_but_the_interpreter(before):
    """It once made the tool an unknown program: without --resume, as another job."""
    plain = ["tools/train_net.py", "--config-file", "configs/Base.yaml", "SEED", "1"]
    job = make([*before, *plain], gpus_per_node="8")
    interpreter = sys.executable if before[0] in ("python", "python3") else before[0]
    assert command_of(job) == [interpreter, *before[1:], *command_of(make(plain))[1:]]
    assert "--resume" in command_of(job)
    assert directives(job) == directives(make(plain, gpus_per_node="8"))
    by_torchrun = command_of(make([*before, *plain], launcher="torchrun"), rendezvous="n:1")
    assert by_torchrun[len(before) :][:2] == ["-m", "torch.distributed.run"]


def test_python_without_a_file_is_a_program_as_any_other():
    for words in (["python", "-c", "print(1)"], ["python3", "-m", "http.server"]):
        assert command_of(make(words)) == words


ONCE = ["compare_inits", "demo", "convert_checkpoint", "check_dataset", "caption_images"]


@pytest.mark.parametrize("tool", ONCE)
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_tool_that_runs_once_is_one_task_with_all_gpus_of_the_node(tool, launcher):
    job = make([f"tools/{tool}.py", "--num-gpus", "8"], gpus_per_node="8", launcher=launcher)
    assert {"--ntasks-per-node=1", "--gpus-per-node=8"} < set(directives(job))
    assert command_of(job)[1:] == [f"tools/{tool}.py", "--num-gpus", "8"]


def test_all_other_programs_are_one_task_for_each_gpu(tmp_path):
    (tmp_path / "own.py").touch()
    own = str(tmp_path / "own.py")
    for program in ("tools/linear_probe.py", "tools/check_gpu.py", own, "nvidia-smi"):
        assert "--ntasks-per-node=8" in directives(make([program], gpus_per_node="8"))


def test_one_task_a_node_may_start_the_nodes_processes_itself():
    job = make(["tools/train_net.py", "--num-gpus", "8"], gpus_per_node="8", tasks_per_node=1)
    assert "--ntasks-per-node=1" in directives(job)


def test_a_folder_that_slurm_cannot_name_is_refused():
    with pytest.raises(InputError, match="Slurm cannot take such a folder's name"):
        make(folder='/my "logs"/x')


HOOK = """
conda() {
    [ "$1" = shell.bash ] && return
    export PATH="$HOME/envs/$2/bin:$PATH" CONDA_PREFIX="$HOME/envs/$2"
    . "$HOME/activate.sh"
}
module() {
    [ "$2" = absent ] && { echo "module: no such module"; return 1; }
    [ "$2" = old ] || export LOADEDMODULES="${LOADEDMODULES:+$LOADEDMODULES:}$2/1.2"
    . "$HOME/activate.sh"
}
"""
# What activation scripts of compilers and of vendors do.
ODD = (
    "diff /dev/null /etc/passwd > /dev/null",
    'if [ -n "$NOBODY_SETS_THIS" ]; then echo verbose; fi; false; true',
    "ls /no-such-folder 2> /dev/null | grep -q x",
    "return 3",
)


@pytest.fixture
def run_script(tmp_path):
    """`run_script(job, odd)` -> exit code and log of its script, run by bash without Slurm."""

    def run(job: Job, odd: str = "true") -> tuple[int, str]:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        srun = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done; exec "$@"\n'
        for name, text in {"srun": srun, "squeue": "#!/bin/sh\n"}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (tmp_path / "activate.sh").write_text(odd + "\n")
        (tmp_path / "env" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "env" / "bin" / "activate").write_text(
            f'export VIRTUAL_ENV="{tmp_path}/env"; . "$HOME/activate.sh"\n'
        )
        slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
        slurm |= {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SCRATCH": str(tmp_path / "scratch")}
        done = subprocess.run(
            ["bash", "-c", HOOK + "export -f conda module\nexec bash /dev/stdin"],
            input=job.text(),
            env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path), **slurm},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "options",
    [{"conda": "virtex"}, {"modules": ["gcc"]}, {"venv": "~/env"}],
    ids=str,
)
def test_others_scripts_may_fail_in_passing(run_script, tmp_path, options, odd):
    job = make(["echo", "the run"], folder=tmp_path / "logs", cwd=tmp_path, **options)
    code, log = run_script(job, odd)
    assert (code, "\nthe run\n" in log) == (0, True), log
    assert ("which has done its work: going on" in log) == (not odd.endswith("true"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"modules": ["gcc", "absent"]}, "module load absent"),
        ({"venv": "/no such/env"}, "source '/no such/env'/bin/activate"),
        ({"setup": ["true", "ls /no-such-folder"]}, "ls /no-such-folder"),
        ({"setup": [". ~/activate.sh"]}, ". ~/activate.sh"),
        ({"setup": ["no_such_program --now"]}, "no_such_program --now"),
    ],
    ids=str,
)
def test_a_line_that_has_not_done_its_work_is_named(run_script, tmp_path, options, line):
    job = make(["echo", "the run"], folder=tmp_path / "logs", cwd=tmp_path, **options)
    code, log = run_script(job, "false")
    assert code != 0
    assert "the run\n" not in log
    said = next(text for text in log.splitlines() if "failed with exit code" in text)
    assert said.startswith("== [")
    assert said.endswith(line)


def test_an_environment_that_is_not_active_in_the_end_is_named(run_script, tmp_path):
    job = make(["echo", "the run"], folder=tmp_path / "logs", cwd=tmp_path, conda="virtex")
    code, log = run_script(job, "unset CONDA_PREFIX")
    assert (code, "before the run: conda activate virtex" in log) == (1, True), log


def test_a_module_that_sets_no_list_is_believed(run_script, tmp_path):
    job = make(["echo", "the run"], folder=tmp_path / "logs", cwd=tmp_path, modules=["old"])
    assert run_script(job)[0] == 0


def test_what_no_shell_has_read_is_replaced_where_the_job_runs(run_script, tmp_path):
    words = ["echo", "$SCRATCH/a b", "${SCRATCH}", "~/x", "--output=~/y", "it's 5$", "$1", "~x"]
    command = read_command(words, tmp_path, ROOT, unread=True)
    options = JobOptions(gpus_per_node="0", env={"DATA": "~/data/$SCRATCH"}, setup=["true"])
    _, log = run_script(Job(options, command, tmp_path / "logs", tmp_path, ROOT))
    home, scratch = str(tmp_path), str(tmp_path / "scratch")
    said = f"{scratch}/a b {scratch} {home}/x --output={home}/y it's 5$ $1 ~x"
    assert f"\n{said}\n" in log, log
    exported = make(env={"DATA": "~/data/$SCRATCH"}).text()
    assert 'export DATA="$HOME"/data/"$SCRATCH"' in exported


def test_a_variable_that_is_not_set_where_the_job_runs_ends_it_with_its_name(run_script, tmp_path):
    command = read_command(["echo", "$NOT_SET/x"], tmp_path, ROOT, unread=True)
    job = Job(JobOptions(gpus_per_node="0"), command, tmp_path / "logs", tmp_path, ROOT)
    code, log = run_script(job)
    assert code != 0
    assert "NOT_SET: unbound variable" in log


def test_directives_are_replaced_where_the_job_is_submitted(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert "--error=/scratch/me/err.txt" in directives(make(sbatch=["error=$SCRATCH/err.txt"]))
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(InputError, match=r"--sbatch: error=\$SCRATCH/err.txt holds \$SCRATCH"):
        make(sbatch=["error=$SCRATCH/err.txt"]).text()


def test_ranks_of_another_run_do_not_reach_the_job(run_script, tmp_path):
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    job = make(["env"], folder=tmp_path / "logs", cwd=tmp_path, env={"MASTER_PORT": "1234"})
    text = job.text()
    exports = "".join(f"export {name}=5\n" for name in left)
    part = text[text.index("# ---- environment") : text.index("trap - EXIT")]
    done = subprocess.run(
        ["bash", "-c", f"{exports}{part}env"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [line for line in done.stdout.splitlines() if line.split("=")[0] in left]
    assert found == ["MASTER_PORT=1234"]  # what the job's own options say stays


PIPELINES = sorted((ROOT / "configs" / "slurm").glob("*.toml"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_the_projects_own_pipelines_name_tools_configs_and_keys_that_exist(path):
    """Their tools are asked."""
    jobs = stage_jobs(read_pipeline(path, {}, {}), Path("/logs"), ROOT, ROOT)
    assert [job.command.program for _, job in jobs] == [
        *("tools/pretrain_net.py", "tools/convert_checkpoint.py", "tools/train_net.py")
    ]
    assert all(job.text() for _, job in jobs)
