"""What the tools import before they have anything to do."""

import json
import sys

import pytest

from tests.conftest import ROOT

TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))

# Runs a tool as `python TOOL *arguments` would, then prints its exit code and the packages that it
# has loaded, but for the standard library, as JSON on the last line. Stand-ins that virtex_d2 puts
# in the place of missing modules are of no file.
_IMPORTS = """\
import json, runpy, sys
before, sys.argv = set(sys.modules), sys.argv[1:]
code = None
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
new = [name for name in {*sys.modules} - before if getattr(sys.modules[name], "__file__", None)]
packages = {name.split(".")[0] for name in new} - sys.stdlib_module_names
print()
print(json.dumps([code, sorted(packages)]))
"""
_OWN = {"pretrain", "virtex_d2", "benchmarks", "__mp_main__"}  # multiprocessing's name of the tool
# Python 3.10 reads TOML by a package, which is as light.
_LIGHT = {"tomli"} if sys.version_info < (3, 11) else set()


@pytest.fixture
def start(run_python):
    """`start(tool, *arguments)` -> its exit code, others' packages and all that it said."""

    def run(tool, *arguments):
        process = run_python("-c", _IMPORTS, ROOT / "tools" / tool, *arguments)
        code, packages = json.loads(process.stdout.splitlines()[-1])
        return code, set(packages) - _OWN - _LIGHT, process.stdout + process.stderr

    return run


@pytest.mark.parametrize("tool", TOOLS)
def test_help_is_printed_before_any_other_package_is_imported(start, tool):
    code, packages, told = start(tool, "--help")
    assert "usage: " in told
    assert (code, packages) == (0, set())


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_flag_is_refused_before_any_other_package_is_imported(start, tool):
    code, packages, told = start(tool, "--no-such-flag")
    assert "--no-such-flag" in told or "required" in told
    assert (code, packages) == (2, set())


@pytest.mark.parametrize("tool", ["pretrain_net.py", "train_net.py", "linear_probe.py"])
def test_a_flag_behind_the_pairs_is_refused_before_torch_is_imported(start, tool):
    code, packages, told = start(tool, "OUTPUT_DIR", "output", "--resume")
    assert "--resume stands after the KEY VALUE pairs, which begin with OUTPUT_DIR" in told
    assert (code, packages) == (2, set())


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("check_dataset.py", [], "expected the data sets either as --train or --val"),
        ("visualize_results.py", ["--output", "o"], "name the data set with --truth or with"),
        ("convert_checkpoint.py", ["a.pth"], "DEST is missing"),
        ("compare_inits.py", ["--output", "o"], "--config-file: name at least one config"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_torch_is_imported(
    start, tool, arguments, message
):
    code, packages, told = start(tool, *arguments)
    assert message in told
    assert (code, packages) == (2, set())


_STRUCK = """\
import contextlib, os, runpy, signal, sys, types
from virtex_d2.engine import signals

def launch(main, args):  # in the place of a module that imports torch for seconds
    os.kill(os.getpid(), signal.SIGUSR1)
    print("noted:", signals.received())

sys.modules["virtex_d2.engine.distributed"] = types.SimpleNamespace(launch=launch)
sys.modules["virtex_d2.engine.unfinished"] = types.SimpleNamespace(
    exit_at_once_if_unfinished=contextlib.nullcontext
)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("tool", ["pretrain_net.py", "train_net.py"])
def test_a_signal_that_comes_before_torch_is_imported_is_noted(run_python, tool):
    process = run_python("-c", _STRUCK, ROOT / "tools" / tool)
    assert (process.returncode, process.stdout) == (0, "noted: USR1\n"), process.stderr


def test_what_a_tool_imports_is_seen(start, tmp_path):
    """The tests above would else pass on tools that import anything."""
    tool = tmp_path / "tool.py"
    tool.write_text("import numpy\n")
    code, packages, _ = start(tool)
    assert code is None
    assert "numpy" in packages


def test_a_run_does_not_wait_for_what_only_reports_and_other_evaluations_need(run_python):
    trainers = (
        "import json, sys, pretrain.trainer, virtex_d2.detection.trainer;"
        "print(json.dumps([*sys.modules]))"
    )
    modules = set(json.loads(run_python("-c", trainers).stdout))
    assert "torch" in modules
    assert not modules & {"matplotlib", "lvis", "scipy", "sklearn", "pandas", "IPython"}
