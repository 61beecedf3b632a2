"""tools/setup_env.sh with an interpreter that only records what it is asked to do."""

import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Answers as Python 3.11 would, creates a "virtual environment" that holds itself, and writes every
# call of pip to $LOG. $FAIL is a word in the arguments of a call that is to fail.
FAKE_PYTHON = """
    #!/usr/bin/env bash
    if [ -n "${FAIL:-}" ] && [[ "$*" == *"$FAIL"* ]]; then exit 1; fi
    case "$*" in
        *"print("*) echo "${VERSION:-3.11.4}" ;;
        *"version_info < (3, 10)"*) [ "${VERSION:-3.11.4}" != 3.8.1 ] ;;
        "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
        "-m pip "*) echo "$*" >>"$LOG" ;;
        *find_spec*detectron2) exit 1 ;;
    esac
"""


class Project:
    """A copy of what the script reads, and the script."""

    def __init__(self, folder):
        self.folder = folder / "project"
        (self.folder / "tools").mkdir(parents=True)
        for name in ("setup_env.sh", "install_detectron2.sh"):
            shutil.copy(ROOT / "tools" / name, self.folder / "tools" / name)
        for path in [*ROOT.glob("requirements*"), ROOT / "constraints.txt", ROOT / "setup.py"]:
            shutil.copy(path, self.folder)
        self.python = folder / "python"
        self.python.write_text(textwrap.dedent(FAKE_PYTHON).strip())
        self.python.chmod(0o755)
        self.venv = folder / "venv"
        self.log = folder / "log"

    def build(self, **environment):
        self.log.write_text("")
        return subprocess.run(
            ["bash", self.folder / "tools" / "setup_env.sh", self.venv],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"], "PYTHON": str(self.python), "LOG": str(self.log)}
            | environment,
        )

    def installed(self):
        return self.log.read_text().splitlines()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_the_environment_is_built_in_the_order_that_its_parts_need(project):
    result = project.build()
    assert result.returncode == 0, result.stderr
    steps = project.installed()
    order = [
        "pip>=23.1,<26.3",
        "setuptools wheel",
        "-r requirements.txt",
        "--require-hashes",
        "-e .",
    ]
    assert [next(word for word in order if word in step) for step in steps] == order
    assert "-c constraints.txt" in steps[2]
    assert "--no-deps" in steps[3]
    assert "--no-deps" in steps[4]


def test_a_complete_environment_is_kept(project):
    project.build()
    (project.venv / "kept").touch()
    result = project.build()
    assert (result.returncode, result.stdout) == (0, "")
    assert project.installed() == []
    assert (project.venv / "kept").exists()


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-dev.txt", "requirements-detectron2.txt"]
)
def test_changed_requirements_are_built_anew(project, name):
    project.build()
    (project.venv / "old").touch()
    with open(project.folder / name, "a") as file:
        file.write("# a change\n")
    assert project.build().returncode == 0
    assert project.installed()
    assert not (project.venv / "old").exists()


@pytest.mark.parametrize(
    "step", ["-r requirements.txt", "--require-hashes", "-e .", "import virtex"]
)
def test_a_half_built_environment_is_not_taken_for_complete(project, step):
    assert project.build(FAIL=step).returncode != 0
    assert project.venv.exists()
    (project.venv / "half").touch()
    result = project.build()
    assert result.returncode == 0
    assert "The environment is complete." in result.stdout
    assert not (project.venv / "half").exists()


def test_another_interpreter_builds_it_anew(project):
    project.build()
    assert project.build(VERSION="3.12.2").returncode == 0
    assert project.installed()


def test_an_old_python_is_refused_with_its_version(project):
    result = project.build(VERSION="3.8.1")
    assert result.returncode == 2
    assert "Python 3.10 or newer is needed" in result.stderr
    assert "3.8.1" in result.stderr
    assert not project.venv.exists()


def test_a_missing_interpreter_is_named(project):
    result = project.build(PYTHON="no-such-python")
    assert result.returncode == 2
    assert "error: no Python interpreter called 'no-such-python'" in result.stderr


@pytest.mark.parametrize("name", ["pyvenv.cfg", "thesis.tex"])
def test_a_folder_that_it_did_not_make_is_left_alone(project, name):
    project.venv.mkdir()
    (project.venv / name).write_text("mine")
    result = project.build()
    assert result.returncode == 2
    assert "left alone" in result.stderr
    assert (project.venv / name).read_text() == "mine"
    assert project.installed() == []


def test_with_a_wheel_folder_nothing_comes_from_the_internet(project, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    result = project.build(WHEELS=str(wheels))
    assert result.returncode == 0, result.stderr
    steps = project.installed()
    with_packages = [step for step in steps if "-e ." not in step]
    assert all(f"--no-index --find-links {wheels}" in step for step in with_packages)
    assert any("pb1-detectron2==0.6 lvis==0.5.3" in step for step in steps)


def test_a_missing_wheel_folder_is_named(project, tmp_path):
    result = project.build(WHEELS=str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert f"WHEELS={tmp_path / 'nowhere'} is no folder" in result.stderr
