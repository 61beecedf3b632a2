import pytest

from virtex_d2.engine.errors import InputError, exit_on_input_error, nearest

KEYS = ("SOLVER.BASE_LR", "SOLVER.MAX_ITER", "MODEL.BACKBONE.FREEZE_AT", "DATASETS.TRAIN")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SOLVER.BASE_LRR", "SOLVER.BASE_LR"),
        ("solver.max_iter", "SOLVER.MAX_ITER"),
        ("BASE_LR", "SOLVER.BASE_LR"),
        ("FREEZE_AT", "MODEL.BACKBONE.FREEZE_AT"),
    ],
)
def test_a_misspelled_name_is_answered_with_the_nearest_one(name, expected):
    assert nearest(name, KEYS) == f" Did you mean '{expected}'?"


@pytest.mark.parametrize("candidates", [KEYS, ()])
def test_a_name_that_resembles_nothing_is_answered_with_nothing(candidates):
    assert nearest("QQQQQQQQ", candidates) == ""


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("VIRTEX.FRACTION", " Did you mean 'DATA.FRACTION'?"),  # in another group
        ("VIRTEX.ENABLED", ""),  # in several
        ("DATA.TRAIN_IMAGES", ""),
        ("MODEL.TEXTUAL.DROPOUT", ""),
    ],
)
def test_keys_of_another_tool_are_answered_with_what_is_near_alone(name, suggested):
    keys = (*KEYS, "DATA.FRACTION", "A.ENABLED", "B.ENABLED", "MODEL.RESNETS.DEPTH")
    assert nearest(name, keys) == suggested


def test_an_input_error_becomes_one_line_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit_info, exit_on_input_error():
        raise InputError("captions.json: record 3 has no text")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: captions.json: record 3 has no text\n"


def test_it_also_decorates_a_main_function(capsys):
    @exit_on_input_error()
    def main():
        raise InputError("no such file")

    for _ in range(2):  # a decorated function can be called again
        with pytest.raises(SystemExit):
            main()
    assert capsys.readouterr().err == "error: no such file\n" * 2


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_input_error():
        raise ZeroDivisionError


def test_a_tool_that_fails_so_prints_no_traceback(tmp_path, run_python):
    tool = tmp_path / "tool.py"
    tool.write_text(
        "from virtex_d2.engine.errors import InputError, exit_on_input_error\n"
        "with exit_on_input_error():\n"
        "    raise InputError('wrong')\n"
    )
    result = run_python(tool)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: wrong\n")
