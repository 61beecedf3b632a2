import argparse
import collections
import contextlib
import copyreg
import gc
import io
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yacs.config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from virtex_d2.engine import bounded
from virtex_d2.engine.errors import InputError
from virtex_d2.engine.safe_load import read_checkpoint, read_tensors
from virtex_d2.engine.unpickling import Placeholder

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


def save_legacy(value, path, **options):
    torch.save(value, path, _use_new_zipfile_serialization=False, **options)


def state_dict():
    """A convolution with its norm: parameters, statistics, and a counter without axes."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    return model.state_dict()


def equal(found, expected):
    """Whether two nested values are the same, tensors bit for bit and of one dtype."""
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and (found.dtype, found.shape) == (expected.dtype, expected.shape)
            and bits(found) == bits(expected)
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(equal(found[k], expected[k]) for k in expected)
    if isinstance(expected, (list, tuple)):
        return (
            type(found) is type(expected)
            and len(found) == len(expected)
            and all(map(equal, found, expected))
        )
    return type(found) is type(expected) and found == expected


def bits(tensor):
    # Copied, because an axis of length 1 may have any stride, which view() does not take.
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return plain.flatten().view(torch.uint8).numpy().tobytes()


# --- files written by hand


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def body(value, protocol=2):
    """The instructions of a pickled value, without the first and the last one."""
    return pickle.dumps(value, protocol)[2:-1]


def beside_an_array(instructions, protocol=4):
    """A pickle of {"weight": array of three, "other": what the instructions build}."""
    array = body(np.arange(3, dtype=np.float32))
    content = b"}(" + text("weight") + array + text("other") + instructions + b"u"
    return b"\x80" + bytes([protocol]) + content + b"."


def write_zip(path, members, folder="archive", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{folder}/{name}", content)
    return path


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def storage(key="0", numel=3, kind="Float"):
    """Instructions that build a storage in torch's zip archives."""
    numel = b"\x8a\x08" + struct.pack("<q", numel)
    kind = f"ctorch\n{kind}Storage\n".encode()
    return b"(" + text("storage") + kind + text(key) + text("cpu") + numel + b"tQ"


def tensor(offset=0, size=(3,), stride=(1,), function="_rebuild_tensor_v2", storage=storage()):  # noqa: B008
    view = body(offset) + body(size) + body(stride)
    return f"ctorch._utils\n{function}\n".encode() + b"(" + storage + view + b"\x89}tR"


def zip_of(path, instructions, raw=np.arange(3, dtype=np.float32).tobytes(), **members):  # noqa: B008
    """A torch zip archive of {"weight": what the instructions build}, with one storage."""
    pickled = b"\x80\x02}" + text("weight") + instructions + b"s."
    return write_zip(path, {"data.pkl": pickled, "data/0": raw, **members})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.pth"


def refused(path, message):
    with pytest.raises(InputError, match=message) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


