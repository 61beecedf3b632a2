"""The demo's stages, and how scale and seeds change them."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtex_d2.engine.cli import shell
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.demo import line
from virtex_d2.studies.demo.line import Plan, make_plan
from virtex_d2.studies.stages import Stage

ROOT = Path(__file__).resolve().parents[2]


def planned(project: Path, scale: float = 1.0, seeds: int = 1) -> Plan:
    return make_plan(project, project / "demo", scale, seeds)


def stage(plan: Plan, name: str) -> Stage:
    return next(stage for stage in plan.stages if stage.name == name)


def overrides(stage: Stage) -> dict[str, str]:
    return dict(zip(stage.command[3::2], stage.command[4::2]))


def test_at_scale_1_the_configs_alone_give_the_length(project):
    plan = planned(project)
    assert plan.pretrain.iterations == 200
    assert plan.detect.iterations == 100
    for each in plan.stages:
        assert not any(word.startswith(("SOLVER.", "TEST.")) for word in each.command)


def test_scale_multiplies_everything_that_is_counted_in_iterations(project):
    plan = planned(project, scale=2.5)
    assert (
        overrides(stage(plan, "seed1-pretrain")).items()
        >= {
            "SOLVER.MAX_ITER": "500",
            "SOLVER.WARMUP_ITERS": "50",
            "SOLVER.CHECKPOINT_PERIOD": "250",
            "TEST.EVAL_PERIOD": "125",
        }.items()
    )
    assert (
        overrides(stage(plan, "seed1-random")).items()
        >= {
            "SOLVER.MAX_ITER": "250",
            "SOLVER.STEPS": "(175, 225)",
            "TEST.EVAL_PERIOD": "50",
        }.items()
    )
    assert plan.images["captions"] == 2.5 * line.IMAGES["captions"]
    assert plan.images["train"] == line.IMAGES["train"]


def test_a_minuscule_scale_leaves_a_run_with_an_evaluation_in_it(project):
    plan = planned(project, scale=0.001)
    for name in ("seed1-pretrain", "seed1-random"):
        values = overrides(stage(plan, name))
        assert int(values["SOLVER.MAX_ITER"]) == 4
        assert int(values.get("SOLVER.WARMUP_ITERS", 0)) < 4
        assert int(values["TEST.EVAL_PERIOD"]) == 2
    assert values["SOLVER.STEPS"] == "(1,)"
    assert values["TEST.PRECISE_BN.NUM_ITER"] == "1"
    assert plan.images["captions"] == line.FEWEST_IMAGES


def test_precise_norm_statistics_need_no_more_images_at_a_larger_scale(project):
    values = overrides(stage(planned(project, scale=3), "seed1-random"))
    assert values["TEST.PRECISE_BN.NUM_ITER"] == "50"


def test_the_two_starts_differ_in_weights_and_folder_alone(project):
    plan = planned(project, seeds=2)
    random = overrides(stage(plan, "seed2-random"))
    pretrained = overrides(stage(plan, "seed2-pretrained"))
    differing = {key for key in random if random[key] != pretrained[key]}
    assert differing == {"MODEL.WEIGHTS", "OUTPUT_DIR"}
    assert random["MODEL.WEIGHTS"] == ""
    assert pretrained["MODEL.WEIGHTS"] == "demo/runs/seed2/pretrain/backbone.safetensors"


def test_more_seeds_contain_the_stages_of_fewer(project):
    assert planned(project, seeds=3).stages[:6] == planned(project, seeds=1).stages


def test_no_split_of_the_world_shares_its_seed_with_another(project):
    world = [each for each in planned(project).stages if each.name.startswith("world")]
    seeds = {each.command[each.command.index("--seed") + 1] for each in world}
    assert len(seeds) == len(world) == 3


@pytest.mark.parametrize(
    ("changed", "affected"),
    [
        ("configs/pretrain/shapes_R_50.yaml", {"seed1-pretrain", "seed1-pretrained"}),
        ("configs/shapes/Base.yaml", {"seed1-random", "seed1-pretrained"}),
    ],
)
def test_a_changed_config_changes_the_fingerprints_of_what_depends_on_it(
    project, changed, affected
):
    plan = planned(project)
    before = {each.name: each.fingerprint(project) for each in plan.stages}
    with open(project / changed, "a") as file:
        file.write("SEED: 7\n")
    after = {each.name: each.fingerprint(project) for each in plan.stages}
    assert {name for name in before if before[name] != after[name]} == affected


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(project, scale):
    with pytest.raises(InputError, match="--scale"):
        planned(project, scale)


def test_no_seeds_are_refused(project):
    with pytest.raises(InputError, match="--seeds 0"):
        planned(project, seeds=0)


def test_a_config_without_a_length_is_named(project):
    path = project / "configs/shapes/Base.yaml"
    path.write_text("SOLVER: {MAX_ITER: 5}\n")
    with pytest.raises(InputError, match=r"mask_rcnn.*SOLVER\.IMS_PER_BATCH"):
        planned(project)


def test_the_project_itself_has_what_the_demo_needs():
    plan = planned(ROOT)
    assert {each.command[0] for each in plan.stages} == {
        "tools/make_shapes.py",
        "tools/pretrain_net.py",
        "tools/train_net.py",
    }
    for each in plan.stages:
        assert (ROOT / each.command[0]).is_file()


@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))))
def test_a_printed_command_pastes_back_into_the_same_arguments(arguments):
    assert shlex.split(shell(arguments)) == arguments


def test_a_printed_command_keeps_quotes_readable():
    assert shell(["A", "('x',)", ""]) == """A "('x',)" ''"""
