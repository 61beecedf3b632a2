import pytest
from detectron2.config import CfgNode, get_cfg

from virtex_d2.engine.config import load_config, read_config
from virtex_d2.engine.errors import InputError


@pytest.fixture
def cfg():
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "./output"
    cfg.SOLVER = CfgNode({"BASE_LR": 0.1, "MAX_ITER": 100, "STEPS": (10, 20)})
    cfg.DATASETS = CfgNode({"TRAIN": ()})
    cfg.MODEL = CfgNode({"WEIGHTS": "", "FREEZE": False})
    cfg.MODEL.EXTRA = CfgNode(new_allowed=True)
    return cfg


def write(path, text):
    path.write_text(text)
    return str(path)


def test_nothing_given_changes_nothing(cfg):
    before = cfg.clone()
    assert load_config(cfg, "", []) is cfg
    assert load_config(cfg, None, None) == before


def test_the_command_line_comes_after_the_file_and_the_file_after_its_base(cfg, tmp_path):
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases" / "root.yaml", "SOLVER: {BASE_LR: 1.0, MAX_ITER: 1, STEPS: [1]}")
    write(tmp_path / "bases" / "base.yaml", "_BASE_: root.yaml\nSOLVER: {MAX_ITER: 2, STEPS: [2]}")
    file = write(tmp_path / "run.yaml", "_BASE_: bases/base.yaml\nSOLVER: {STEPS: [3]}")
    load_config(cfg, file, ["MODEL.FREEZE", "True"])
    assert dict(cfg.SOLVER) == {"BASE_LR": 1.0, "MAX_ITER": 2, "STEPS": (3,)}
    assert cfg.MODEL.FREEZE is True
    load_config(cfg, file, ["SOLVER.STEPS", "(4, 5)"])
    assert cfg.SOLVER.STEPS == (4, 5)
    assert read_config(file) == {"SOLVER": {"BASE_LR": 1.0, "MAX_ITER": 2, "STEPS": [3]}}


def test_several_bases_are_merged_in_their_order(cfg, tmp_path):
    write(tmp_path / "a.yaml", "SOLVER: {BASE_LR: 1.0, MAX_ITER: 1}")
    write(tmp_path / "b.yaml", "SOLVER: {MAX_ITER: 2}")
    load_config(cfg, write(tmp_path / "run.yaml", "_BASE_: [a.yaml, b.yaml]"), [])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (1.0, 2)


def test_a_frozen_config_is_returned_thawed(cfg):
    cfg.freeze()
    assert not load_config(cfg, None, ["SOLVER.MAX_ITER", "5"]).is_frozen()
    assert cfg.SOLVER.MAX_ITER == 5


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),  # an int for a float
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.STEPS", "[30]", (30,)),
        ("DATASETS.TRAIN", "('shapes_train',)", ("shapes_train",)),
        ("OUTPUT_DIR", "2024", "2024"),  # text that looks like a number
        ("OUTPUT_DIR", "runs/(a)", "runs/(a)"),
        ("MODEL.WEIGHTS", "", ""),
        ("MODEL.EXTRA.ANY", "3", 3),
    ],
)
def test_values_from_the_command_line_take_the_type_of_their_key(cfg, key, text, value):
    load_config(cfg, None, [key, text])
    node = cfg
    for name in key.split("."):
        node = node[name]
    assert node == value
    assert type(node) is type(value)


def test_exponents_that_yaml_reads_as_text_become_numbers(cfg, tmp_path):
    load_config(cfg, write(tmp_path / "run.yaml", "SOLVER: {BASE_LR: 1e-3}"), [])
    assert cfg.SOLVER.BASE_LR == 0.001


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], "unknown key SOLVER.BASE_LRR. Did you mean 'SOLVER.BASE_LR'?"),
        (["MAX_ITER", "1"], "unknown key MAX_ITER. Did you mean 'SOLVER.MAX_ITER'?"),
        (["SOLVER.BASE_LR.X", "1"], "unknown key SOLVER.BASE_LR.X"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER expects a int such as 100; found 'many'"),
        (["SOLVER.MAX_ITER", "1.5"], "found 1.5 (float)"),
        (["MODEL.FREEZE", "1"], "MODEL.FREEZE expects a bool such as False; found 1 (int)"),
        (["SOLVER", "1"], "SOLVER expects a group of keys"),
        (["DATASETS.TRAIN", "shapes_train"], """Write "('shapes_train',)"."""),
        (["DATASETS.TRAIN", "(a, b_c)"], """Write "('a', 'b_c')"."""),
        (["SOLVER.MAX_ITER"], "the key SOLVER.MAX_ITER has no value"),
        (["SOLVER.MAX_ITER", "5", "--resum"], "--resum stands where a config key was expected"),
        (["NO.SUCH", "1", "SOLVER.MAX_ITER", "x"], "SOLVER.MAX_ITER expects"),  # both are told
    ],
)
def test_a_wrong_override_names_the_key_and_changes_nothing(cfg, opts, message):
    before = cfg.clone()
    with pytest.raises(InputError) as error:
        load_config(cfg, None, opts)
    assert str(error.value).startswith("command line: ")
    assert message in str(error.value)
    assert cfg == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVR: {MAX_ITER: 1}", "unknown key SOLVR"),
        ("SOLVER: {MAX_ITR: 1}", "unknown key SOLVER.MAX_ITR. Did you mean 'SOLVER.MAX_ITER'?"),
        ("SOLVER: {MAX_ITER: [1]}", "SOLVER.MAX_ITER expects a int such as 100; found [1] (list)"),
        ("SOLVER: 3", "SOLVER is a group of keys; found 3 (int)"),
        ("- 1\n- 2", "expected KEY: VALUE lines, found a list"),
        ("SOLVER: {MAX_ITER: 1", "not YAML"),
        ("_BASE_: nowhere.yaml", "named by _BASE_ in"),
        ("_BASE_: run.yaml", "includes itself"),
    ],
)
def test_a_wrong_file_names_file_and_key_and_changes_nothing(cfg, tmp_path, text, message):
    before = cfg.clone()
    file = write(tmp_path / "run.yaml", text)
    with pytest.raises(InputError) as error:
        load_config(cfg, file, [])
    assert str(tmp_path) in str(error.value)
    assert message in str(error.value)
    assert cfg == before


