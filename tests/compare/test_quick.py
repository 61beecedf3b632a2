"""The preset that asks cheap questions first, its verdict, and images that were seen before."""

import json
import re
import shutil

import pytest

from tests.compare.conftest import ROOT, comparison
from tests.compare.test_comparison import run_tool
from tests.probes.small_sets import COLOURS, picture
from virtex_d2.annotations.coco import read_image_list
from virtex_d2.checkpoint.starts import ZERO_SCALES
from virtex_d2.detection.config import get_virtex_cfg
from virtex_d2.engine.config import load_config
from virtex_d2.engine.errors import InputError
from virtex_d2.studies.compare.leaks import find_leaks
from virtex_d2.studies.compare.plan import make_plan, parse_inits
from virtex_d2.studies.compare.runs import read_probe
from virtex_d2.studies.compare.tables import judged, judgements
from virtex_d2.studies.probes.config import check_config, get_probe_cfg
from virtex_d2.studies.verdict import HELPS, UNDECIDED

QUICK = (
    *("--preset", "quick", "--config-file", "configs/tiny.yaml"),
    *("--init", "random", "--init", "virtex=virtex.safetensors"),
)


def test_each_start_is_asked_three_questions_cheap_ones_first(project):
    stages = comparison(project, seeds=(1, 2), fractions=(0.1,), preset="quick").stages
    assert [stage.group for stage in stages] == 4 * ["svm"] + 4 * ["frozen"] + 4 * ["runs"]
    assert len({stage.folder for stage in stages}) == 12
    svm, frozen, whole = stages[1], stages[5], stages[9]
    assert svm.command[0] == "tools/linear_probe.py"
    assert frozen.command[-4:] == (
        *("MODEL.BACKBONE.FREEZE_AT", "5"),
        *("SOLVER.BACKBONE_LR_FACTOR", "1.0"),
    )
    again = comparison(project, seeds=(1, 2), fractions=(0.1,)).stages[1]
    assert (whole.command, whole.folder) == (again.command, again.folder)


def test_the_probe_has_the_data_network_and_pixels_of_the_detector(project):
    options = [
        *("DATASETS.TRAIN", "('a','b')", "DATASETS.TEST", "('c',)", "INPUT.MIN_SIZE_TEST", "96"),
        *("VIRTEX.DATASETS", "[['c', 'coco', 'c.json', 'c']]", "MODEL.RESNETS.DEPTH", "18"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "INPUT.FORMAT", "BGR"),
    ]
    run = comparison(project, seeds=(4,), fractions=(0.5,), preset="quick", overrides=options)
    _, *words = run.stages[0].command
    cfg = load_config(get_probe_cfg(), None, words)
    check_config(cfg)
    assert (cfg.DATA.TRAIN, cfg.DATA.TEST, cfg.DATA.FORMAT) == ("a,b", "c", "detection")
    assert cfg.VIRTEX.DATASETS == [["c", "coco", "c.json", "c"]]
    assert (cfg.VIRTEX.FRACTION, cfg.VIRTEX.FRACTION_SEED, cfg.SEED) == (0.5, 4, 4)
    assert (cfg.INPUT.RESIZE, cfg.INPUT.CROP, cfg.INPUT.FORMAT) == (96, 84, "BGR")
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH) == ("random", 18)
    assert cfg.MODEL.RESNETS.OUT_FEATURES == ["res3", "res4", "res5"]
    assert cfg.DATA.CACHE_DIR == "out/features"


def test_scales_of_zero_are_not_frozen(project):
    inits = parse_inits(["random", ZERO_SCALES])
    plan = make_plan(["configs/tiny.yaml"], inits, [1], root=project, preset="quick")
    found = [(cell.step, cell.init) for cell in plan.cells]
    assert (("frozen", "random") in found, ("frozen", ZERO_SCALES) in found) == (True, False)
    assert len(found) == 5


