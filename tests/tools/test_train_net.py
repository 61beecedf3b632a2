"""tools/train_net.py from end to end, on detectors of toy size."""

import json
from pathlib import Path

import pytest
import torch
import torchvision

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "train_net.py"


def test_a_detector_is_trained_from_a_backbone_file_evaluated_and_saved(
    tool, backbone_file, capsys
):
    periods = ("SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert tool("MODEL.WEIGHTS", backbone_file(), *periods) == 0, capsys.readouterr().err
    assert "100 of 100 backbone tensors set, 0 missing" in tool.log()
    assert "SyncBN does not run on a CPU" in tool.log()
    evaluated = [line for line in tool.metrics() if "bbox/AP" in line]
    assert len(evaluated) == 2
    assert all("segm/AP50" in line for line in evaluated)
    assert any("loss_mask" in line and line["images_skipped"] == 0 for line in tool.metrics())
    assert (tool.output / "last_checkpoint").read_text() == "model_final.pth"
    assert (tool.output / "model_0000001.pth").is_file()
    predictions = json.loads((tool.output / "inference/coco_instances_results.json").read_text())
    assert predictions[0].keys() >= {"image_id", "category_id", "bbox", "score", "segmentation"}

    # Evaluating what was saved gives the AP of the end of training.
    final = dict(evaluated[-1])
    before = (tool.output / "metrics.json").read_bytes()
    capsys.readouterr()
    assert tool("--eval-only", "MODEL.WEIGHTS", tool.output / "model_final.pth") == 0
    printed = capsys.readouterr().out
    assert f"copypaste: {final['bbox/AP']:.4f},{final['bbox/AP50']:.4f}" in printed
    assert f"copypaste: {final['segm/AP']:.4f},{final['segm/AP50']:.4f}" in printed
    assert (tool.output / "metrics.json").read_bytes() == before


def test_a_c4_detector_is_trained_from_a_backbone_file(make_tool, backbone_file, capsys):
    tool = make_tool("C4")
    code = tool("MODEL.WEIGHTS", backbone_file("resnet50"), "SOLVER.MAX_ITER", 1)
    assert code == 0, capsys.readouterr().err
    assert "265 of 265 backbone tensors set" in tool.log()
    assert "segm/AP" in tool.metrics()[-1]


def test_a_resumed_run_goes_on_with_iteration_optimizer_and_schedule(tool, backbone_file, capsys):
    opts = ("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.STEPS", "(3,)", "DATASETS.TEST", "()")
    assert tool("MODEL.WEIGHTS", backbone_file(), "SOLVER.MAX_ITER", 2, *opts) == 0
    stopped = tool.checkpoint("model_final.pth")["trainer"]["_trainer"]["optimizer"]
    assert stopped["state"][0]["momentum_buffer"].abs().sum() > 0
    missing = tool.output.parent / "gone.safetensors"  # not looked at: the checkpoint has it all
    code = tool("--resume", "MODEL.WEIGHTS", missing, "SOLVER.MAX_ITER", 4, *opts)
    assert code == 0, capsys.readouterr().err
    assert "Starting training from iteration 2" in tool.log()
    resumed = tool.checkpoint("model_final.pth")
    assert resumed["iteration"] == 3
    rates = {line["iteration"]: line["lr"] for line in tool.metrics() if "lr" in line}
    assert rates[3] == pytest.approx(0.1 * rates[1])


def test_damaged_checkpoints_cost_iterations_and_change_nothing(tool, capsys):
    """The last two of a finished run; each would load without a word."""
    opts = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()")
    opts += ("SOLVER.CHECKPOINT_KEEP_LAST", 2)
    assert tool(*opts) == 0, capsys.readouterr().err
    expected = tool.checkpoint("model_final.pth")
    names = ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]
    assert sorted(path.name for path in tool.output.glob("*.pth")) == names
    for name in names[1:]:
        content = bytearray((tool.output / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tool.output / name).write_bytes(content)
    capsys.readouterr()
    assert tool("--eval-only", "--resume") == 2
    told = capsys.readouterr().err
    assert "model_final.pth: expected a whole checkpoint, but the file is truncated" in told
    assert tool("--resume", *opts) == 0, capsys.readouterr().err
    assert f"from an older one, {tool.output}/model_0000002.pth" in tool.log()
    assert "Starting training from iteration 3" in tool.log()
    found = tool.checkpoint("model_final.pth")["model"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected["model"].items())


def test_the_same_seed_trains_the_same_detector(tool, make_tool):
    opts = ("SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")
    second = make_tool(folder="second")
    third = make_tool(folder="third")
    assert tool(*opts) == second(*opts) == third(*opts, "SEED", 2) == 0
    a, b, c = (run.checkpoint("model_final.pth")["model"] for run in (tool, second, third))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["roi_heads.box_head.fc1.weight"], c["roi_heads.box_head.fc1.weight"])


