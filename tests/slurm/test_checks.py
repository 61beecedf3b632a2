"""Mistakes in a command are told before it is submitted. Needs no Slurm."""

from pathlib import Path

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.slurm import command as module
from virtex_d2.slurm.command import check_command, check_configs, read_command
from virtex_d2.slurm.options import JobOptions, Stage
from virtex_d2.slurm.submit import stage_jobs

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = "tools/pretrain_net.py"


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """What tools were asked to check; they are not started."""
    words: list[list[str]] = []
    monkeypatch.setattr(module, "_let_check", lambda command, given, cwd: words.append(given))
    return words


def check(words, cwd=ROOT, **options) -> None:
    options = JobOptions(**{"gpus_per_node": "0", **options})
    command = read_command(words, cwd, ROOT)
    check_command(command, options, cwd)
    check_configs(command, options, cwd)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no command"),
        (("torchrun", "--nproc-per-node", "8", PRETRAIN), "torchrun .* say --launcher torchrun,"),
        (("/opt/bin/torchrun", PRETRAIN), "torchrun in the command"),
        (("python", "-m", "torch.distributed.run", PRETRAIN), "say --launcher torchrun,"),
        (("srun", "-n", "8", "python", PRETRAIN), "srun in the command: .* say --nodes"),
        (("mpirun", "-np", "8", "own.py"), "mpirun in the command"),
        (("bash", PRETRAIN), "bash in the command, before tools/pretrain_net.py: begin with"),
        (("apptainer", "exec", "x.sif", "python", PRETRAIN), "options: --container"),
        (("python",), "python in the command: expected a .py file behind it, found nothing"),
        (("python", "tools/train_net"), "expected a .py file .* found 'tools/train_net'"),
        (("tools/trian_net.py",), "tools/trian_net.py: no such file in "),
        (("python", "tools/trian_net.py"), "tools/trian_net.py: no such file in "),
        (("tools/demo.py", "{array}"), "needs --array"),
    ],
)
def test_a_command_that_cannot_run_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        check(words)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (
            ("tools/train_net.py", "--num-gpus", "8"),
            {"gpus_per_node": "8"},
            "--num-gpus in the command: srun starts the 8 processes of a node already",
        ),
        (("tools/demo.py",), {"nodes": 2}, "tools/demo.py is to run once, .* started 2 times"),
        (("tools/demo.py",), {"tasks_per_node": 8}, "started 8 times. .* --tasks-per-node 1"),
        (("/a/python", PRETRAIN), {"python": "/b/python"}, "name one interpreter"),
        (("tools/demo.py",), {"array": "1-3"}, r"--array 1-3: all its jobs would do the same"),
        (
            (PRETRAIN, "SEED", "{array}", "OUTPUT_DIR", "out"),
            {"array": "1-3"},
            "would write into one folder, OUTPUT_DIR out. Put {array} into its name",
        ),
        (
            (PRETRAIN, "SEED", "{array}"),
            {"array": "1-3"},
            "would write into one folder, the config's OUTPUT_DIR",
        ),
        (
            (PRETRAIN, "SEED", "{array}", "OUTPUT_DIR", "out{aray}"),
            {"array": "1-3"},
            "out{aray} in the command: did you mean {array}",
        ),
    ],
)
def test_a_command_that_does_not_fit_the_options_is_refused(words, options, message):
    with pytest.raises(InputError, match=message):
        check(words, **options)


def test_what_the_tool_itself_refuses_is_refused():
    with pytest.raises(InputError, match=rf"^{PRETRAIN}: .*unknown key SOLVER.MAX_ITR. Did you me"):
        check((PRETRAIN, "SOLVER.MAX_ITR", "5"))
    with pytest.raises(InputError, match=f"^{PRETRAIN}: unrecognized arguments: --evalonly"):
        check((PRETRAIN, "--evalonly"))


def test_a_tool_is_asked_with_its_own_words_in_the_folder_of_the_job(asked, tmp_path):
    (tmp_path / "mine.yaml").touch()
    words = ("--config-file", "mine.yaml", "SEED", "{array}", "OUTPUT_DIR", "out{array}")
    check((str(ROOT / PRETRAIN), *words), cwd=tmp_path, array="3-5")
    assert asked == [["--config-file", "mine.yaml", "SEED", "3", "OUTPUT_DIR", "out3"]]


@pytest.mark.parametrize("words", [("--config-file", "none.yaml"), ("--config-file=none.yaml",)])
def test_a_config_that_is_not_there_is_named(words):
    with pytest.raises(InputError, match=r"--config-file none.yaml: no such file in "):
        check((PRETRAIN, *words))


def test_every_config_of_an_array_is_looked_for(tmp_path, asked):
    words = (str(ROOT / PRETRAIN), "--config-file", "{array}.yaml")
    (tmp_path / "1.yaml").write_text("SEED: 1\nOUTPUT_DIR: out1")
    with pytest.raises(InputError, match="--config-file 2.yaml: no such file"):
        check(words, cwd=tmp_path, array="1-2")
    (tmp_path / "2.yaml").write_text("SEED: 2\nOUTPUT_DIR: out2")
    check(words, cwd=tmp_path, array="1-2")


def test_every_config_of_a_comparison_is_looked_for():
    words = ("tools/compare_inits.py", "--config-file", "configs/shapes/mask_rcnn_R_50_FPN.yaml")
    check((*words, "--init", "random"))
    with pytest.raises(InputError, match=r"--config-file configs/none.yaml: no such file"):
        check((*words, "configs/none.yaml", "--init", "random"))


def test_where_torch_is_absent_that_is_said_and_nothing_asked(monkeypatch, capsys):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    check((PRETRAIN, "SOLVER.MAX_ITR", "5"))
    assert "torch is not in this Python: flags, config files and keys" in capsys.readouterr().err


def test_a_config_that_an_earlier_stage_writes_is_not_asked_for(tmp_path, asked):
    def stages(config: str) -> list[Stage]:
        tool, options = str(ROOT / PRETRAIN), JobOptions(gpus_per_node="0")
        evaluate = (tool, "--eval-only", "--config-file", config, "OUTPUT_DIR", "judged")
        return [
            Stage("train", (tool, "OUTPUT_DIR", "out/first"), options, ()),
            Stage("judge", evaluate, options, ("train",)),
        ]

    assert len(stage_jobs(stages("out/first/config.yaml"), tmp_path, tmp_path, ROOT)) == 2
    assert asked == [["OUTPUT_DIR", "out/first"]]
    with pytest.raises(InputError, match="stage judge: --config-file out/frist/config.yaml: no"):
        stage_jobs(stages("out/frist/config.yaml"), tmp_path, tmp_path, ROOT)


@pytest.mark.parametrize(
    "words",
    [
        ("DATA.TRAIN_CAPTIONS", "pipe:awk '{print}' {0..3}.tar", "OUTPUT_DIR", "out{array}"),
        ("--eval-only", "SEED", "{array}", "OUTPUT_DIR", "first", "OUTPUT_DIR", "out/{array}/x"),
    ],
)
def test_what_is_right_is_not_refused(words, asked):
    check((PRETRAIN, *words), array="1-3")
