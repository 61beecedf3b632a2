"""The short form of the kill matrix: every cell once."""

import json

import pytest

from benchmarks.kill_matrix import main
from tests.e2e.faults import FAULTS
from tests.e2e.kill_cases import CASES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_struck_in_any_way_ends_as_if_it_had_not_been(case, processes, tmp_path):
    arguments = ("--cases", case, "--processes", processes, "--repeats", 1, "--output", tmp_path)
    main(list(map(str, arguments)))
    results = json.loads((tmp_path / "kill_matrix.json").read_text())
    assert [result["fault"] for result in results] == list(FAULTS)
    assert all(result["identical"] for result in results)
