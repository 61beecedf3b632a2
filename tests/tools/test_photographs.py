"""benchmarks/photographs.py: choosing that cannot see `test`, judging that waits, records."""

import json
import shutil
import sys

import pytest
from PIL import Image

from benchmarks import photographs, photographs_arms
from benchmarks.photographs import Run, Study, main, parser, part_trainval
from benchmarks.photographs_arms import ARMS, FRACTIONS, Arm, find_purpose
from benchmarks.photographs_report import (
    decision,
    draw,
    lines_of,
    read_records,
    report,
    views_table,
)
from tests.probes.small_sets import COLOURS, write_voc
from virtex_d2.annotations.voc import split_ids
from virtex_d2.engine.errors import InputError
from virtex_d2.studies import curves
from virtex_d2.studies.stages import StageFailedError
from virtex_d2.studies.verdict import sample

# Stands in for pretrain_net.py and linear_probe.py: notes its command, then makes a backbone, or
# finds an mAP that depends on where the weights are from and on the seed. In a VOC folder without
# the wanted lists it fails, and once where there is a file "stop".
FAKE = """\
import json, pathlib, shutil, sys
root = pathlib.Path(__file__).parents[1]
words = [word for word in sys.argv[1:] if word != "--resume"]
given = dict(zip(words[::2], words[1::2]))
with open(root / "commands.txt", "a") as file:
    file.write(pathlib.Path(__file__).stem + " " + given["OUTPUT_DIR"] + "\\n")
folder, seed = pathlib.Path(given["OUTPUT_DIR"]), int(given["SEED"])
folder.mkdir(parents=True, exist_ok=True)
if "DATA.ROOT" not in given:
    shutil.copy(root / "backbone.safetensors", folder)
    (folder / "model_final.pth").write_text("large")
else:
    if (root / "stop").exists():
        (root / "stop").unlink()
        sys.exit("the machine was switched off")
    for key in ("DATA.TRAIN", "DATA.TEST"):
        (pathlib.Path(given["DATA.ROOT"]) / f"ImageSets/Main/{given[key]}.txt").read_text()
    value = 10 + seed + 5 * ("tokens" in given["MODEL.WEIGHTS"]) + 0.1 * seed * seed
    found = {"metrics": {"mAP": value, "mAP11": value + 1}, "config": {"MODEL": {"DEVICE": "cpu"}}}
    (folder / "results.json").write_text(json.dumps(found))
"""


@pytest.fixture
def data(tmp_path):
    """Twelve captioned images and a VOC folder: the arguments that name them."""
    names = [f"{number:06}" for number in range(36)]
    objects = {name: [(colour, False)] for name, colour in zip(names, [*COLOURS] * 12)}
    write_voc(tmp_path / "VOC", objects, {"trainval": names[:24], "test": names[24:]})
    (tmp_path / "images").mkdir()
    captions = {"images": [], "annotations": []}
    for number, (name, colour) in enumerate(zip(names[:12], [*COLOURS] * 4)):
        Image.new("RGB", (48, 48), COLOURS[colour]).save(tmp_path / "images" / f"{name}.jpg")
        captions["images"].append({"id": number, "file_name": f"{name}.jpg"})
        text = f"a {colour} square on the wall of a house"
        captions["annotations"].append({"id": number, "image_id": number, "caption": text})
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    words = ("--captions", "captions.json", "--images", "images", "--voc", "VOC")
    words = [word if word.startswith("--") else str(tmp_path / word) for word in words]
    return [*words, "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]


@pytest.fixture
def project(tmp_path, backbone_file, monkeypatch):
    """A project whose tools are quick stand-ins."""
    root = tmp_path / "project"
    (root / "tools").mkdir(parents=True)
    for tool in ("pretrain_net", "linear_probe"):
        (root / "tools" / f"{tool}.py").write_text(FAKE)
    shutil.copytree(photographs.ROOT / "configs", root / "configs")
    shutil.copy(backbone_file("resnet18"), root / "backbone.safetensors")
    monkeypatch.setattr(photographs, "ROOT", root)
    return root


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setattr(photographs_arms, "RECIPE", "tokens_rate_10")


def study(data, purpose, *words):
    return Study(parser().parse_args([purpose, *data, *words]))


def options(stage):
    return dict(zip(stage.command[1::2], stage.command[2::2]))


# --- which images


def test_choosing_has_a_folder_without_test(data, tmp_path):
    folder = part_trainval(tmp_path / "VOC", tmp_path / "parts")
    lists = {path.stem for path in (folder / "ImageSets" / "Main").iterdir()}
    assert lists == {"fit", "read"}
    fit, read = (split_ids(str(folder), part) for part in ("fit", "read"))
    assert sorted(fit + read) == split_ids(str(tmp_path / "VOC"), "trainval")
    assert min(len(fit), len(read)) > 5
    assert part_trainval(tmp_path / "VOC", tmp_path / "parts") == folder
    assert split_ids(str(folder), "fit") == fit
    one = study(data, "choose")
    given = options(one.stages(one.runs[0])[-1])
    assert (given["DATA.TRAIN"], given["DATA.TEST"]) == ("fit", "read")
    assert given["DATA.ROOT"] == str(tmp_path / "out" / "voc_parts")


def test_images_of_trainval_that_are_also_in_test_are_refused(data, tmp_path):
    lists = tmp_path / "VOC" / "ImageSets" / "Main"
    (lists / "test.txt").write_text("000003\n")
    with pytest.raises(InputError, match="1 images are in `trainval` and in `test`.*000003"):
        part_trainval(tmp_path / "VOC", tmp_path / "parts")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "11"], "--seeds 11: for this purpose expected some of 1, 2, 3"),
        (["--arms", "token"], "--arms token: .*Did you mean 'tokens'"),
        (["--measure-opts", "DATA.TEST", "test"], "--measure-opts: DATA.TEST follows from"),
        (["--opts", "SEED", "11"], "--opts: SEED follows from"),
        (["--opts", "SEED"], "SEED has no value"),
        (["--measure", "voc"], "detectors are for judge alone"),
    ],
)
def test_choosing_has_its_own_seeds_arms_and_images(data, words, message):
    with pytest.raises(InputError, match=message):
        study(data, "choose", *words)