def test_the_tool_answers_with_a_verdict_and_what_seeds_could_have_seen(
    project, monkeypatch, capsys, sets
):
    data = sets(4 * ["red", "green", "blue"], "answered")
    run_tool(monkeypatch, *QUICK, "--seeds", 1, 2, 3, "--opts", *data)
    told = capsys.readouterr().out
    (sentence,) = re.findall("^virtex: helps.*$", told, re.MULTILINE)
    assert re.search(
        r"Box AP over the run: \+\d\.\d \[.*\] against random, 3 seeds\. With a chance of 80 % "
        r"these seeds see differences from \d\.\d points on\.",
        sentence,
    )
    assert re.search(r"SVMs on frozen features, mAP\n +res3 +res4 +res5\nrandom +\d\d\.\d", told)
    assert "frozen backbone" in told
    html = (project / "out" / "report.html").read_text(encoding="utf-8")
    assert sentence.replace("+", "&#43;") in html or sentence in html
    assert "Linear SVMs on frozen features" in html
    rows = (project / "out" / "results.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {"tiny", "tiny-frozen"}


def test_verdicts_are_one_family_of_whole_detectors(finished):
    run = comparison(finished)
    _, blocks = run.report()
    found = judged(blocks)
    assert len(found) == 2  # two fractions
    assert {verdict.family for verdict in found.values()} == {2}
    assert {verdict.word for verdict in found.values()} == {HELPS}
    assert all("(tiny, 10" in s or "(tiny, 100" in s for s in judgements(blocks))


def test_one_seed_claims_nothing(project):
    run = comparison(project, seeds=(1,), fractions=(1.0,))
    run.run()
    _, blocks = run.report()
    assert [verdict.word for verdict in judged(blocks).values()] == [UNDECIDED]
    (sentence,) = judgements(blocks)
    assert "cannot be told" in sentence
    assert "Without a spread over seeds nothing is claimed" in sentence


@pytest.fixture
def sets(tmp_path):
    """`sets(colours of the training images)` -> keys of two data sets of one-coloured images."""

    def write(colours, name):
        entries = []
        for split, found in (("train", colours), ("test", ["red", "blue"])):
            folder = tmp_path / f"{name}_{split}"
            folder.mkdir()
            for number, colour in enumerate(found):
                picture(COLOURS[colour], number + len(split)).save(folder / f"{number}.png")
            numbers = range(len(found))
            content = {
                "images": [
                    {"id": n, "file_name": f"{n}.png", "width": 40, "height": 34} for n in numbers
                ],
                "annotations": [
                    {"id": n + 1, "image_id": n, "category_id": [*COLOURS].index(found[n])}
                    | {"bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0}
                    for n in numbers
                ],
                "categories": [{"id": n, "name": colour} for n, colour in enumerate(COLOURS)],
            }
            folder.with_suffix(".json").write_text(json.dumps(content))
            entries.append([folder.name, "coco", f"{folder}.json", str(folder)])
        return [
            *("VIRTEX.DATASETS", repr(entries), "INPUT.MIN_SIZE_TEST", "40"),
            *("DATASETS.TRAIN", f"('{name}_train',)", "DATASETS.TEST", f"('{name}_test',)"),
            *("DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"),
            *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
        ]

    return write


@pytest.mark.slow
def test_the_svms_of_a_start_run_as_they_are_planned(project, sets, run_python):
    overrides = sets(4 * ["red", "green", "blue"], "planned")
    run = comparison(project, (1,), (1.0,), preset="quick", overrides=overrides)
    for stage in run.stages[1:2]:
        tool, *words = stage.command
        done = run_python(ROOT / tool, *words, cwd=project)
        assert done.returncode == 0, done.stderr
    metrics = read_probe(project / run.stages[1].folder)
    assert metrics.keys() == {"res3", "res4", "res5"}
    assert metrics["res3"] > 90
    assert (project / "out" / "features").is_dir()


def test_data_that_train_no_svm_are_told_and_the_other_steps_are_done(project, sets, monkeypatch):
    data = sets(6 * ["red"], "alone")  # red has no negatives, the others no positives
    run_tool(monkeypatch, *QUICK, "--seeds", 1, "--opts", *data)
    html = (project / "out" / "report.html").read_text()
    reason = "none of 3 classes can be asked for; red: 0 negative training images, and 3 folds"
    assert html.count(reason) == 2
    assert "not finished" not in html
    assert not (project / "out" / "runs" / "tiny" / "100pct" / "svm").exists()


@pytest.fixture
def photographs(tmp_path):
    """A caption file of six images, and a test set of four of which two are among them."""
    folder = tmp_path / "photographs"
    (folder / "captioned").mkdir(parents=True)
    (folder / "test").mkdir()
    for number in range(6):
        picture(COLOURS["red"], number).save(folder / "captioned" / f"{number}.png")
    shutil.copy(folder / "captioned" / "3.png", folder / "test" / "copied.png")
    for number in (2, 10, 11):  # 2: the same name and other pixels
        picture(COLOURS["blue"], number).save(folder / "test" / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(6)]
    captions = {"images": images, "annotations": [{"id": 1, "image_id": 0, "caption": "A dog."}]}
    (folder / "captions.json").write_text(json.dumps(captions))
    names = ["test/copied.png", "test/2.png", "test/10.png", "captioned/5.png"]
    truth = {
        "images": [
            {"id": n, "file_name": name, "width": 40, "height": 34} for n, name in enumerate(names)
        ],
        "annotations": [],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (folder / "test.json").write_text(json.dumps(truth))
    return folder


def leaky_config(folder, name):
    cfg = get_virtex_cfg()
    cfg.VIRTEX.DATASETS = [[name, "coco", str(folder / "test.json"), str(folder)]]
    cfg.DATASETS.TEST = (name,)
    return cfg


def test_test_images_among_captioned_ones_are_found_by_file_and_by_pixels(photographs, monkeypatch):
    captions = [(str(photographs / "captions.json"), str(photographs / "captioned"))]
    cfg, record = leaky_config(photographs, "leaky"), photographs / "leaks.json"
    (sentence,) = find_leaks(captions, [cfg], record)
    assert sentence.startswith("2 of 4 test images of leaky are among the images of")
    assert "copied.png, 5.png" in sentence
    monkeypatch.setattr("virtex_d2.studies.compare.leaks.check", None)  # decodes nothing again
    assert find_leaks(captions, [cfg], record) == [sentence]


def test_the_report_names_images_that_were_seen(project, monkeypatch, photographs, capsys):
    sets = repr([["seen", "coco", str(photographs / "test.json"), str(photographs)]])
    captions = (photographs / "captions.json", photographs / "captioned")
    data = ("--opts", "VIRTEX.DATASETS", sets, "DATASETS.TEST", "('seen',)")
    run_tool(monkeypatch, *QUICK[2:], "--captions", *captions, *data)
    assert "2 of 4 test images of seen" in capsys.readouterr().out
    assert "2 of 4 test images of seen" in (project / "out" / "report.html").read_text()


@pytest.mark.parametrize("content", [{}, {"images": []}, {"images": [{"id": 3}]}])
def test_a_file_without_images_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"c\.json: (expected a list `images`|`images`\[0\])"):
        read_image_list(str(tmp_path / "c.json"), "", "c")
