"""tools/fetch_wheels.sh for another Python, with a pip that makes empty wheels."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# In the place of the environment's Python: pip writes sparse files of 30 MiB, one that has only its
# source by `pip wheel`; all else is done by the real one.
STUB = """\
#!/usr/bin/env bash
[ "$1" = -m ] && [ "$2" = pip ] || exec {python} "$@"
echo "$@" >> {log}
for word in "$@"; do last=$word; [ "$before" != --dest ] || to=$word
    [ "$before" != --wheel-dir ] || to=$word; before=$word; done
name=${{last%%==*}}
if [ "$3" = download ] && [ "$name" = fvcore ]; then exit 1; fi
truncate -s 30M "$to/$name{suffix}.whl"
"""


@pytest.fixture
def fetch(tmp_path):
    """`fetch(installed, suffix)` -> the process; what pip was asked is in tmp_path/log."""

    def run(installed="", suffix="-1-py3-none-any", version="3.12"):
        stub, there = tmp_path / "python", tmp_path / "installed.txt"
        stub.write_text(STUB.format(python=sys.executable, log=tmp_path / "log", suffix=suffix))
        stub.chmod(0o755)
        if installed is not None:
            there.write_text(installed)
        return subprocess.run(
            ["bash", ROOT / "tools/fetch_wheels.sh", tmp_path / "wheels", stub, version, there],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )

    return run


INSTALLED = """\
torch==2.11.0
Torch_Vision==0.26
numpy         2.5.0
detectron2 @ file:///somewhere
"""


def test_only_what_the_machine_lacks_is_fetched_in_parts_below_64_mib(fetch, tmp_path):
    from importlib import metadata

    # everything that is installed here but three; names are written as pip may write them
    names = {d.metadata["Name"].lower() for d in metadata.distributions()}
    lacking = {"fvcore", "pycocotools", "simplejpeg"}
    done = fetch("".join(f"{name.replace('-', '_')}==1\n" for name in names - lacking))
    assert done.returncode == 0, done.stderr
    parts = [sorted(p.name for p in folder.iterdir()) for folder in
             sorted((tmp_path / "wheels").iterdir())]  # fmt: skip
    assert all(len(part) <= 2 for part in parts)  # of 30 MiB each
    assert {name.partition("-")[0] for part in parts for name in part} == lacking
    asked = (tmp_path / "log").read_text().splitlines()
    downloads = [line for line in asked if line.startswith("-m pip download")]
    assert all("--python-version 3.12 " in line and "--no-deps" in line for line in downloads)
    assert any(line.startswith("-m pip wheel") and "fvcore==" in line for line in asked)
    assert not any("torch" in line for line in asked)


def test_a_wheel_of_another_python_is_refused_by_name(fetch):
    done = fetch(INSTALLED, suffix="-1-cp311-cp311-linux_x86_64")
    assert done.returncode == 2
    assert "error: these are not for Python 3.12" in done.stderr
    assert "pycocotools-1-cp311" in done.stderr


def test_a_missing_list_is_named(fetch, tmp_path):
    done = fetch(None)
    assert done.returncode == 2
    assert f"error: no file {tmp_path / 'installed.txt'}" in done.stderr