def test_the_config_of_another_tool_is_told_in_a_few_lines(cfg, tmp_path):
    text = "\n".join(f"KEY{number}: 1" for number in range(40))
    with pytest.raises(InputError, match="35 more: is this the config of another") as error:
        load_config(cfg, write(tmp_path / "run.yaml", text), [])
    assert len(str(error.value).splitlines()) == 6


def test_a_wrong_key_of_a_base_is_reported_with_the_base(cfg, tmp_path):
    write(tmp_path / "base.yaml", "SOLVER: {MAX_ITR: 1}")
    with pytest.raises(InputError, match=r"base\.yaml: unknown key"):
        load_config(cfg, write(tmp_path / "run.yaml", "_BASE_: base.yaml"), [])


def test_a_missing_file_is_named(cfg, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot read this config file: No such"):
        load_config(cfg, str(tmp_path / "nowhere.yaml"), [])


def test_an_empty_file_changes_nothing(cfg, tmp_path):
    before = cfg.clone()
    assert load_config(cfg, write(tmp_path / "run.yaml", "# nothing\n"), []) == before


def test_yaml_that_would_run_code_is_refused_and_does_not_run(cfg, tmp_path):
    trace = tmp_path / "trace"
    file = write(tmp_path / "run.yaml", f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{trace}']")
    with pytest.raises(InputError, match=r"run\.yaml.*line 1.*refused"):
        load_config(cfg, file, [])
    assert not trace.exists()


def test_detectron2s_own_config_is_merged_as_detectron2_does(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n  PIXEL_MEAN: [1.0, 2.0, 3.0]\n"
        "  RPN: {IN_FEATURES: ['p2', 'p3']}\nSOLVER:\n  STEPS: (5,)\n  MAX_ITER: 9\nVERSION: 2\n",
    )
    ours, theirs = get_cfg(), get_cfg()
    load_config(ours, file, ["INPUT.MIN_SIZE_TRAIN", "(640,)", "MODEL.MASK_ON", "True"])
    theirs.merge_from_file(file)
    theirs.merge_from_list(["INPUT.MIN_SIZE_TRAIN", "(640,)", "MODEL.MASK_ON", "True"])
    assert ours == theirs


class TestUnreadPaths:
    """No shell has read them: of YAML, of TOML, or quoted."""

    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("SCRATCH", "/scratch")
        monkeypatch.delenv("NOWHERE", raising=False)

    @pytest.fixture
    def paths(self):
        return CfgNode(
            {
                "OUTPUT_DIR": "",
                "DATA": {"IMAGES": "", "SHARDS": ""},
                "SETS": [],
                "_BASE_": "",
            }
        )

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("~/detector", "/home/me/detector"),
            ("$SCRATCH/detector", "/scratch/detector"),
            ("${SCRATCH}/a", "/scratch/a"),
            ("~", "/home/me"),
            ("plain/~x/5$", "plain/~x/5$"),
        ],
    )
    def test_variables_and_home_are_replaced_wherever_a_path_stands(
        self, paths, tmp_path, written, meant
    ):
        file = tmp_path / "a.yaml"
        file.write_text(f"OUTPUT_DIR: '{written}'\nDATA: {{IMAGES: '{written}'}}\n")
        cfg = load_config(paths, str(file), ["SETS", f"[['a', '{written}'], ['b']]"])
        assert (cfg.OUTPUT_DIR, cfg.DATA.IMAGES) == (meant, meant)
        assert cfg.SETS == [["a", meant], ["b"]]

    def test_a_variable_that_is_not_set_is_refused_by_key(self, paths):
        with pytest.raises(InputError, match=r"DATA.IMAGES: \$NOWHERE/x holds \$NOWHERE"):
            load_config(paths, None, ["DATA.IMAGES", "$NOWHERE/x"])
        with pytest.raises(InputError, match=r"SETS: \$\{NOWHERE\} holds"):
            load_config(paths, None, ["SETS", "['${NOWHERE}']"])

    def test_a_config_for_another_machine_and_commands_are_left_alone(self, paths):
        opts = ["OUTPUT_DIR", "$NOWHERE/x", "DATA.SHARDS", "pipe:cat $NOWHERE/x"]
        assert load_config(paths.clone(), None, opts, expand=False).OUTPUT_DIR == "$NOWHERE/x"
        assert load_config(paths, None, opts[2:]).DATA.SHARDS == "pipe:cat $NOWHERE/x"

    def test_files_are_found_by_them(self, paths, tmp_path, monkeypatch):
        monkeypatch.setenv("SCRATCH", str(tmp_path))
        (tmp_path / "base.yaml").write_text("OUTPUT_DIR: x\n")
        (tmp_path / "a.yaml").write_text("_BASE_: $SCRATCH/base.yaml\n")
        assert load_config(paths, "${SCRATCH}/a.yaml", []).OUTPUT_DIR == "x"
