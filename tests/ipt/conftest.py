"""What the tests of restoring share."""

import sys
from collections.abc import Callable

import pytest

from pretrain.methods.ipt.main import restore_images
from tests.ipt.restorers import write_restorer
from virtex_d2.engine.errors import exit_on_input_error


@pytest.fixture(scope="session")
def six_tasks(tmp_path_factory) -> str:
    return write_restorer(tmp_path_factory.mktemp("six") / "restorer.safetensors")


@pytest.fixture
def tool(monkeypatch, capsys) -> Callable:
    """`tool(*arguments)` -> exit code, stdout and stderr of restore_images, run in here."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["restore_images.py", *map(str, arguments)])
        code = 0
        try:
            with exit_on_input_error():
                restore_images("")
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call
