import hashlib
import io
import os
import signal
import subprocess
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import (
    atomic_path,
    checksum_damage,
    read_safetensors,
    read_text,
    save_with_checksum,
    sha256,
    write_safetensors,
)
from virtex_d2.engine.safe_load import read_checkpoint


class TestAtomicPath:
    def test_the_file_appears_whole_under_its_name(self, tmp_path):
        dest = tmp_path / "new" / "folder" / "table.json"
        with atomic_path(dest) as temporary:
            assert temporary.parent == dest.parent
            assert temporary.suffix == ".json"
            temporary.write_text("[1]")
            assert not dest.exists()
        assert dest.read_text() == "[1]"
        assert os.listdir(dest.parent) == ["table.json"]

    @pytest.mark.parametrize("before", [None, "old"])
    @pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
    def test_a_failure_leaves_what_was_there_and_no_other_file(self, tmp_path, before, failure):
        dest = tmp_path / "file.txt"
        if before:
            dest.write_text(before)
        with pytest.raises(failure), atomic_path(dest) as temporary:
            temporary.write_text("half")
            raise failure
        assert os.listdir(tmp_path) == (["file.txt"] if before else [])
        assert not before or dest.read_text() == before

    def test_a_body_that_writes_nothing_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file.txt"):
            pass
        assert os.listdir(tmp_path) == []

    def test_others_may_read_the_file_as_the_umask_says(self, tmp_path):
        with atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("x")
        (tmp_path / "plain.txt").write_text("x")
        modes = {(tmp_path / name).stat().st_mode for name in ("file.txt", "plain.txt")}
        assert len(modes) == 1

    def test_a_process_killed_while_writing_leaves_the_old_file(self, tmp_path, run_python):
        dest = tmp_path / "file.txt"
        dest.write_text("old")
        script = (
            "import os, signal, sys\n"
            "from virtex_d2.engine.files import atomic_path\n"
            "with atomic_path(sys.argv[1]) as temporary:\n"
            "    temporary.write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        result = run_python("-c", script, dest)
        assert result.returncode == -signal.SIGKILL
        assert dest.read_text() == "old"


class TestSafetensors:
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        shapes=st.dictionaries(
            st.text("abc.0", min_size=1, max_size=6),
            st.lists(st.integers(0, 3), max_size=3),
            min_size=1,
        ),
        metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    )
    def test_what_is_written_is_read_back(self, tmp_path, shapes, metadata):
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        path = tmp_path / "file.safetensors"
        write_safetensors(path, tensors, metadata)
        read, read_metadata = read_safetensors(path)
        assert read_metadata == metadata
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)

    def test_a_transposed_tensor_and_a_parameter_are_written_by_their_values(self, tmp_path):
        weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        path = tmp_path / "file.safetensors"
        write_safetensors(path, {"weight": weight.T}, {})
        read, _ = read_safetensors(path)
        assert torch.equal(read["weight"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))

    def test_a_file_without_metadata_has_empty_metadata(self, tmp_path):
        save_file({"weight": torch.ones(1)}, tmp_path / "file.safetensors")
        assert read_safetensors(tmp_path / "file.safetensors")[1] == {}

    @pytest.mark.parametrize("kept", [0, 4, 20, -1])
    def test_a_truncated_file_is_named(self, tmp_path, kept):
        path = tmp_path / "backbone.safetensors"
        write_safetensors(path, {"weight": torch.ones(64)}, {"source": "test"})
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(InputError, match=r"backbone\.safetensors.*truncated"):
            read_safetensors(path)

    def test_a_torch_checkpoint_by_that_name_is_refused(self, tmp_path):
        path = tmp_path / "renamed.safetensors"
        torch.save({"weight": torch.ones(2)}, path)
        with pytest.raises(InputError, match="another format"):
            read_safetensors(path)

    def test_a_missing_file_and_a_folder_are_named(self, tmp_path):
        with pytest.raises(InputError, match=r"absent: expected a file, found nothing"):
            read_safetensors(tmp_path / "absent")
        with pytest.raises(InputError, match="found a folder"):
            read_safetensors(tmp_path)


