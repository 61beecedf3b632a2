import argparse
import logging
import random
import textwrap
from os import getpid
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode

from virtex_d2.engine.cli import argument_parser
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.lock import RunLock, release_locks
from virtex_d2.engine.run import setup_run, write_config


@pytest.fixture
def cfg(tmp_path):
    cfg = CfgNode({"OUTPUT_DIR": str(tmp_path / "run"), "SEED": 3, "CUDNN_BENCHMARK": False})
    cfg.MODEL = CfgNode({"DEVICE": "auto"})
    return cfg


@pytest.fixture(autouse=True)
def quiet():
    """detectron2's loggers collect handlers in the process; these tests give theirs back."""
    loggers = [
        logging.getLogger(name) for name in ("virtex_d2", "pretrain", "detectron2", "fvcore")
    ]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, handlers, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
    release_locks()


def args(**kwargs):
    return argparse.Namespace(**{"config_file": "", "resume": False, "eval_only": False, **kwargs})


class TestArgumentParser:
    def test_the_flags_of_detectron2_are_understood(self):
        parsed = argument_parser("x").parse_args(
            ["--config-file", "a.yaml", "--resume", "--eval-only", "--num-gpus", "2"]
            + ["--num-machines", "3", "--machine-rank", "1", "--dist-url", "tcp://host:1"]
            + ["SOLVER.BASE_LR", "0.1"]
        )
        assert vars(parsed) == {
            "config_file": "a.yaml",
            "resume": True,
            "check": False,
            "time_budget": None,
            "eval_only": True,
            "num_gpus": 2,
            "num_processes": None,
            "num_machines": 3,
            "machine_rank": 1,
            "dist_url": "tcp://host:1",
            "launch_timeout": 600,
            "collective_timeout": 1800,
            "opts": ["SOLVER.BASE_LR", "0.1"],
        }

    @pytest.mark.parametrize("line", ["A 1 B -2 --resume", "A 1 --resume B -2", "A 1 --nonsense"])
    def test_a_flag_after_the_overrides_is_an_error(self, line, capsys):
        """Guards against --resume after KEY VALUE being swallowed as an override."""
        with pytest.raises(SystemExit):
            argument_parser().parse_args(line.split())
        flag = next(word for word in line.split() if word.startswith("--"))
        expected = f"{flag} stands after the KEY VALUE pairs, which begin with A. Put flags before"
        assert expected in capsys.readouterr().err

    def test_overrides_may_have_negative_values(self):
        assert argument_parser().parse_args(["--resume", "A", "-2"]).opts == ["A", "-2"]

    @pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
    def test_timeouts_are_positive_numbers(self, value, capsys):
        with pytest.raises(SystemExit):
            argument_parser().parse_args([f"--collective-timeout={value}"])
        assert "--collective-timeout" in capsys.readouterr().err

    def test_an_unknown_flag_is_an_error_that_names_the_nearest(self, capsys):
        with pytest.raises(SystemExit):
            argument_parser().parse_args(["--resum", "A", "1"])
        expected = "unrecognized arguments: --resum. Did you mean '--resume'?"
        assert expected in capsys.readouterr().err
        with pytest.raises(SystemExit):
            argument_parser().parse_args(["--num-gpu=2"])
        assert "Did you mean '--num-gpus'?" in capsys.readouterr().err