@pytest.mark.parametrize("purpose", ["judge", "efficiency"])
def test_nothing_reads_test_before_an_arm_is_chosen(data, purpose, monkeypatch):
    monkeypatch.setattr(photographs_arms, "RECIPE", "")
    with pytest.raises(InputError, match="RECIPE .* is '': it must name the arm that was chosen"):
        main([purpose, *data])
    with pytest.raises(InputError, match="RECIPE"):
        main([purpose, "--report-only"])


def test_judging_is_of_fresh_seeds_and_reads_test(data, chosen, tmp_path):
    one = study(data, "judge")
    assert {run.seed for run in one.runs} == set(range(11, 19))
    lengths = {(run.arm, run.iterations) for run in one.runs}
    assert lengths == {("random", 0), ("random_zero_scales", 0)} | {
        (arm, length)
        for arm in ("bicaptioning", "tokens", "tokens_rate_10")
        for length in (500, 1500)
    }
    given = options(one.stages(Run("tokens_rate_10", 500, 11))[-1])
    assert (given["DATA.ROOT"], given["DATA.TEST"]) == (str(tmp_path / "VOC"), "test")
    given = options(study(data, "judge", "--measure", "voc").stages(Run("random", 0, 11))[-1])
    assert given["MODEL.WEIGHTS"] == "random"
    assert "trainval" in given["VIRTEX.DATASETS"]


# --- what is run


def test_every_arm_has_keys_that_pretraining_knows_and_a_base(data, chosen):
    for purpose in ("choose", "judge", "efficiency"):
        one = study(data, purpose, "--iterations", "500")
        arms = one.purpose.arms
        for name, arm in arms.items():
            assert not arm.base or arm.base in arms
            stages = one.stages(Run(name, 500, 1))
            lengths = [options(stage)["SOLVER.MAX_ITER"] for stage in stages[:-1]]
            assert sum(map(int, lengths)) == (500 if arm.phases else 0)
            for phase in arm.phases:
                one.pretrain_config(phase)


def test_the_next_phase_goes_on_from_all_that_fits(data):
    one = study(data, "choose")
    first, second, probe = one.stages(Run("tokens_64_112px", 501, 2))
    before, after = options(first), options(second)
    assert (before["DATA.IMAGE_SIZE"], after["DATA.IMAGE_SIZE"]) == ("64", "112")
    assert (before["SOLVER.MAX_ITER"], after["SOLVER.MAX_ITER"]) == ("251", "250")
    assert after["SOLVER.WARMUP_ITERS"] == "25"
    assert after["MODEL.WEIGHTS"] == f"{first.folder}/model_final.pth"
    assert options(probe)["MODEL.WEIGHTS"] == f"{second.folder}/backbone.safetensors"
    first, second, _ = one.stages(Run("tokens_bicaptioning", 500, 2))
    assert options(second)["MODEL.WEIGHTS"] == f"{first.folder}/backbone.safetensors"