def test_sha256_is_that_of_the_bytes(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_can_be_read_by_those_who_can_read_any_other(tmp_path):
    """safetensors writes for its user alone; a backbone file is for colleagues."""
    (tmp_path / "any").touch()
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_binary_file_in_place_of_text_is_told_from_one_in_another_encoding(tmp_path):
    path = tmp_path / "captions.json"
    path.write_bytes(b"PK\x03\x04\0\0\xff\n")
    with pytest.raises(InputError, match="expected text in UTF-8, found a binary file"):
        read_text(path)
    for encoding in ("latin-1", "utf-16"):
        path.write_text('["caf\u00e9"]', encoding=encoding)
        with pytest.raises(InputError, match="line 1: expected UTF-8.*iconv"):
            read_text(path)


def state():
    weights = torch.arange(40.0)
    return {
        "model": OrderedDict(weight=weights, part=weights[3:5], half=torch.ones(3).bfloat16()),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(7)}}, "lr": [0.1]},
        "iteration": 3,
    }


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    save_with_checksum(state(), path)
    return path


def flip_a_byte_of_a_tensor(content: bytes) -> bytes:
    place = content.index(torch.arange(40.0).numpy().tobytes()) + 7
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


def test_torch_loads_a_flipped_byte_without_a_word_and_the_checksum_tells(file, tmp_path):
    """Why there is a checksum. Should torch have begun to check its own, this test will say so."""
    damaged = tmp_path / "model.pth"
    damaged.write_bytes(flip_a_byte_of_a_tensor(file.read_bytes()))
    assert not equal(torch.load(damaged, weights_only=True), state())
    assert "not what was written" in checksum_damage(damaged)
    with pytest.raises(InputError, match=r"model\.pth.*damaged: its content is not what was"):
        read_checkpoint(damaged)


def test_a_file_with_a_checksum_is_one_of_torchs(file):
    assert checksum_damage(file) == ""
    assert equal(read_checkpoint(file), state())
    for options in ({}, {"mmap": True}, {"weights_only": True}):
        assert equal(torch.load(file, **options), state())
    assert equal(torch.load(io.BytesIO(file.read_bytes())), state())
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"virtex_d2 sha256=")
    torch_alone = io.BytesIO()
    torch.save(state(), torch_alone)
    assert file.stat().st_size == len(torch_alone.getvalue()) + 81


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_bytes_change_it_is_found_or_changes_nothing(file, data):
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "zeros", "random", "cut", "lengthen"]))
    start = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[start] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[start:]
    elif kind == "lengthen":
        content += data.draw(st.binary(min_size=1, max_size=200))
    else:
        size = data.draw(st.integers(1, 600))
        new = bytes(size) if kind == "zeros" else data.draw(st.binary(min_size=size, max_size=size))
        content[start : start + size] = new[: len(content) - start]
    damaged = file.with_name("damaged.pth")
    damaged.write_bytes(content)
    if not checksum_damage(damaged):
        try:
            loaded = read_checkpoint(damaged)
        except InputError:
            return
        assert equal(loaded, state())


def test_a_file_of_stock_detectron2_is_checked_by_its_records(tmp_path):
    path = tmp_path / "stock.pth"
    torch.save(state(), path)
    assert checksum_damage(path) is None
    path.write_bytes(flip_a_byte_of_a_tensor(path.read_bytes()))
    with pytest.raises(InputError, match=r"stock\.pth.*Bad CRC-32 for file 'stock/data/0'"):
        read_checkpoint(path)


def test_a_file_from_before_torch_1_6_has_no_checksum_and_is_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    assert checksum_damage(path) is None
    assert equal(read_checkpoint(path), state())


def test_what_cannot_be_read_is_told(tmp_path):
    assert "No such file" in checksum_damage(tmp_path / "absent.pth")
    (tmp_path / "empty.pth").touch()
    assert checksum_damage(tmp_path / "empty.pth") == "it is empty"


@pytest.mark.skipif(not os.path.exists("/usr/bin/unzip"), reason="no unzip")
def test_unzip_can_check_a_checkpoint_where_there_is_no_python(file):
    assert subprocess.run(["/usr/bin/unzip", "-tq", file], check=False).returncode == 0
