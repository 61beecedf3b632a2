"""tools/caption_images.py, evaluate_captions.py and build_vocabulary.py as users call them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pretrain.methods.captioning import main
from tests.pretrain.tiny_run import write_run
from virtex_d2.engine.errors import exit_on_input_error

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("tools") / "run")


@pytest.fixture
def images(shapes_world, tmp_path):
    """A folder with a photograph, one that cannot be decoded, and another one."""
    folder = tmp_path / "images"
    (folder / "c").mkdir(parents=True)
    sources = sorted((shapes_world / "images" / "test").iterdir())
    Image.open(sources[0]).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"no image")
    Image.open(sources[1]).save(folder / "c" / "d.png")
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(name, *arguments)` -> exit code, stdout and stderr of a tool run in this process."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        code = 0
        try:
            with exit_on_input_error():
                code = getattr(main, name)("") or 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


def test_a_folder_is_captioned_in_order_and_what_cannot_be_decoded_is_named(
    run_python, run_folder, images
):
    result = run_python(TOOLS / "caption_images.py", run_folder, images)
    assert result.returncode == 1
    files = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert files == [str(images / "a.png"), str(images / "c" / "d.png")]
    assert all(line.split("\t")[1] for line in result.stdout.splitlines())
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{images / 'b.jpg'}: cannot be decoded: ")


def test_paths_from_standard_input_give_json_lines_and_pictures(
    run_python, run_folder, images, tmp_path
):
    odd = os.fsdecode(b"\xe9.png")  # no UTF-8, as old disks have it
    os.rename(images / "a.png", images / odd)
    files = [str(images / "c" / "d.png"), str(images / odd)]
    result = run_python(
        TOOLS / "caption_images.py",
        *(run_folder / "model_final.pth", "-", "--format", "json", "--decode", "nucleus"),
        *("--seed", 3, "--attention", tmp_path / "looks", "--max-words", 6, "--batch-size", 1),
        input="\n".join(files),
    )
    assert (result.returncode, result.stderr) == (0, "")
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    assert [entry["file"] for entry in entries] == files
    for entry, name in zip(entries, ("d.png", odd)):
        assert list(entry) == ["file", "caption", "logprob", "tokens", "attention"]
        assert entry["logprob"] < 0
        assert 1 <= len(entry["tokens"]) <= 6
        assert entry["attention"] == str(tmp_path / "looks" / name)
        assert Image.open(entry["attention"]).format == "PNG"


def test_a_model_that_is_not_there_is_one_line_and_code_2(call, images, tmp_path):
    code, output, errors = call("caption_images", tmp_path / "absent.pth", images)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "absent.pth: expected a file" in errors


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # a test run in the background ignores the signal, and what it starts would, too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_ends_it_without_a_traceback(run_folder, images):
    process = start(TOOLS / "caption_images.py", run_folder, "-", "--batch-size", 1)
    process.stdin.write(f"{images / 'a.png'}\n")
    process.stdin.flush()
    assert process.stdout.readline()  # it is at work, and waits for more
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=60)  # before its standard input ends, which would end it as well
    assert (code, process.communicate()[1]) == (130, "")


def test_a_reader_that_has_enough_ends_it_without_a_traceback(run_folder, images):
    files = [str(images / "a.png")] * 40
    process = start(TOOLS / "caption_images.py", run_folder, *files, "--batch-size", 1)
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(60), errors) == (-signal.SIGPIPE, "")


def test_captions_are_scored_from_end_to_end(call, run_python, run_folder, shapes_world, tmp_path):
    images, references = (
        shapes_world / "images" / "test",
        shapes_world / "annotations" / "captions_test.json",
    )
    _, lines, _ = call("caption_images", run_folder, images, "--format", "json")
    (tmp_path / "captions.jsonl").write_text(lines)
    result = run_python(
        TOOLS / "evaluate_captions.py",
        *(tmp_path / "captions.jsonl", references, "--format", "json"),
        env={"PATH": str(tmp_path)},  # no Java
    )
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    assert list(scores) == ["images", "tokenizer", "scores", "missing"]
    assert scores["images"] == 3
    assert 0 <= scores["scores"]["BLEU-1"] <= 1
    (tmp_path / "captions.jsonl").write_text(lines.splitlines()[0])
    code, _, errors = call("evaluate_captions", tmp_path / "captions.jsonl", references)
    assert code == 2
    assert "2 images of the references have no caption" in errors


def test_scores_for_people_say_what_is_missing(call, shapes_world, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java
    references = shapes_world / "annotations" / "captions_test.json"
    annotations = json.loads(references.read_text())["annotations"]
    results = {entry["image_id"]: entry["caption"] for entry in annotations}
    entries = [{"image_id": key, "caption": caption} for key, caption in results.items()]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    code, output, _ = call("evaluate_captions", tmp_path / "results.json", references)
    assert code == 0
    assert "NOT comparable with published figures" in output.splitlines()[0]
    assert "BLEU-1   1.0000" in output
    assert "SPICE    not computed: Java is not installed" in output


def test_a_vocabulary_is_built_twice_alike_and_never_over_another(
    call, run_python, shapes_world, tmp_path
):
    arguments = [
        *("--images", shapes_world / "images" / "train", "--vocab-size", 60),
        *("--captions", shapes_world / "annotations" / "captions_train.json", "--output"),
    ]
    first = run_python(TOOLS / "build_vocabulary.py", *arguments, tmp_path / "one.model")
    assert first.returncode == 0, first.stderr
    assert "pieces                       60" in first.stdout
    assert "warning: " in first.stderr  # a few captions, sixty pieces
    code, _, errors = call("build_vocabulary", *arguments, tmp_path / "one.model")
    assert code == 2
    assert "exists already" in errors
    _, summary, _ = call("build_vocabulary", *arguments, tmp_path / "two.model", "--format", "json")
    assert json.loads(summary)["pieces"] == 60
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
