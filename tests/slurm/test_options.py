"""Options from a site's file, a pipeline's and the command line; mistakes are named."""

import argparse
from pathlib import Path

import pytest

from virtex_d2.engine.errors import InputError
from virtex_d2.slurm.options import (
    FIELDS,
    JobOptions,
    add_arguments,
    array_numbers,
    given_options,
    make_options,
    read_pipeline,
    read_site,
    read_toml,
    site_file,
)

SITE = """
partition = "gpu"
gpus_per_node = 8
time = "24:00:00"
modules = ["cuda/12.4"]
[env]
NCCL_SOCKET_IFNAME = "ib0"
"""
PIPELINE = """
nodes = 2
time = "12:00:00"
[stages.pretrain]
nodes = 4
command = "tools/pretrain_net.py OUTPUT_DIR 'a b'"
[stages.export]
after = ["pretrain"]
gpus_per_node = 0
command = ["tools/convert_checkpoint.py", "a b/backbone.safetensors"]
[stages.finetune]
after = ["pretrain", "export"]
array = "1-3"
command = "tools/train_net.py SEED {array}"
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "file.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def _given(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return given_options(parser.parse_args(words))


def test_the_command_line_wins_over_the_sites_file_and_lists_add_up(write):
    site = read_site(write(SITE))
    given = _given("--partition", "debug", "--module", "nccl", "--env", "NCCL_DEBUG=INFO=x")
    options = make_options(site, given)
    assert (options.partition, options.time, options.num_gpus) == ("debug", "24:00:00", 8)
    assert options.modules == ["cuda/12.4", "nccl"]
    assert options.env == {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "INFO=x"}


def test_every_option_is_a_flag_and_a_key(write):
    words, lines = [], []
    values = {"gpus_per_node": "a100:4", "time": "1-12", "array": "0-3%2", "launcher": "torchrun"}
    values |= {"memory": "64G", "stop_before": "60"}
    for name, item in FIELDS.items():
        flag = "--" + (item.metadata["flag"] or name.replace("_", "-"))
        value = values.get(name, "7" if item.type is int else "text")
        if name == "env":
            words += [flag, "A=b"]
            lines.append('env = {A = "b"}')
        elif name != "venv":  # not with conda
            words += [flag, value]
            quoted = value if item.type is int else f'"{value}"'
            lines.append(f"{name} = [{quoted}]" if item.type is list else f"{name} = {quoted}")
    assert make_options(_given(*words)) == make_options(read_site(write("\n".join(lines))))


def test_the_sites_file_is_looked_for_in_the_users_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert read_site(None) == {}
    site_file().parent.mkdir()
    site_file().write_text('account = "vision"')
    assert read_site(None) == {"account": "vision"}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert site_file() == Path.home() / ".config" / "virtex_d2" / "slurm.toml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin = 'gpu'", "unknown key 'partitoin'. Did you mean 'partition'?"),
        ("nodes = '2'", "nodes: expected a whole number, found '2'"),
        ("nodes = true", "nodes: expected a whole number, found True"),
        ("time = 10:00:00", "time: expected a text in quotes, found datetime.time"),
        ("modules = 'cuda'", "modules: expected a list of texts, found 'cuda'"),
        ("env = ['A=b']", r"env: expected a table \[env\]"),
        ("nodes = 0", "nodes: expected 1 or more, found 0"),
        ("cpus_per_task = 0", "cpus_per_task: expected 1 or more, found 0"),
        ("modules = [1, 2]", "modules: expected a text in quotes, found 1"),
        ("time = 24", r"time: expected a text in quotes, found 24 \(limit of .* e.g. 24:00:00"),
        ("[env]\nA = 1.5", "env.A: expected a text in quotes, found 1.5"),
        ("partition = gpu", "expected a TOML file: .*line 1.*Strings need quotes"),
    ],
)
def test_a_mistake_in_the_sites_file_is_named_with_file_and_key(write, text, message):
    with pytest.raises(InputError, match=f"file.toml: {message}"):
        read_site(write(text))


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_site_file_that_is_absent_or_no_text_is_named(tmp_path, content):
    path = tmp_path / "site.toml"
    if content:
        path.write_bytes(content)
    with pytest.raises(
        InputError,
        match="site.toml(: expected a file|, line 1: expected UTF-8|: cannot be read: No such)",
    ):
        read_site(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus_per_node": ""}, "--gpus-per-node: expected a number such as 8 .* found ''"),
        ({"gpus_per_node": "8 of them"}, "--gpus-per-node"),
        ({"time": "1 day"}, "--time: expected .* found '1 day'"),
        ({"time": "2"}, "--stop-before 120: the time limit 2 is 120 seconds"),
        ({"time": "1-0", "stop_before": 90000}, "the time limit 1-0 is 86400 seconds"),
        ({"array": "0-"}, "--array: expected .* found '0-'"),
        ({"array": "5-1"}, "--array: expected .* found '5-1'"),
        ({"array": "1-5:0"}, "--array: expected .* found '1-5:0'"),
        ({"array": "1-5%0"}, "--array: expected .* found '1-5%0'"),
        ({"sbatch": ["time=1:00"]}, "--sbatch time=1:00: .* use --time"),
        ({"sbatch": ["--mem 64G"]}, "--sbatch --mem 64G: .* use --memory"),
        ({"sbatch": ["-N2"]}, "--sbatch -N2: .* use --nodes"),
        ({"sbatch": ["-D /tmp"]}, "--sbatch -D /tmp: the script asks for it already; leave it out"),
        (
            {"sbatch": ["gres=gpu:4"], "gpus_per_node": "8"},
            "--sbatch gres=gpu:4: contradicts --gpus-per-node 8",
        ),
        (
            {"sbatch": ["mem-per-cpu=4G"], "memory": "64G"},
            "--sbatch mem-per-cpu=4G: contradicts --memory 64G",
        ),
        ({"launcher": "mpirun"}, "--launcher: expected srun or torchrun, not mpirun"),
        ({"conda": "a", "venv": "b"}, "--conda and --venv"),
        ({"env": {"A-B": "x"}}, "--env: 'A-B' is no name"),
        ({"sbatch": ["a\nb"]}, "--sbatch: expected one line"),
        ({"modules": ["a\nb"]}, "--module: expected one line"),
    ],
)
def test_what_slurm_would_refuse_is_refused_before(change, message):
    with pytest.raises(InputError, match=message):
        JobOptions(**{"gpus_per_node": "0", **change})


@pytest.mark.parametrize(
    "options",
    [
        {"time": "0"},
        {"time": "UNLIMITED", "stop_before": 10**9},
        {"time": "2:01"},
        {"time": "1-0:0:1", "stop_before": 86400},
        {"memory": "500m"},
        {"memory": "0"},
        {"sbatch": ["gres=gpu:4,lic:1", "mem-per-cpu=4G", "no-requeue", "exclusive", "-x node7"]},
    ],
)
def test_what_slurm_takes_is_not_refused(options):
    assert JobOptions(**{"gpus_per_node": "0", **options})


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [("3", [3]), ("0-3%2", [0, 1, 2, 3]), ("7,1-5:2", [7, 1, 3, 5]), ("4-4", [4])],
)
def test_the_numbers_of_an_array(spec, numbers):
    assert list(array_numbers(spec)) == numbers


@pytest.mark.parametrize("flag", ["--nodes", "--tasks-per-node", "--cpus-per-task"])
def test_a_flags_number_below_one_is_refused(flag):
    with pytest.raises(InputError, match=f"{flag}: expected 1 or more, found 0"):
        _given(flag, "0")


def test_env_without_a_value_is_refused():
    with pytest.raises(InputError, match="--env HOME: expected NAME=VALUE"):
        _given("--env", "HOME")


def test_a_pipelines_stages_inherit_and_the_command_line_wins(write):
    site = {"gpus_per_node": "8", "partition": "gpu", "nodes": 1}
    stages = read_pipeline(write(PIPELINE), site, {"time": "00:10:00"})
    assert [stage.name for stage in stages] == ["pretrain", "export", "finetune"]
    assert [stage.options.nodes for stage in stages] == [4, 2, 2]
    assert [stage.options.num_gpus for stage in stages] == [8, 0, 8]
    assert {stage.options.time for stage in stages} == {"00:10:00"}
    assert {stage.options.partition for stage in stages} == {"gpu"}
    assert stages[0].command == ("tools/pretrain_net.py", "OUTPUT_DIR", "a b")
    assert [stage.after for stage in stages] == [(), ("pretrain",), ("pretrain", "export")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'after = ["pretrain"]',
            'after = "pretran"',
            "after: no stage 'pretran' stands",
        ),
        ('after = ["pretrain"]', 'after = ["finetune"]', "no stage 'finetune' stands before it"),
        ("nodes = 4", "nods = 4", "stage pretrain: unknown key 'nods'. Did you mean 'nodes'"),
        ("nodes = 4", "nodes = -4", "stage pretrain: nodes: expected 1 or more"),
        ("command = [", "comand = [", "stage export: unknown key 'comand'. Did you mean 'command'"),
        ("after = [", "afte = [", "stage export: unknown key 'afte'. Did you mean 'after'"),
        ("nodes = 2", "node = 2", "file.toml: unknown key 'node'"),
        ("'a b'", "'a b", "stage pretrain: command: No closing quotation"),
        ('SEED {array}"', 'SEED {array}"\n[stages.empty]', "stage empty: command: expected"),
        ("nodes = 2", "logs = 'x'", "file.toml: logs: one folder holds all stages"),
        ("[stages.export]", "[stages.'a/b']", "stage a/b: its name becomes a folder's"),
        ("[stages.", "[", "file.toml: unknown key 'pretrain'"),
        ("[stages.", "[stage.", "file.toml: unknown key 'stage'. Did you mean 'stages'"),
    ],
)
def test_a_mistake_in_a_pipeline_is_named_with_its_stage(write, old, new, message):
    assert old in PIPELINE
    with pytest.raises(InputError, match=message):
        read_pipeline(write(PIPELINE.replace(old, new)), {"gpus_per_node": "8"}, {})


def test_a_pipeline_without_stages_is_refused(write):
    with pytest.raises(InputError, match=r"expected stages, each as a table \[stages.NAME\]"):
        read_pipeline(write("nodes = 2"), {}, {})


def test_toml_is_read_as_it_is(write):
    assert read_toml(write('a = "é"')) == {"a": "é"}


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ("a100:1", 1),
        ("a100", 1),
        ("a100,h100:2", 3),
        ("nvidia_h100_nvl_1g.12gb:1", 1),
        ("1g.10gb:2", 2),
        ("v100-32g:4", 4),
        ("a100_3g.39gb:1,1g.5gb:4", 5),
        ("H200+:8", 8),
    ],
)
def test_gpu_types_are_as_slurms_configuration_has_them(asked, count):
    assert JobOptions(gpus_per_node=asked).num_gpus == count


@pytest.mark.parametrize("asked", ["a100:", ":2", "a100:two", "a b:2", "a=b:1", "1,"])
def test_what_is_no_number_of_gpus_is_refused(asked):
    with pytest.raises(InputError, match="--gpus-per-node: expected a number"):
        JobOptions(gpus_per_node=asked)


@pytest.mark.parametrize("limit", ["unlimited", "Infinite", "-1", "1:100:00", "100:30", "1-100"])
def test_time_limits_are_what_sbatch_takes(limit):
    assert JobOptions(gpus_per_node="0", time=limit, stop_before=1).time == limit
