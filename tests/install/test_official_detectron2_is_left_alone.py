"""An environment that has the official detectron2 keeps it, whatever of ours is installed into it.

A stand-in with the official build's layout (a distribution called detectron2, version 0.6, with a
compiled `_C`) is put into a small virtual environment. Everything else comes from the environment
that runs the tests, by links, so that no step needs the internet.
"""

import hashlib
import os
import shutil
import subprocess
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILED = f"detectron2/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
C_SOURCE = """
#include <Python.h>
static PyObject *version(PyObject *self, PyObject *args) {
    return PyUnicode_FromString("stand-in");
}
static PyMethodDef methods[] = {{"get_compiler_version", version, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
"""


class Environment:
    def __init__(self, folder):
        self.folder = folder
        self.python = folder / "bin" / "python"
        venv.create(folder, symlinks=True)
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site_packages = Path(self("-c", query).strip())

    def __call__(self, *arguments):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        result = subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=self.folder,  # and not the project's, which would be importable from there
            env=environment,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def distributions(self):
        return {line.partition("==")[0] for line in self("-m", "pip", "freeze").splitlines()}


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("detectron2/**/*", "detectron2-0.6.dist-info/*")
        for path in folder.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def link_packages_of_this_environment(folder):
    """Every installed package except detectron2 and this project."""
    folder.mkdir()
    left_out = (
        "detectron2",
        "pb1_detectron2",
        "virtex",
        "__editable__",
        "_virtualenv",
        "__pycache__",
    )
    for path in Path(pytest.__file__).parents[1].iterdir():
        if not path.name.startswith(left_out) and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)


def install_stand_in(site_packages):
    """Returns whether its `_C` is really compiled; else it is a file that no test imports."""
    for name in ("__init__.py", "engine/__init__.py", "layers/__init__.py"):
        path = site_packages / "detectron2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('__version__ = "0.6"\n' if name == "__init__.py" else "")
    info = site_packages / "detectron2-0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("")
    compiler = shutil.which("cc")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and header.exists():
        source = info.parent / "stand_in.c"
        source.write_text(C_SOURCE)
        command = [compiler, "-shared", "-fPIC", f"-I{header.parent}", source]
        subprocess.run([*command, "-o", site_packages / COMPILED], check=True)
        source.unlink()
        return True
    (site_packages / COMPILED).write_bytes(b"an extension for another machine")
    return False


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    environment = Environment(folder / "env")
    link_packages_of_this_environment(folder / "packages")
    (environment.site_packages / "packages.pth").write_text(f"{folder / 'packages'}\n")
    environment.compiled = install_stand_in(environment.site_packages)
    environment.before = digests(environment.site_packages)
    assert COMPILED in environment.before
    assert "detectron2" in environment.distributions()

    # A copy, because an editable install writes into the project's folder.
    environment.project = folder / "project"
    environment.project.mkdir()
    for name in (
        "LICENSE",
        "setup.py",
        "pyproject.toml",
        "requirements.txt",
        "requirements-captions.txt",
        "requirements-words.txt",
        "requirements-dev.txt",
    ):
        shutil.copy(ROOT / name, environment.project)
    for name in ("virtex_d2", "pretrain"):
        shutil.copytree(ROOT / name, environment.project / name)
    install = ("-m", "pip", "install", "--no-index", "--no-build-isolation")
    environment(*install, "-e", environment.project)
    return environment


def test_an_editable_install_neither_replaces_nor_doubles_it(environment):
    """With its dependencies: pip would have failed here, had one of them been a detectron2."""
    assert digests(environment.site_packages) == environment.before
    distributions = environment.distributions()
    assert "detectron2" in distributions
    assert "pb1-detectron2" not in distributions
    assert not any(name.startswith("opencv") for name in requirements_of_virtex(environment))


def test_importing_virtex_d2_uses_it(environment):
    code = textwrap.dedent("""
        import sys
        import virtex_d2
        from virtex_d2.engine import compat
        assert compat.has_compiled_ops()
        assert "compiled ops" not in compat.applied
        assert "detectron2._C" not in sys.modules and "detectron2" not in sys.modules
        import detectron2
        print(virtex_d2.__file__, detectron2.__file__)
    """)
    ours, theirs = environment("-c", code).split()
    assert Path(ours).is_relative_to(environment.project)
    assert Path(theirs).is_relative_to(environment.site_packages)
    if environment.compiled:
        code = (
            "import virtex_d2; from detectron2 import _C; from virtex_d2.engine import compat; "
            "print(_C.get_compiler_version(), compat.has_compiled_ops())"
        )
        assert environment("-c", code).strip() == "stand-in True"


def test_the_script_that_installs_detectron2_leaves_it_alone(environment, tmp_path):
    result = subprocess.run(
        [ROOT / "tools" / "install_detectron2.sh", environment.python],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "WHEELS": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    assert "left alone" in result.stdout
    assert digests(environment.site_packages) == environment.before
    assert "pb1-detectron2" not in environment.distributions()


def requirements_of_virtex(environment):
    code = "import importlib.metadata as m; print(*m.requires('virtex-d2'), sep='\\n')"
    return environment("-c", code).splitlines()


def test_no_detectron2_is_among_the_requirements():
    """Its two distributions have different names: pip would install one over the other."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [line.partition("#")[0].strip() for line in lines]
    assert not [name for name in names if "detectron2" in name]