def test_mixed_precision_and_channels_last_train_on_a_cpu(tool, capsys):
    code = tool(
        "SOLVER.AMP.ENABLED", True, "VIRTEX.CHANNELS_LAST", True, "MODEL.RPN.LOSS_WEIGHT", 2
    )
    assert code == 0, capsys.readouterr().err
    assert tool.metrics()[0]["total_loss"] > 0
    state = tool.checkpoint("model_final.pth")["model"]
    assert all(
        t.dtype in (torch.float32, torch.int64) and t.isfinite().all() for t in state.values()
    )


def _truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def test_a_truncated_image_is_skipped_with_its_name_and_a_count(tool, world, capsys):
    _truncate(sorted((world / "images/train").iterdir())[0])
    opts = ("VIRTEX.MAX_SKIPPED_SHARE", 0.5, "SOLVER.MAX_ITER", 6, "DATASETS.TEST", "()")
    assert tool(*opts) == 0, capsys.readouterr().err
    name = sorted((world / "images/train").iterdir())[0].name
    assert tool.log().count(f"{name}: skipped, another image takes its place") == 1
    assert "1 of 6 skipped so far" in tool.log()
    assert tool.metrics()[-1]["images_skipped"] == 1


def test_more_unusable_images_than_the_share_stop_the_run_and_are_named(tool, world, capsys):
    images = sorted((world / "images/train").iterdir())
    _truncate(images[0])
    images[3].write_bytes(b"")
    # With a worker process: an exception there would arrive as a traceback.
    opts = ("VIRTEX.MAX_SKIPPED_SHARE", 0.2, "SOLVER.MAX_ITER", 20, "DATALOADER.NUM_WORKERS", 1)
    assert tool(*opts) == 2
    error = capsys.readouterr().err
    assert "error: 2 of 6 training images are unusable" in error
    assert images[0].name in error
    assert images[3].name in error
    assert "Traceback" not in error + tool.log()
    assert not (tool.output / "model_final.pth").exists()


def test_without_a_single_usable_image_the_run_stops(tool, world, capsys):
    for image in (world / "images/train").iterdir():
        image.write_bytes(b"no image")
    assert tool("VIRTEX.MAX_SKIPPED_SHARE", 1.0) == 2
    assert "error: All training images in a row are unusable (6 so far)" in capsys.readouterr().err


def test_an_unusable_test_image_stops_the_evaluation_and_the_training_is_saved(tool, world, capsys):
    image = sorted((world / "images/test").iterdir())[1]
    _truncate(image)
    assert tool("SOLVER.MAX_ITER", 1) == 2
    error = capsys.readouterr().err
    assert f"{image.name}: this test image is unusable" in error
    assert "Traceback" not in error
    assert (tool.output / "model_final.pth").is_file()


def _no_resnet(folder):
    torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / "squeezenet.pth")
    return folder / "squeezenet.pth"