def test_efficiency_has_the_papers_fractions_and_captions(data, chosen):
    arms = find_purpose("efficiency").arms
    found = {(arm.line, arm.fraction, arm.captions) for arm in arms.values() if arm.phases}
    assert found == {
        (f"{name}, {words}", fraction, captions)
        for name in ("tokens_rate_10", "bicaptioning")
        for words, captions in (("1 caption", 1), ("all captions", 0))
        for fraction in FRACTIONS
    }
    one = study(data, "efficiency")
    run = Run("bicaptioning-1-captions-50pct", 1500, 1)
    given = options(one.stages(run)[0])
    assert (given["DATA.FRACTION"], given["DATA.CAPTIONS_PER_IMAGE"]) == ("0.5", "1")
    record = one.recorded(run)
    assert (record["images"], record["views"]) == (6, 1500 * 32)


# --- what is recorded


def test_finished_runs_are_recorded_at_once_and_never_made_again(data, project, tmp_path, capsys):
    words = ["choose", *data, "--seeds", "1", "2", "--arms"]
    main([*words, "random"])
    words += ["random", "tokens", "bicaptioning"]
    (project / "stop").touch()
    with pytest.raises(StageFailedError, match="the machine was switched off"):
        main(words)
    records = tmp_path / "results" / "choose"
    assert {path.name for path in records.iterdir()} == {"random-0-svm.json"}
    main([*words, "--jobs", "2"])
    table = capsys.readouterr().out.split("\n\n")
    row = next(line for part in table for line in part.splitlines() if line.startswith("| tokens"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:3] == ["tokens", "500", "2"]
    assert cells[4] == "+5.0 [+5.0, +5.0]"
    assert cells[7:10] == ["bicaptioning", "kept", "1"]

    record = json.loads((records / "tokens-500-svm.json").read_text())
    figures = {seed: entry["figures"] for seed, entry in record["seeds"].items()}
    assert figures["2"] == {"mAP": 17.4, "mAP11": 18.4}
    assert (record["views"], record["images"]) == (16000, 12)
    assert record["design"]["phase1"] == {"MODEL.OBJECTIVE": "token_classification"}
    for entry in record["seeds"].values():
        assert entry["machine"]["threads"] >= 1
        assert entry["code"]
    left = {path.name for path in (tmp_path / "out" / "pretrain").rglob("*") if path.is_file()}
    assert left == {"backbone.safetensors"}  # checkpoints are gone

    # on another machine, where there are the records alone
    done = (project / "commands.txt").read_text()
    shutil.rmtree(tmp_path / "out")
    main(words)
    assert (project / "commands.txt").read_text() == done
    assert done.count("pretrain_net") == 4
    with pytest.raises(InputError, match="another design:\n  pretrain.SOLVER.BASE_LR: not given"):
        main([*words, "--opts", "SOLVER.BASE_LR", "0.1"])
    config = project / "configs" / "pretrain" / "small_R_50.yaml"
    config.write_text(config.read_text().replace("BASE_LR: 0.001", "BASE_LR: 0.002"))
    with pytest.raises(InputError, match="another design:\n  pretrain.content: "):
        main(words)


def test_the_curve_against_images_is_one_command(data, project, chosen, tmp_path, capsys):
    arms = ["random_zero_scales"]
    arms += [f"bicaptioning-1-captions-{share}pct" for share in (10, 100)]
    main(["efficiency", *data, "--seeds", "1", "--iterations", "9", "--arms", *arms])
    told = capsys.readouterr().out
    picture = tmp_path / "results" / "efficiency" / "svm.png"
    with Image.open(picture) as image:
        assert image.width > 1000
    assert str(picture) in told
    assert "| VirTex, 1 caption" in told
    assert "69.3" in told
    done = (project / "commands.txt").read_text()
    main(["efficiency", "--report-only", "--results", str(tmp_path / "results")])
    assert capsys.readouterr().out.strip() == told[told.index("| arm") :].strip()
    assert (project / "commands.txt").read_text() == done


# --- what is said


def _records(**arms):
    """Records by arm: (iterations, views, {seed: mAP})."""
    return {
        (arm, length): {
            "arm": arm,
            "iterations": length,
            "views": views,
            "images": views // 10,
            "seeds": {
                str(seed): {"figures": {"mAP": mAP}, "scale": 0.1, "seconds": {"pretrain": 9}}
                for seed, mAP in values.items()
            },
        }
        for arm, lengths in arms.items()
        for length, views, values in lengths
    }


def test_a_step_is_kept_only_where_its_interval_is_above_zero():
    # mean 1; deviation 0.3, and 0.5 for which 4.303 / sqrt(3) is too much
    assert decision(sample({1: 0.7, 2: 1.0, 3: 1.3})) == "kept"
    assert decision(sample({1: 0.5, 2: 1.0, 3: 1.5})) == "cannot be told"
    assert decision(sample({1: -0.7, 2: -1.0, 3: -1.3})) == "worse"
    assert decision(sample({1: 9.0})) == "cannot be told"
    assert decision(sample({})) == ""


def test_untrained_starts_are_a_base_for_every_length():
    records = _records(
        random_zero_scales=[(0, 0, {1: 16.0, 2: 16.2})],
        bicaptioning=[(500, 16000, {1: 18.0, 2: 18.4}), (1500, 48000, {1: 20.0, 2: 20.4})],
    )
    text = report(records, ARMS)
    assert "+2.1" in text
    assert "+4.1" in text
    assert "over 2 comparisons" in text
    views = views_table(records).splitlines()
    assert [cell.strip() for cell in views[0].split("|")[2:-1]] == ["16,000", "48,000"]
    assert [cell.strip() for cell in views[2].split("|")[2:-1]] == ["18.2 ± 0.3", "20.2 ± 0.3"]
    assert lines_of(records, ARMS, "views") == {
        "random_zero_scales": [{0: 16.0}, {0: 16.2}],
        "bicaptioning": [{16000: 18.0, 48000: 20.0}, {16000: 18.4, 48000: 20.4}],
    }


def test_curves_against_images_join_the_fractions_of_one_number_of_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "DPI", 30)
    arms = {
        name: Arm(phases=({},), fraction=fraction, line="tokens, 1 caption")
        for name, fraction in (("a", 0.5), ("b", 1.0))
    }
    records = _records(a=[(9, 100, {1: 5.0, 2: 6.0})], b=[(9, 200, {1: 7.0, 2: 8.0})])
    lines = lines_of(records, arms, "images")
    assert lines == {"tokens, 1 caption": [{10: 5.0, 20: 7.0}, {10: 6.0, 20: 8.0}]}
    draw(tmp_path / "curve.png", "mAP", "images", lines)
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (288, 114)


