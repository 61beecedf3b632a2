import io
import os
import subprocess
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from virtex_d2.engine.errors import InputError
from virtex_d2.engine.files import checksum_damage, save_with_checksum
from virtex_d2.engine.safe_load import read_checkpoint


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