class TestSetupRun:
    def test_it_leaves_the_resolved_config_and_a_log(self, cfg):
        assert setup_run(cfg, args()) is cfg
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert cfg.MODEL.DEVICE == device
        with open(f"{cfg.OUTPUT_DIR}/config.yaml") as file:
            assert yaml.safe_load(file) == {
                "OUTPUT_DIR": cfg.OUTPUT_DIR,
                "SEED": 3,
                "CUDNN_BENCHMARK": False,
                "MODEL": {"DEVICE": device},
            }
        with open(f"{cfg.OUTPUT_DIR}/log.txt") as file:
            log = file.read()
        for expected in (f"MODEL.DEVICE auto: running on {device}", "SEED 3", "PyTorch"):
            assert expected in log

    def test_messages_of_the_four_packages_reach_the_log(self, cfg):
        setup_run(cfg, args())
        for name in (
            "virtex_d2.detection.trainer",
            "pretrain.trainer",
            "detectron2.engine",
            "fvcore.common",
        ):
            logging.getLogger(name).info("a word of %s", name)
        with open(f"{cfg.OUTPUT_DIR}/log.txt") as file:
            log = file.read()
        assert log.count("a word of") == 4

    def test_the_same_seed_gives_the_same_numbers(self, cfg):
        drawn = []
        for _ in range(2):
            setup_run(cfg, args())
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
        assert drawn[0] == drawn[1]

    def test_a_negative_seed_is_replaced_by_a_drawn_one_on_record(self, cfg):
        cfg.SEED = -1
        setup_run(cfg, args())
        first = torch.rand(3)
        with open(f"{cfg.OUTPUT_DIR}/log.txt") as file:
            assert f"SEED {cfg.SEED} (drawn)" in file.read()
        assert 0 <= cfg.SEED < 2**31
        torch.manual_seed(cfg.SEED)
        assert torch.equal(torch.rand(3), first)

    def test_a_resumed_run_keeps_the_seed_that_was_drawn_for_it(self, cfg):
        cfg.SEED = -1
        setup_run(cfg, args())
        drawn, cfg.SEED = cfg.SEED, -1
        setup_run(cfg, args(resume=True))
        assert cfg.SEED == drawn

    @pytest.mark.parametrize("trace", ["last_checkpoint", "metrics.json"])
    def test_a_folder_that_holds_another_run_is_refused_untouched(self, cfg, tmp_path, trace):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / trace).write_text("content")
        with pytest.raises(InputError, match=rf"run: holds another run \({trace}\).*--resume"):
            setup_run(cfg, args())
        assert [path.name for path in (tmp_path / "run").iterdir()] == [trace]
        assert (tmp_path / "run" / trace).read_text() == "content"

    def test_a_run_that_stopped_before_it_trained_can_be_started_again(self, cfg):
        setup_run(cfg, args())
        setup_run(cfg, args())

    def test_the_traceback_of_an_input_error_stays_out_of_the_log(self, cfg):
        """detectron2's loop logs every exception with its traceback before it passes it on."""
        setup_run(cfg, args())
        logger = logging.getLogger("detectron2.engine.train_loop")
        for error in (InputError("a wrong record"), ZeroDivisionError("a wrong program")):
            try:
                raise error
            except (InputError, ZeroDivisionError):
                logger.exception("Exception during training:")
        with open(f"{cfg.OUTPUT_DIR}/log.txt") as file:
            log = file.read()
        assert "a wrong program" in log
        assert "a wrong record" not in log

    @pytest.mark.parametrize("flag", ["resume", "eval_only"])
    def test_it_is_used_where_that_is_meant(self, cfg, tmp_path, flag):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text("")
        setup_run(cfg, args(**{flag: True}))
        assert (tmp_path / "run" / "log.txt").exists()

    def test_evaluating_leaves_the_runs_config_as_it_is(self, cfg, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("SEED: 5")
        setup_run(cfg, args(eval_only=True))
        assert (tmp_path / "run" / "config.yaml").read_text() == "SEED: 5"

    def test_an_output_folder_that_is_a_file_is_named(self, cfg, tmp_path):
        (tmp_path / "run").write_text("")
        with pytest.raises(InputError, match="OUTPUT_DIR .*run: cannot be used"):
            setup_run(cfg, args())

    def test_a_frozen_config_is_frozen_afterwards(self, cfg):
        cfg.freeze()
        setup_run(cfg, args())
        assert cfg.is_frozen()
        assert cfg.MODEL.DEVICE != "auto"

    def test_the_folder_of_a_live_run_is_refused_untouched(self, cfg, tmp_path):
        (tmp_path / "run").mkdir()
        other = RunLock(tmp_path / "run", pytest.fail)
        other.acquire()  # by this process, but not by way of set-up
        try:
            with pytest.raises(InputError, match=f"another run is writing it: process {getpid()} "):
                setup_run(cfg, args(resume=True))
        finally:
            other.release()
        assert list((tmp_path / "run").iterdir()) == []

    def test_the_folder_is_free_again_after_the_run(self, cfg):
        setup_run(cfg, args())
        lock = Path(cfg.OUTPUT_DIR) / "run.lock"
        assert lock.is_file()
        release_locks()
        assert not lock.exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_cuda_without_a_device_says_what_to_do(self, cfg):
        cfg.MODEL.DEVICE = "cuda"
        with pytest.raises(
            InputError, match="MODEL.DEVICE cuda: no CUDA device is usable here: .*MODEL.DEVICE cpu"
        ):
            setup_run(cfg, args())


class TestResumedConfig:
    """`cfg` ran until its first checkpoint; what is given then differs."""

    @pytest.fixture(autouse=True)
    def first_part(self, cfg, tmp_path):
        cfg.SIZES = (32, 64)
        setup_run(cfg, args())
        (tmp_path / "run" / "last_checkpoint").write_text("model.pth")

    def test_the_same_config_is_the_same_after_its_turn_through_yaml(self, cfg):
        cfg.SIZES = [32, 64]
        setup_run(cfg, args(resume=True), may_change=())
        assert "Changed" not in Path(cfg.OUTPUT_DIR, "log.txt").read_text()

    def test_a_changed_key_is_refused_with_both_values(self, cfg, tmp_path):
        cfg.SIZES, cfg.CUDNN_BENCHMARK = (32, 96), True
        with pytest.raises(InputError, match="started with another config") as error:
            setup_run(cfg, args(resume=True), may_change=("CUDNN_*",))
        assert "\n  SIZES: [32, 64] -> [32, 96]\n" in str(error.value)
        assert "CUDNN_BENCHMARK" not in str(error.value)
        recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert recorded["SIZES"] == [32, 64]

    @pytest.mark.parametrize("may_change", [("CUDNN_*",), None])
    def test_a_key_that_may_change_is_told(self, cfg, may_change):
        cfg.CUDNN_BENCHMARK = True
        setup_run(cfg, args(resume=True), may_change=may_change)
        log = Path(cfg.OUTPUT_DIR, "log.txt").read_text()
        assert "CUDNN_BENCHMARK was False, now it is True" in log

    def test_keys_that_only_one_version_knows_are_no_change(self, cfg):
        cfg.NEW = 1
        setup_run(cfg, args(resume=True), may_change=())

    def test_a_run_without_a_checkpoint_begins_anew_with_any_config(self, cfg, tmp_path):
        (tmp_path / "run" / "last_checkpoint").unlink()
        cfg.SIZES = (32, 96)
        setup_run(cfg, args(resume=True), may_change=())
        recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert recorded["SIZES"] == [32, 96]

    def test_what_set_up_was_given_is_recorded_and_not_what_became_of_it(self, cfg, tmp_path):
        """Norms depend on the number of processes, which may change."""
        setup_run(cfg, args(resume=True))
        cfg.SIZES = (1,)
        write_config(cfg)
        recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert recorded["SIZES"] == [32, 64]

    @pytest.mark.parametrize(("content", "message"), [("{", "not YAML"), ("- 1", "found no keys")])
    def test_a_damaged_record_is_named(self, cfg, tmp_path, content, message):
        (tmp_path / "run" / "config.yaml").write_text(content)
        with pytest.raises(InputError, match=f"config.yaml: .*{message}"):
            setup_run(cfg, args(resume=True), may_change=())


def test_a_tool_refuses_the_folder_of_another_run_in_one_line(tmp_path, run_python):
    tool = tmp_path / "tool.py"
    tool.write_text(
        textwrap.dedent("""
            import sys
            from detectron2.config import get_cfg
            from virtex_d2.engine.config import load_config
            from virtex_d2.engine.errors import exit_on_input_error
            from virtex_d2.engine.distributed import launch
            from virtex_d2.engine.cli import argument_parser
            from virtex_d2.engine.run import setup_run

            def main(args):
                setup_run(load_config(get_cfg(), args.config_file, args.opts), args)

            if __name__ == "__main__":
                with exit_on_input_error():
                    launch(main, argument_parser().parse_args())
        """)
    )
    command = [tool, "OUTPUT_DIR", tmp_path / "run", "MODEL.DEVICE", "auto"]
    assert run_python(*command).returncode == 0
    (tmp_path / "run" / "metrics.json").write_text("{}")
    result = run_python(*command)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: OUTPUT_DIR {tmp_path / 'run'}: holds")
    assert "Traceback" not in result.stderr