def test_records_of_other_measures_and_arms_stay_apart(tmp_path):
    for name, arm in (("x-1-svm", "x"), ("x-2-svm", "x"), ("x-1-person", "x"), ("y-1-svm", "y")):
        path = tmp_path / "choose" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"arm": arm, "iterations": int(name.split("-")[1])}))
    assert [*read_records(tmp_path, "choose", ["x"], "svm")] == [("x", 1), ("x", 2)]
    assert read_records(tmp_path, "judge", ["x"], "svm") == {}


# --- with the real tools


@pytest.mark.slow
def test_two_arms_of_two_iterations(data, capsys, tmp_path):
    small = ["DATA.IMAGE_SIZE", "32", "SOLVER.IMS_PER_BATCH", "4", "DATA.VOCAB_SIZE", "50"]
    words = ["choose", *data, "--arms", "random", "tokens", "--seeds", "1", "--iterations", "2"]
    words += ["--opts", *small, "DATA.NUM_WORKERS", "0"]
    words += ["--measure-opts", "DATA.CLASSES", repr([*COLOURS]), "INPUT.RESIZE", "34"]
    main([*words, "INPUT.CROP", "32", "DATA.NUM_WORKERS", "0"])
    assert capsys.readouterr().out.count("finished in") == 3
    for name in ("random-0", "tokens-2"):
        record = json.loads((tmp_path / "results" / "choose" / f"{name}-svm.json").read_text())
        entry = record["seeds"]["1"]
        assert 0 < entry["figures"]["mAP"] <= 100
        assert entry["machine"]["python"] == sys.version.split()[0]
    # two small steps from scales of 0
    assert 0 < entry["scale"] < 0.01