def _cut_safetensors(folder, backbone):
    (folder / "cut.safetensors").write_bytes(backbone.read_bytes()[:5000])
    return folder / "cut.safetensors"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda folder, _: folder / "none.pth", "none.pth: expected a file, found nothing there"),
        (lambda folder, _: folder / "none.safetensors", "none.safetensors: expected a file"),
        (
            _cut_safetensors,
            "cut.safetensors: expected a whole checkpoint file, but it is damaged or cut short",
        ),
        (lambda folder, _: _no_resnet(folder), "no ResNet found among the 52 tensors"),
    ],
)
def test_weights_that_do_not_load_stop_the_run_which_may_be_started_again(
    weights, message, tool, backbone_file, tmp_path, capsys
):
    assert tool("MODEL.WEIGHTS", weights(tmp_path, backbone_file())) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tool.output / "metrics.json").exists()
    assert not (tool.output / "last_checkpoint").exists()
    assert tool("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()") == 0


def test_evaluation_refuses_what_is_not_the_whole_detector(tool, backbone_file, capsys):
    assert tool("--eval-only") == 2
    assert "--eval-only needs a detector's checkpoint" in capsys.readouterr().err
    assert tool("--eval-only", "MODEL.WEIGHTS", backbone_file()) == 2
    assert "a backbone alone detects nothing" in capsys.readouterr().err
    assert tool("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()") == 0
    other = ("MODEL.FPN.OUT_CHANNELS", 24, "MODEL.WEIGHTS", tool.output / "model_final.pth")
    assert tool("--eval-only", *other) == 2
    assert "tensors are missing in it or of another shape" in capsys.readouterr().err
    content = torch.load(tool.output / "model_final.pth", weights_only=True)
    weight = content["model"]["roi_heads.box_predictor.cls_score.weight"]
    content["model"]["roi_heads.box_predictor.cls_score.weight"] = weight[:6].clone()
    torch.save(content, tool.output / "of_five.pth")
    assert tool("--eval-only", "MODEL.WEIGHTS", tool.output / "of_five.pth") == 2
    message = "It knows 5 classes, this config has 14 (MODEL.ROI_HEADS.NUM_CLASSES)"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SOLVER.BASE_LRR", 0.1), "Did you mean 'SOLVER.BASE_LR'?"),
        (("SOLVER.MAX_ITER", "many"), "SOLVER.MAX_ITER expects a int"),
        (("DATASETS.TRAIN", "('nothing',)"), "'nothing' is not a known data set"),
        (("DATASETS.TRAIN", "()"), "DATASETS.TRAIN is empty"),
        (("VIRTEX.DATASETS", "[['a', 'coco', 'b']]"), "expected entries [name, 'coco', ann"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 80), "NUM_CLASSES is 80, but 'tool_train'"),
        (("MODEL.ROI_HEADS.NAME", "StandardHeads"), "No object named 'StandardHeads'"),
    ],
)
def test_a_wrong_config_is_told_before_anything_is_trained(arguments, message, tool, capsys):
    assert tool(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    # a library's warning may stand before it
    assert any(line.startswith("error: ") for line in error.splitlines())
    assert "Traceback" not in error
    assert not (tool.output / "metrics.json").exists()


def test_an_output_folder_with_another_run_is_refused(tool, capsys):
    assert tool("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()") == 0
    before = {path.name: path.stat().st_mtime_ns for path in tool.output.iterdir()}
    capsys.readouterr()
    assert tool("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()") == 2
    assert "holds another run" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in tool.output.iterdir()} == before


def test_as_a_program_it_prints_one_line_exits_with_2_and_leaves_nothing(
    run_python, small_detector, world, data, tmp_path
):
    (world / "annotations/instances_train.json").write_text('{"images": [')
    arguments = [*small_detector("FPN"), *data]
    done = run_python(TOOL, *arguments, "OUTPUT_DIR", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "instances_train.json: expected JSON, but it is cut short" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_two_processes_train_one_detector_on_cpus(
    run_python, small_detector, data, backbone_file, tmp_path
):
    arguments = [*small_detector("FPN"), *data, "OUTPUT_DIR", tmp_path / "run"]
    arguments += ["MODEL.WEIGHTS", backbone_file()]
    done = run_python(TOOL, *arguments, processes=2, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run/log.txt").read_text()
    assert "with 2 processes naiveSyncBN does the same" in log
    assert "100 of 100 backbone tensors set" in log
    metrics = (tmp_path / "run/metrics.json").read_text().splitlines()
    assert "segm/AP" in json.loads(metrics[-1])
