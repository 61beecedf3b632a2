"""Which runs a comparison has, and what it refuses before any of them begins."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.compare.conftest import comparison, write_resnet
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare.plan import RANDOM, check_plan, make_plan, parse_inits
from virtex_d2.studies.compare.runs import percent


def test_every_config_fraction_start_and_seed_is_one_run_with_a_folder_of_its_own(project):
    stages = comparison(project, seeds=(1, 2), fractions=(0.1, 1.0)).stages
    assert len(stages) == 8
    assert len({stage.folder for stage in stages}) == len({stage.name for stage in stages}) == 8
    assert stages[0].folder == "out/runs/tiny/100pct/random/seed1"
    command = " ".join(stages[-1].command)
    assert "SEED 2 MODEL.WEIGHTS virtex.safetensors" in command
    assert "VIRTEX.FRACTION 0.1 VIRTEX.FRACTION_SEED 2" in command
    assert "VIRTEX.FRACTION 1.0" in " ".join(stages[0].command)


def test_without_fractions_each_config_keeps_its_own(tmp_path):
    (tmp_path / "whole.yaml").write_text("SOLVER: {MAX_ITER: 5}\n")
    (tmp_path / "few.yaml").write_text("_BASE_: whole.yaml\nVIRTEX: {FRACTION: 0.05}\n")
    inits = parse_inits(["random", "x=a"])
    plan = make_plan(["whole.yaml", "few.yaml"], inits, root=tmp_path)
    assert [(cell.config, cell.fraction) for cell in plan.cells[::2]] == [
        ("whole", 1.0),
        ("few", 0.05),
    ]


@given(st.integers(1, 1000))
def test_fractions_have_names_of_their_own(thousandth):
    other = thousandth % 1000 + 1
    assert percent(thousandth / 1000) != percent(other / 1000)


def test_both_random_starts_are_runs_without_a_file():
    plan = make_plan(["a.yaml"], parse_inits(["random_zero_scales", "random"]), [1])
    assert [(init.name, init.weights) for init in plan.inits] == [
        ("random", ""),
        ("random_zero_scales", "random_zero_scales"),
    ]
    for stage, weights in zip(plan.stages(Path("/"), Path("/out")), ("", "random_zero_scales")):
        assert stage.command[stage.command.index("MODEL.WEIGHTS") + 1] == weights
        assert stage.files == ()


def test_a_seed_in_a_checkpoints_path_is_replaced():
    plan = make_plan(
        ["a.yaml"], parse_inits(["random", "x=run{seed}/backbone.safetensors"]), [1], seeds=(3, 5)
    )
    assert plan.inits[1].weights_for(5) == "run5/backbone.safetensors"


def test_the_baseline_is_random_wherever_it_stands_and_comes_first():
    inits = parse_inits(["x=a", "random", "y=b"])
    assert [init.name for init in make_plan(["a.yaml"], inits, [1]).inits] == [RANDOM, "x", "y"]
    plan = make_plan(["a.yaml"], inits, [1], baseline="y")
    assert plan.baseline == "y"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["random"], "2 to 8 initialisations"),
        (["random", "random"], "two of the name 'random'"),
        (["random", "virtex"], r"--init virtex=output/pretrain/backbone\.safetensors\.$"),
        (["random", "R-50.pth"], r"--init R-50=R-50\.pth\.$"),
        (["random", "virtex="], "expected random, random_zero_scales or NAME=CHECKPOINT"),
        (["random", "a/b=c"], "expected random, random_zero_scales or NAME=CHECKPOINT"),
        (["random", "x=random_zero_scales"], "no checkpoint; write --init random_zero_scales"),
        (["x=a", "random=b"], "random has no checkpoint"),
        (["x=a", "x=b"], "two of the name 'x'"),
    ],
)
def test_initialisations_of_another_form_are_refused(texts, message):
    with pytest.raises(InputError, match=message):
        parse_inits(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractions": [0.0]}, "--fractions 0.0"),
        ({"fractions": [1.5]}, "--fractions 1.5"),
        ({"fractions": [0.1, 0.1]}, "0.1 is there twice"),
        ({"seeds": []}, "--seeds: none is given"),
        ({"seeds": [-1]}, "not negative"),
        ({"baseline": "virtx"}, "Did you mean 'virtex'"),
        ({"overrides": ["SEED", "3"]}, "SEED is set by the comparison"),
        ({"overrides": ["SOLVER.MAX_ITER"]}, "--opts: expected KEY VALUE pairs"),
        ({"overrides": ["SEED", "--list"]}, "--list stands behind --opts.*before --opts"),
        ({"overrides": ["A.B", "1", "--jobs", "2"]}, "--jobs stands behind --opts"),
        ({"overrides": ["A.B", "1", "--list"]}, "--list stands behind --opts"),
        ({"num_gpus": 0}, "--num-gpus 0"),
        ({"configs": ["a/x.yaml", "b/x.yaml"]}, "have the same name"),
    ],
)
def test_arguments_that_make_no_comparison_are_refused(arguments, message):
    inits = parse_inits(["random", "virtex=a"])
    with pytest.raises(InputError, match=message):
        make_plan(**{"configs": ["a.yaml"], "inits": inits, "fractions": [1.0], **arguments})


def test_overrides_of_a_start_reach_its_runs_alone(project):
    stages = comparison(project, init_opts=[["virtex", "MODEL.RESNETS.NORM", "FrozenBN"]]).stages
    having = {stage.name for stage in stages if "FrozenBN" in stage.command}
    assert having == {stage.name for stage in stages if "-virtex-" in stage.name}
    with pytest.raises(InputError, match="Did you mean 'virtex'"):
        parse_inits(["random", "virtex=a"], [["virtx", "A", "1"]])


def test_a_damaged_checkpoint_is_found_before_the_first_run(project):
    (project / "virtex.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match="virtex.safetensors"):
        comparison(project).run()
    assert not (project / "out").exists()


def test_a_mistyped_key_is_found_before_the_first_run(project):
    for arguments, message in (
        ({"overrides": ["SOLVER.MAX_ITR", "3"]}, r"^--opts: unknown key SOLVER\.MAX_ITR"),
        ({"init_opts": [["virtex", "X", "1"]]}, "^--init-opts virtex: unknown key X"),
    ):
        with pytest.raises(InputError, match=message):
            comparison(project, **arguments).run()
    assert not (project / "out").exists()


def test_every_seeds_checkpoint_is_looked_at(project):
    write_resnet(project / "run1.safetensors")
    plan = make_plan(
        ["configs/tiny.yaml"], parse_inits(["random", "x=run{seed}.safetensors"]), [1], (1, 2)
    )
    with pytest.raises(InputError, match=r"run2\.safetensors"):
        check_plan(plan, project)


def test_another_content_of_a_checkpoint_is_another_stage(project):
    first = comparison(project).stages[1].fingerprint(project)
    assert comparison(project).stages[1].fingerprint(project) == first
    write_resnet(project / "virtex.safetensors", seed=1)
    assert comparison(project).stages[1].fingerprint(project) != first