class TestFormats:
    @pytest.mark.parametrize(
        ("save", "name"), [(torch.save, "torch zip"), (save_legacy, "torch legacy")]
    )
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_torch_files_are_what_torch_loads(self, file, save, name, protocol):
        weight = torch.randn(4, 6)
        content = {
            "model": state_dict(),
            "dtypes": [torch.randn(5).mul(99).to(dtype) for dtype in DTYPES],
            "views": (weight, weight.T, weight[1:3, ::2], weight[0].expand(3, 6), weight[0, 0]),
            "empty": torch.zeros(2, 0, 3),
            "parameter": torch.nn.Parameter(weight),
            "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "plain": [1, 2**70, 0.5, 1 + 2j, None, True, "ü", b"\xff", (1, (2,)), [], {}],
            7: OrderedDict([((0, "a"), 1)]),
        }
        save(content, file, pickle_protocol=protocol)
        read = read_tensors(file)
        expected = torch.load(file, weights_only=False)
        expected[7] = dict(expected[7])
        expected["model"] = dict(expected["model"])
        assert equal(read.content, expected)
        assert (read.path, read.format, read.metadata, read.foreign) == (str(file), name, {}, ())

    def test_safetensors_are_what_the_library_reads(self, file):
        tensors = {str(dtype): torch.randn(2, 3).mul(99).to(dtype) for dtype in DTYPES[:-2]}
        tensors["empty"] = torch.zeros(0, 3)
        save_file(tensors, file, {"source": "test"})
        read = read_tensors(file)
        assert equal(read.content, {name: tensors[name] for name in read.content})
        assert read.content.keys() == tensors.keys()
        assert (read.format, read.metadata) == ("safetensors", {"source": "test"})

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_a_pickle_of_numpy_arrays_gives_tensors(self, file, protocol):
        arrays = {
            code: np.arange(6).reshape(2, 3).astype(code)
            for code in ("?", "u1", "u2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")
        }
        odd = {
            "of columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "big-endian": np.arange(6, dtype=">i4"),
            "no axes": np.array(5.0),
            "empty": np.zeros((0, 3)),
        }
        plain = {"scalar": np.float32(0.1), "count": np.int64(3), "flag": np.True_, "set": {1, 2}}
        file.write_bytes(pickle.dumps({**arrays, **odd, **plain}, protocol))
        read = read_tensors(file)
        assert (read.format, read.foreign) == ("pickle", ())
        for name, array in {**arrays, **odd}.items():
            native = array.astype(array.dtype.newbyteorder("="))
            assert equal(read.content[name], torch.from_numpy(native.copy(order="C")))
        assert {name: read.content[name] for name in plain} == {
            "scalar": float(np.float32(0.1)),
            "count": 3,
            "flag": True,
            "set": {1, 2},
        }

    @pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
    def test_a_pickle_of_python_2_is_read(self, file, module):
        # As Caffe2's model zoo has them: str is bytes, and so are the elements of an array.
        values = np.array([1.5, -2.0, 3e38], np.float32)
        raw = values.tobytes()
        array = (
            b"c"
            + module
            + b"\n_reconstruct\nq\x05(cnumpy\nndarray\nq\x06K\x00\x85q\x07U\x01bq\x08tq"
            b"\tRq\n(K\x01K\x03\x85q\x0bcnumpy\ndtype\nq\x0c(U\x02f4q\rK\x00K\x01tq\x0eRq\x0f(K\x03"
            b"U\x01<q\x10NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x11b\x89U\x0c"
            + raw
            + b"q\x12tb"
        )
        scalar = b"c" + module + b"\nscalar\n(h\x0fU\x04" + raw[:4] + b"tR"
        blobs = b"}q\x03(U\x07conv1_wq\x04" + array + b"U\x02lr" + scalar + b"u"
        old = b"c__builtin__\nset\n(]K\x01atRU\x03cfgU\x03\xe4\xf6\xfc"
        file.write_bytes(b"\x80\x02}q\x01(U\x05blobsq\x02" + blobs + b"U\x01s" + old + b"u.")
        read = read_tensors(file)
        assert equal(read.content["blobs"]["conv1_w"], torch.from_numpy(values))
        assert read.content["blobs"]["lr"] == 1.5
        assert (read.content["s"], read.content["cfg"]) == ({1}, "äöü")

    def test_a_pickle_of_python_2_in_ascii_is_read(self, file):
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntp3\nS'b'\np4\n"
            b"tp5\nRp6\n(I1\n(I2\ntp7\ncnumpy\ndtype\np8\n(S'f4'\np9\nI0\nI1\ntp10\nRp11\n(I3\nS'<'\n"
            b"p12\nNNNI-1\nI-1\nI0\ntp13\nbI00\nS'\\x00\\x00\\x80\\xbf\\x00\\x00\\x00@'\np14\ntp15\nb"
        )
        file.write_bytes(b"(dp0\nS'weight'\n" + array + b"sV\\u00fc\nF0.5\nsS'n'\nL7L\ns.")
        read = read_tensors(file).content
        assert equal(read, {"weight": torch.tensor([-1.0, 2.0]), "ü": 0.5, "n": 7})

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_a_pickle_of_torch_tensors_is_read(self, file, protocol):
        content = {
            "weight": torch.randn(2, 3),
            "half": torch.randn(4).half(),
            "view": torch.ones(5)[1:3],
        }
        file.write_bytes(pickle.dumps(content, protocol))
        assert equal(read_tensors(file).content, content)

    def test_the_name_of_the_file_says_nothing(self, tmp_path):
        for name, save in {
            "a.safetensors": torch.save,
            "b.pkl": save_legacy,
            "c": save_file,
        }.items():
            save({"weight": torch.ones(2)}, tmp_path / name)
            assert equal(read_tensors(str(tmp_path / name)).content, {"weight": torch.ones(2)})

    def test_dtypes_and_devices_are_names_and_containers_are_plain(self, file):
        values = {
            "dtype": torch.bfloat16,
            "device": torch.device("cuda", 1),
            "size": torch.Size([2, 3]),
            "counter": collections.Counter("aab"),
            "default": collections.defaultdict(list, a=[1]),
            "bytes": bytearray(b"ab"),
            "sets": [{1}, frozenset("a")],
        }
        torch.save({"weight": torch.ones(1), **values}, file)
        read = read_tensors(file).content
        del read["weight"]
        assert read == {
            "dtype": "torch.bfloat16",
            "device": "cuda:1",
            "size": (2, 3),
            "counter": {"a": 2, "b": 1},
            "default": {"a": [1]},
            "bytes": b"ab",
            "sets": [{1}, {"a"}],
        }
        assert type(read["counter"]) is type(read["default"]) is dict

    @pytest.mark.parametrize("save", [torch.save, save_legacy])
    def test_each_tensor_has_memory_of_its_own(self, file, save):
        weight = torch.arange(6.0)
        save({"a": weight, "b": weight, "c": weight[2:], "d": [weight.detach()] * 2}, file)
        read = read_tensors(file).content
        tensors = [read["a"], read["b"], read["c"], *read["d"]]
        for index, found in enumerate(tensors):
            found.fill_(index)
        assert [found.unique().item() for found in tensors] == [0, 1, 2, 3, 4]

    def test_tensors_have_no_gaps_and_no_gradient_and_stay_when_the_file_is_gone(self, file):
        values = torch.arange(6)
        content = {"a": torch.nn.Parameter(torch.ones(2, 3)), "b": values.view(2, 3).T}
        torch.save({**content, "c": values[::2]}, file)
        read = read_tensors(file).content
        file.write_bytes(b"")
        assert not any(found.requires_grad for found in read.values())
        assert read["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert [found.stride() for found in read.values()] == [(3, 1), (1, 3), (1,)]

    def test_a_state_dict_keeps_the_versions_of_its_modules(self, file):
        state = state_dict()
        torch.save({"model": state, "odd": {"_metadata": 1}}, file)
        assert read_tensors(file).content["model"]._metadata == dict(state._metadata)

    def test_a_tensor_with_attributes_is_read_without_them(self, file):
        weight = torch.ones(2)
        weight.note = "frozen"
        torch.save({"weight": weight}, file)
        assert equal(read_tensors(file).content, {"weight": torch.ones(2)})

    def test_a_16_bit_unsigned_tensor_is_read_in_both_formats_of_torch(self, file):
        content = {"weight": torch.arange(5).to(torch.uint16)}
        for save in (
            torch.save,
            save_legacy,
        ):  # torch itself does not load its legacy file of these
            save(content, file)
            assert equal(read_tensors(file).content, content)

    def test_an_archive_that_was_unpacked_and_packed_again_is_read(self, file):
        torch.save(state_dict(), file)
        expected, members = dict(torch.load(file)), members_of(file)
        write_zip(file, {"": b"", "data/": b"", **members}, folder="renamed")
        assert equal(read_tensors(file).content, expected)

    def test_an_archive_without_checksums_is_read(self, file):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(state_dict(), file)
        finally:
            torch.serialization.set_crc32_options(True)
        assert equal(read_tensors(file).content, dict(torch.load(file)))


tensors = st.builds(
    lambda dtype, shape, seed: (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype)
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
keys = (
    st.text(max_size=5)
    | st.integers(-(2**63), 2**64 - 1)
    | st.tuples(st.integers(0, 9), st.text("ab"))
)
contents = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


class TestAnyContent:
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(content=contents, protocol=st.sampled_from([2, 4, 5]), is_zip=st.booleans())
    def test_nested_values_come_back_as_they_were(self, tmp_path, content, protocol, is_zip):
        content = {"weight": torch.ones(1), "content": content}
        save = torch.save if is_zip else save_legacy
        save(content, tmp_path / "model.pth", pickle_protocol=protocol)
        assert equal(read_tensors(tmp_path / "model.pth").content, content)

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        size=st.lists(st.integers(0, 4), max_size=3),
        stride=st.lists(st.integers(0, 5), min_size=3, max_size=3),
        offset=st.integers(0, 8),
    )
    def test_a_view_is_torchs_or_is_refused(self, tmp_path, size, stride, offset):
        stride = stride[: len(size)]
        values = torch.arange(20.0)
        view = tensor(offset, tuple(size), tuple(stride), storage=storage(numel=20))
        path = zip_of(tmp_path / "model.pth", view, values.numpy().tobytes())
        if 0 in size or offset + sum((n - 1) * s for n, s in zip(size, stride)) < 20:
            expected = values.as_strided(size, stride, 0 if 0 in size else offset)
            assert equal(read_tensors(path).content["weight"], expected)
        else:
            refused(path, "reaches beyond")


class Odd:
    """Of this module, so that no other process has it."""

    def __init__(self):
        self.weights = [torch.ones(2)]

    def __setstate__(self, state):
        raise AssertionError("the state must not be set")

    def __reduce__(self):
        return Odd, (), {"a": 1}, iter([1, 2]), iter({"b": 2}.items())


class OddDict(OrderedDict):
    pass


class TestForeignObjects:
    @pytest.mark.parametrize("save", [torch.save, save_legacy])
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_they_are_replaced_and_named_and_the_tensors_are_read(self, file, save, protocol):
        config = yacs.config.CfgNode({"MODEL": {"DEPTH": 50}})
        state = OddDict(a=torch.ones(1))
        state.extra = {"b": 1}
        args = argparse.Namespace(lr=0.1, parent=None)
        args.parent = args  # contains itself
        foreign = {"args": args, "cfg": config, "odd": Odd(), "state": state, "cls": Odd}
        save({"model": {"weight": torch.ones(2)}, **foreign}, file, pickle_protocol=protocol)
        read = read_tensors(file)
        name = f"{__name__}.Odd"
        assert read.foreign == tuple(
            sorted(["argparse.Namespace", "yacs.config.CfgNode", name, f"{name}Dict"])
        )
        assert equal(read.content["model"], {"weight": torch.ones(2)})
        assert all(type(read.content[key]) is Placeholder for key in foreign)
        assert read.content["args"].name == "argparse.Namespace"

    def test_arrays_that_are_not_numbers_are_placeholders(self, file):
        arrays = {"names": np.array(["cat", "dog"]), "days": np.array(["2020-01-01"], "M8[D]")}
        file.write_bytes(
            pickle.dumps({"weight": np.ones(2), "rows": np.zeros(2, "i4,f4"), **arrays})
        )
        read = read_tensors(file)
        assert read.foreign == ("numpy.ndarray",)
        assert equal(read.content["weight"], torch.ones(2, dtype=torch.float64))

    @pytest.mark.parametrize("save", [torch.save, save_legacy])
    def test_a_pickled_model_is_refused_by_name_with_advice(self, file, save):
        save(torch.nn.Linear(2, 2), file)
        refused(file, r"found one object of torch\.nn\.modules\.linear\.Linear.*state_dict\(\)")
        save({"model": torch.nn.Linear(2, 2), "epoch": 3}, file)
        refused(
            file, r"found none, outside of .*\(torch\.nn\.modules\.linear\.Linear\).*Save the state"
        )

    def test_a_model_saved_before_torch_1_with_its_source_is_refused_by_name(self, file):
        pid = (
            b"(" + text("module") + b"cnet\nNet\n" + text("net.py") + text("class Net: ...") + b"tQ"
        )
        file.write_bytes(legacy(pid + b")\x81}b"))
        refused(file, r"found one object of net\.Net")

    @pytest.mark.parametrize("content", [{}, [], {"lr": 0.1}, "weights", 3])
    def test_a_file_without_tensors_is_refused(self, file, content):
        torch.save(content, file)
        refused(file, "expected tensors, found none. Save the state dict")

    def test_names_in_messages_are_short_and_printable(self, file):
        name = "\x1b[31m" + "x" * 5000
        file.write_bytes(b"\x80\x04" + text("evil\n") + text(name) + b"\x93)R.")
        with pytest.raises(InputError) as caught:
            read_tensors(file)
        assert len(str(caught.value)) < 500 + len(str(file))
        assert str(caught.value).isprintable()


def legacy(instructions, numels=b"\x80\x02].", raw=b"", sys_info=None):
    parts = (0x1950A86A20F9469CFC6C, 1001, sys_info or {"little_endian": True})
    start = b"".join(pickle.dumps(part, 2) for part in parts)
    return start + b"\x80\x02" + instructions + b"." + numels + raw


def hostile(canary):
    """Name -> instructions of a pickle that make `canary`, if what they say is done."""
    path, command = str(canary), f"mkdir {canary}"
    call = text(command) + b"\x85R"
    namespace = b"cargparse\nNamespace\n)\x81}"
    lazy = b"cbuiltins\nmap\n(cos\nmkdir\n(" + text(path) + b"lt"
    code = f"__import__('os').mkdir({path!r})"
    return {
        "REDUCE": b"cos\nsystem\n" + call,
        "eval": b"cbuiltins\neval\n" + text(code) + b"\x85R",
        "exec": b"cbuiltins\nexec\n" + text(code) + b"\x85R",
        "STACK_GLOBAL": text("posix") + text("system") + b"\x93" + call,
        "STACK_GLOBAL with dots": text("shutil") + text("os.system") + b"\x93" + call,
        "INST": b"(" + text(command) + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + text(command) + b"o",
        "NEWOBJ": b"cbuiltins\ntuple\n" + lazy + b"\x81\x85\x81",
        "NEWOBJ_EX": b"cbuiltins\ntuple\n" + lazy + b"}\x92\x85}\x92",
        "BUILD": namespace + text("__setstate__") + b"cos\nsystem\nsb" + text(command) + b"b",
        "APPEND": namespace + text("append") + b"cos\nsystem\nsb" + text(command) + b"a",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n"
        + text("os")
        + b"\x85R"
        + text("system")
        + b"tR"
        + call,
        "EXT": b"\x82\xf0" + call,
        "import": f"cevil_{canary.name}\nx\n".encode(),
        "load_from_bytes": b"ctorch.storage\n_load_from_bytes\nB"
        + struct.pack("<I", len(legacy(b"cos\nsystem\n" + call)))
        + legacy(b"cos\nsystem\n" + call)
        + b"\x85R",
        "tensor with attributes": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\n"
        b"Tensor\n" + text(command) + b"\x85}tR",
    }


NAMES = list(hostile(Path("x")))
# They call functions that stand in the tables, with arguments that are not theirs.
MISUSED = ("load_from_bytes", "tensor with attributes")
CONTROL = """
import copyreg, pickle, sys, torch
copyreg.add_extension("os", "system", 240)
for path in sys.argv[2:]:
    try:
        if sys.argv[1] == "zip":
            torch.load(path, weights_only=False)
        else:
            pickle.load(open(path, "rb"))
    except Exception as error:
        print(path, repr(error))
"""


@pytest.fixture(params=["pickle", "zip"], scope="module")
def hostile_files(request, tmp_path_factory):
    """A folder with a file for each of NAMES, whose canary it makes there, and the files' kind."""
    folder = tmp_path_factory.mktemp(request.param)
    for index, name in enumerate(NAMES):
        canary = folder / f"canary{index}"
        (folder / f"evil_{canary.name}.py").write_text(
            f"import os\nos.mkdir({str(canary)!r})\nx = 1\n"
        )
        instructions = hostile(canary)[name]
        if request.param == "pickle":
            (folder / f"{index}.pkl").write_bytes(beside_an_array(instructions))
        else:
            pickled = b"\x80\x04}(" + text("weight") + tensor() + text("x") + instructions + b"u."
            members = {"byteorder": b"little", "data/0": bytes(12), "version": b"3\n"}
            write_zip(folder / f"{index}.pkl", {"data.pkl": pickled, **members})
    return folder, request.param


class TestCodeInFiles:
    def test_pickle_would_run_it(self, hostile_files, run_python):
        folder, kind = hostile_files
        files = [folder / f"{index}.pkl" for index in range(len(NAMES))]
        path = os.pathsep.join([str(ROOT), str(folder)])
        result = run_python("-c", CONTROL, kind, *files, env={"PYTHONPATH": path})
        made = {name for index, name in enumerate(NAMES) if (folder / f"canary{index}").is_dir()}
        for canary in folder.glob("canary*"):
            canary.rmdir()
        assert made == set(NAMES), result.stdout + result.stderr

    @pytest.mark.parametrize("name", NAMES)
    def test_it_is_not_run(self, hostile_files, name, monkeypatch):
        folder, _ = hostile_files
        index = NAMES.index(name)
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        copyreg.add_extension("os", "system", 240)
        modules = set(sys.modules)
        try:
            if name in MISUSED:
                refused(folder / f"{index}.pkl", "damaged or cut short")
            else:
                read = read_tensors(folder / f"{index}.pkl")
                assert read.foreign
                assert read.content["weight"].shape == (3,)
        finally:
            copyreg.remove_extension("os", "system", 240)
        assert not (folder / f"canary{index}").exists()
        assert set(sys.modules) == modules

    def test_the_functions_that_stand_in_cannot_be_changed_by_a_pickle(self, file):
        # BUILD sets attributes, of functions too: all later files would be read otherwise.
        state = b"}" + text("__defaults__") + b")s"
        for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
            file.write_bytes(beside_an_array(target + b"N" + state + b"\x86b"))
            read_tensors(file)
        assert not hasattr(OrderedDict, "__defaults__")
        torch.save(state_dict(), file)
        assert len(read_tensors(file).content) == 6

    def test_an_extension_is_a_placeholder(self, file):
        file.write_bytes(beside_an_array(b"\x84\x00\x01\x00\x00)R"))
        assert read_tensors(file).foreign == ("copyreg.extension 256",)


class TestLies:
    """Numbers in files that do not fit their bytes."""

    @pytest.mark.parametrize(
        ("instructions", "message"),
        [
            (tensor(size=(4,)), "reaches beyond the 3 elements"),
            (tensor(offset=1), "reaches beyond"),
            (tensor(offset=2**62), "reaches beyond"),
            (tensor(size=(2, 2), stride=(2, 1)), "reaches beyond"),
            (tensor(size=(2,), stride=(2**62,)), "reaches beyond"),
            (tensor(offset=-1), "negative"),
            (tensor(stride=(-1,)), "negative"),
            (tensor(size=(-1,)), "other than counts"),
            (tensor(size=(2**31, 2**31), stride=(0, 0)), "more elements than fit"),
            (tensor(size=(0, 2**62), stride=(0, 0)), "more elements than fit"),
            (tensor(size=(1,) * 40, stride=(1,) * 40), "no shape"),
            (tensor(size=(True,)), "other than counts"),
            (tensor(size="a"), "no shape"),
            (tensor(size=(1.0,)), "other than counts"),
            (tensor(stride=()), "strides"),
            (tensor(size=(100_000, 100_000), stride=(0, 0)), "unfold to more than 64 MiB"),
            (tensor(storage=storage(numel=4)), "another number is announced"),
            (tensor(storage=storage(numel=-1)), "another number is announced"),
            (tensor(storage=storage(numel=2**62)), "another number is announced"),
            (tensor(storage=storage(key="1")), "no storage '1'"),
            (tensor(storage=storage(key="../data.pkl")), "no storage"),
            (tensor(storage=storage(kind="Quaternion")), r"torch\.QuaternionStorage"),
            (tensor(storage=b"N"), "without a storage"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n(tR", "arguments that it does not take"),
            (text("system") + b")R", "a call of a str"),
            (text("0") + b"Q", "something else than a storage"),
            (b"P0\n", "something else than a storage"),
        ],
    )
    def test_a_tensor_that_does_not_fit_its_storage_is_refused(self, file, instructions, message):
        refused(zip_of(file, instructions), message)

    def test_the_place_of_a_bad_tensor_is_named(self, file):
        inner = b"}" + text("conv.weight") + tensor(size=(9,)) + b"s"
        refused(zip_of(file, inner), r"at 'weight / conv\.weight': a tensor that reaches beyond")

    @pytest.mark.parametrize(
        ("code", "shape", "data", "message"),
        [
            ("f4", (4,), bytes(12), "of 12 bytes"),
            ("f4", (2**62,), bytes(12), "more elements than fit"),
            ("f4", (-1,), bytes(12), "other than counts"),
            ("f4", 3, bytes(12), "no shape"),
            ("f4", (3,), 12, "without bytes"),
            ("f4", (3,), "\u1234" * 12, "codec"),
            ("O8", (3,), [1, 2, 3], "an array of Python objects"),
            ("f16", (1,), bytes(16), "dtype 'f16'"),
            ("f4,f4", (1,), bytes(8), "dtype"),
            ("x", (1,), bytes(8), "dtype 'x'"),
            (None, (1,), bytes(2), r"dtype 'ml_dtypes\.bfloat16'"),
        ],
    )
    def test_an_array_that_does_not_fit_its_bytes_is_refused(
        self, file, code, shape, data, message
    ):
        code = text(code) if code else b"cml_dtypes\nbfloat16\n"
        dtype = b"cnumpy\ndtype\n" + code + b"\x85R(K\x03" + text("<") + b"NNNtb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nNNtR"
        state = b"(K\x01" + body(shape, 4) + dtype + b"\x89" + body(data, 4) + b"tb"
        file.write_bytes(beside_an_array(empty + state))
        refused(file, message)

    def test_members_of_a_zip_may_not_share_bytes_or_names(self, file):
        zip_of(file, tensor())
        content = file.read_bytes()
        offset = struct.pack("<I", content.index(b"archive/data/0") - 30)
        entry = content.rindex(b"archive/data.pkl") - 46  # its directory entry
        file.write_bytes(content[: entry + 42] + offset + content[entry + 46 :])
        refused(file, "in directory .* differ")
        file.write_bytes(content.replace(b"archive/data/0", b"archive/data.pkl"[:14]))
        refused(file, "model")
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("archive/data.pkl", b"\x80\x02}.")
        refused(file, "two members")

    def test_a_member_that_ends_in_another_is_refused(self, file):
        zip_of(file, tensor())
        content = file.read_bytes()
        entry = content.rindex(b"archive/data.pkl") - 46
        sizes = struct.pack("<II", 2**20, 2**20)
        file.write_bytes(content[: entry + 20] + sizes + content[entry + 28 :])
        refused(file, "longer than the file")

    def test_a_flipped_bit_in_a_zip_is_found_by_its_checksum(self, file):
        torch.save({"weight": torch.zeros(64)}, file)
        content = bytearray(file.read_bytes())
        content[content.index(bytes(256)) + 100] = 1
        file.write_bytes(content)
        refused(file, "at 'weight': Bad CRC-32")

    def test_a_compressed_archive_is_refused_before_it_is_unpacked(self, file):
        bomb = bytes(50 << 20)
        members = {"data.pkl": b"\x80\x02}" + text("w") + tensor() + b"s.", "data/0": bomb}
        write_zip(file, members, compression=zipfile.ZIP_DEFLATED)
        assert peak_of(lambda: refused(file, "compressed zip archive.*zip -0")) < 5 << 20

    @pytest.mark.parametrize("length", [0, 1, 7, 10**6, 2**32 - 1])
    def test_a_wrong_length_of_the_safetensors_header_is_refused(self, file, length):
        save_file({"weight": torch.ones(4)}, file)
        file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
        refused(file, "safetensors|damaged")

    @pytest.mark.parametrize(
        "header",
        [
            '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}',
            '{"a":{"dtype":"F32","shape":[4],"data_offsets":[8,0]}}',
            '{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,16]}}',
            '{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
            '{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            '{"a":{"dtype":"X32","shape":[4],"data_offsets":[0,16]}}',
            '{"a":' * 3000,
            '{"a":{"dtype":"F32","shape":[' + "1," * 40 + '4],"data_offsets":[0,16]}}',
            '{"__metadata__":{"a":1}}',
            "{",
        ],
    )
    def test_a_safetensors_header_that_lies_is_refused(self, file, header):
        header = header.encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        refused(file, "whole safetensors file|41 axes")

    def test_a_view_of_a_storage_in_a_legacy_file_is_what_torch_loads(self, file):
        # As torch wrote them until 0.4: the storage of a tensor is itself a part of another.
        part = storage(numel=5)[:-2] + b"(" + text("part") + body(2) + body(3) + b"ttQ"
        view = tensor(offset=1, size=(2,), storage=part)
        raw = struct.pack("<q5f", 5, *range(5))
        content = b"}" + text("weight") + view + b"s"
        sys_info = {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}
        file.write_bytes(legacy(content, pickle.dumps(["0"], 2), raw, sys_info))
        expected = torch.load(file, weights_only=False)
        assert expected["weight"].tolist() == [3, 4]
        assert equal(read_tensors(file).content, expected)

    def test_a_legacy_file_with_wrong_storages_is_refused(self, file):
        view = tensor(storage=storage()[:-2] + b"NtQ")
        keys, raw = pickle.dumps(["0"], 2), struct.pack("<q3f", 3, 1, 2, 3)
        content = b"}" + text("weight") + view + b"s"
        file.write_bytes(legacy(content, keys, raw))
        assert read_tensors(file).content["weight"].tolist() == [1, 2, 3]
        for bad_keys, bad_raw, message in [
            (keys, raw[:-1], "more bytes should follow"),
            (keys, struct.pack("<q3f", 2, 1, 2, 3), "another number"),
            (keys, struct.pack("<q3f", -1, 1, 2, 3), "more bytes should follow"),
            (keys, struct.pack("<q3f", 2**62, 1, 2, 3), "more bytes should follow"),
            (pickle.dumps([], 2), raw, "no storage '0'"),
            (pickle.dumps(["1"], 2), raw, "a storage that no tensor has"),
            (pickle.dumps(["0", "0"], 2), raw + raw, "twice"),
            (pickle.dumps(7, 2), raw, "no list of its storages"),
        ]:
            file.write_bytes(legacy(content, bad_keys, bad_raw))
            refused(file, message)

    @pytest.mark.parametrize("save", [torch.save, save_legacy, save_file])
    def test_a_truncated_file_is_refused_at_every_length(self, file, save):
        save({"a": torch.randn(20), "b": torch.ones(3, 3)}, file)
        self.truncate(file)

    def test_a_truncated_pickle_is_refused_at_every_length(self, file):
        file.write_bytes(pickle.dumps({"a": np.ones(20), "b": np.ones((3, 3))}, 2))
        self.truncate(file)

    def truncate(self, file):
        content = file.read_bytes()
        for part in range(50):
            file.write_bytes(content[: len(content) * part // 50])
            refused(file, "damaged|is empty|no format that is known")


def peak_of(function):
    """The most Python memory that a call takes beside what is there, in bytes."""
    gc.collect()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class TestBombs:
    @pytest.mark.parametrize(
        "instructions",
        [
            b"Nr\xff\xff\xff\xff",  # the memo's last index: Python's own machine fills all before
            b"\x95" + b"\xff" * 8,  # a frame
            b"\x8d" + struct.pack("<Q", 2**62),  # a text
            b"\x8e" + struct.pack("<Q", 2**40),  # bytes
            b"\x96" + struct.pack("<Q", 2**62),  # a bytearray
            b"B" + struct.pack("<I", 2**32 - 1),
            b"T" + struct.pack("<i", 2**31 - 1),
            b"T" + struct.pack("<i", -1),
            b"\x8b" + struct.pack("<i", 2**31 - 1),  # an integer
            b"\x8b" + struct.pack("<i", -5),
            b"Np" + b"9" * 4000 + b"\n",
            b"I" + b"9" * 100_000 + b"\n",
            b"L" + b"9" * 100_000 + b"L\n",
            b"F1e99999\n",
            b"S'\\x'\n",
            b"S'a\n",
        ],
    )
    def test_a_huge_length_or_index_takes_no_memory(self, file, instructions):
        file.write_bytes(beside_an_array(instructions))
        assert peak_of(lambda: self.read(file)) < 2 << 20

    def read(self, file):
        with contextlib.suppress(InputError):
            read_tensors(file)

    @pytest.mark.parametrize("depth", [90, 200, 300_000])
    @pytest.mark.parametrize("kind", ["list", "tuple", "dict", "state", "foreign"])
    def test_deep_nesting_is_read_or_refused(self, file, depth, kind):
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nNNtR"
        begin, end = {
            "list": (b"]", b"a"),
            "tuple": (b"", b"\x85"),
            "dict": (b"}N", b"s"),
            "state": (array + b"(NNNN", b"tb"),
            "foreign": (b"cx\ny\n", b"\x85R"),
        }[kind]
        if kind in ("state", "foreign"):
            depth = min(depth, 100_000)  # more instructions a level
        file.write_bytes(beside_an_array(begin * depth + b"N" + end * depth))
        if kind == "foreign" or (kind != "state" and depth == 90):
            assert read_tensors(file).content["weight"].shape == (3,)
        else:
            refused(file, "nested more than 100 deep|no shape|without bytes|without a dtype")

    def test_a_list_in_itself_is_refused(self, file):
        file.write_bytes(beside_an_array(b"]2a"))
        refused(file, "nested more than 100 deep")

    def test_lists_of_the_same_lists_are_refused_soon(self, file, monkeypatch):
        monkeypatch.setattr(bounded, "MAX_STEPS", 50_000)
        laughs = b"]q\x00" + b"".join(b"0(" + b"h\x00" * 10 + b"lq\x00" for _ in range(30))
        file.write_bytes(beside_an_array(laughs))
        refused(file, "more than 50000 values and instructions")

    @pytest.mark.parametrize(
        "key",
        [
            b"N" + b"\x85" * 200_000,  # its hash would overflow the stack
            b")q\x00" + b"0h\x00h\x00\x86q\x00" * 60,  # 2**60 parts
            b"(" + b"N" * 1000 + b"t",
            b"\x8a\x09" + b"\x01" * 9,  # could be made to collide
            b"]",
            b"}",
            b"\x8f",
        ],
    )
    @pytest.mark.parametrize(
        "use", [b"}%sNs", b"\x8f(%s\x90", b"(%s\x91", b"cbuiltins\nset\n(%sltR"]
    )
    def test_a_key_that_is_not_safe_to_hash_is_refused(self, file, key, use):
        if use.endswith(b"ltR"):
            use = b"cbuiltins\nset\n((%sl\x85R".replace(b"((", b"(")
        file.write_bytes(beside_an_array(use % key))
        refused(file, "as a key")

    def test_copies_of_one_text_or_tensor_are_limited(self, file):
        many = b"c_codecs\nencode\nq\x02" + text("x" * 10**7) + text("latin1") + b"\x86q\x03"
        file.write_bytes(beside_an_array(b"(" + many + b"h\x02h\x03R" * 30 + b"l"))
        assert peak_of(lambda: refused(file, "unfold to more than 102 MiB")) < 150 << 20
        copies = b"(" + tensor() + b"q\x07" + b"h\x07" * 200_000 + b"l"
        refused(zip_of(file, copies), "unfold to more than 65 MiB")
        large = (
            b"("
            + tensor(storage=storage(numel=10**6), size=(10**6,))
            + b"q\x07"
            + b"h\x07" * 30
            + b"l"
        )
        refused(zip_of(file, large, bytes(4 * 10**6)), "unfold to more than 79 MiB")

    def test_a_pickle_of_endless_instructions_is_refused(self, file, monkeypatch):
        monkeypatch.setattr(bounded, "MAX_STEPS", 50_000)
        file.write_bytes(b"\x80\x02" + b"N0" * 30_000 + b".")
        refused(file, "more than 50000")

    def test_memory_is_about_the_size_of_the_file(self, file):
        weights = {str(index): np.random.default_rng(0).random(2**18) for index in range(8)}
        size = 8 * 2**21
        file.write_bytes(pickle.dumps(weights, 4))
        assert peak_of(lambda: read_tensors(file)) < 2.5 * size
        file.write_bytes(pickle.dumps(weights, 2))  # bytes as text, and more memory meanwhile
        assert peak_of(lambda: read_tensors(file)) < 5 * size


class TestOtherFiles:
    def test_a_missing_file_and_a_folder_are_named(self, tmp_path):
        refused(tmp_path / "absent", "expected a file, found nothing there")
        refused(tmp_path, "expected a file, found a folder there")

    def test_a_file_that_may_not_be_read_is_named(self, file, monkeypatch):
        file.write_bytes(b"x")

        def forbidden(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", forbidden)
        refused(file, "cannot be read: Permission denied")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"<!DOCTYPE html><html>", "a web page.*download failed"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"\x1f\x8b\x08\x00", "a gzip archive"),
            (b"\x93NUMPY\x01\x00", "a single numpy array"),
            (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
            (b"GGUF\x03\x00", "a GGUF file"),
            (b"{}", "no format that is known"),
            (b"MODEL:\n  DEPTH: 50\n", "no format that is known"),
            (b"\x80\x09N.", "pickle protocol: 9"),
            (b"\x80\x04\xff", "no sense in its pickle"),
            (b"\x80\x05\x97.", "out-of-band data"),
            (b"\x80\x02.", "no sense in its pickle"),
            (b"\x80\x02h\x01.", "Memo value not found"),
            (b"\x80\x02t.", "no sense in its pickle"),
            (b"\x80\x02K\x01Q.", "refers to data outside"),
            (b"\x80\x02K\x01K\x02a.", "'int' object has no attribute"),
            (b"\x80\x02}(K\x02u.", "keys and values"),
            (b"\x80\x02K\x01K\x02\x93.", "requires str"),
            (b"\x80\x02U\x05ab", "more bytes should follow"),
            (b"PK\x03\x04 and so on", "torch zip file.*not a zip file"),
        ],
    )
    def test_what_it_is_is_said(self, file, content, message):
        file.write_bytes(content)
        refused(file, message)

    def test_other_archives_are_named(self, file):
        np.savez(io.BytesIO(), a=np.ones(1))
        with open(file, "wb") as stream:
            np.savez(stream, a=np.ones(1))
        refused(file, "npz archive of numpy")
        write_zip(file, {"readme": b"hello"})
        refused(file, "without one data.pkl")
        write_zip(file, {"data.pkl": b"\x80\x02}.", "code/a.py": b"", "constants.pkl": b""})
        refused(file, r"TorchScript archive.*torch\.jit\.load\(path\)\.state_dict\(\)")

    def test_a_tar_of_the_first_torch_is_named(self, file):
        import tarfile

        with tarfile.open(file, "w") as archive:
            archive.addfile(tarfile.TarInfo("sys_info"))
        refused(file, "tar archive, as torch.save wrote before 2017")

    @pytest.mark.parametrize("save", [torch.save, save_legacy])
    def test_kinds_of_tensors_that_are_not_read_are_named(self, file, save):
        weight = torch.ones(2, 2)
        kinds = {
            "float8_e4m3fn": weight.to(torch.float8_e4m3fn),
            "a sparse tensor": weight.to_sparse(),
            "a tensor of the meta device": weight.to("meta"),
            "conjugated": (weight + 1j).conj(),
        }
        for message, value in kinds.items():
            save({"weight": value}, file)
            refused(file, message)
        save_file({"weight": weight.to(torch.float8_e5m2)}, file)
        refused(file, "'weight' is a tensor of torch.float8_e5m2")

    def test_a_quantized_tensor_is_named(self, file):
        pickled = tensor(storage=storage(kind="QInt8"))
        refused(zip_of(file, pickled), r"torch\.QInt8Storage.*dequantize")

    def test_big_endian_files_are_named(self, file):
        refused(zip_of(file, tensor(), byteorder=b"big"), "little-endian")
        file.write_bytes(legacy(b"}", sys_info={"little_endian": False}))
        refused(file, "big-endian")
        zip_of(file, tensor(), byteorder=b"little")
        assert read_tensors(file).content["weight"].tolist() == [0, 1, 2]


def test_a_bare_tensor_is_no_checkpoint_of_a_run(file):
    torch.save(torch.ones(2), file)
    with pytest.raises(InputError, match="expected a checkpoint .* found a Tensor"):
        read_checkpoint(file)


def test_arrays_of_text_may_be_left_out_of_a_model_zoos_pickle_only(file):
    content = {"weight": np.ones(2), "names": np.array(["cat"])}
    file.write_bytes(pickle.dumps(content))
    assert read_checkpoint(file)["weight"].tolist() == [1, 1]
    torch.save(content, file)
    with pytest.raises(InputError, match=r"holds Python objects \(numpy.ndarray\)"):
        read_checkpoint(file)
