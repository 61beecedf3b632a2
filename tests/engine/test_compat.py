"""Each bridge where it is needed and where it is not.

Tests in this process see what every other test sees: the bridges applied to the installed
detectron2. What needs a different environment runs in a process of its own.
"""

import json
import os
import pickle
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# detectron2 as its newer official build looks to the bridges: compiled, with none of v0.6's breaks.
NEWER_OFFICIAL = {
    "__init__.py": "__version__ = '0.6'",
    "_C.py": "COMPILED = True",
    "engine/__init__.py": "from .defaults import create_ddp_model",
    "engine/hooks.py": """
        class LRScheduler:
            def __init__(self, optimizer=None, scheduler=None):
                self.scheduler = scheduler
            def state_dict(self):
                return self.scheduler.state_dict()
    """,
    "engine/defaults.py": """
        def create_ddp_model(model, **kwargs):
            return kwargs
    """,
    "data/__init__.py": "",
    "data/common.py": """
        class MapDataset:
            def __init__(self, dataset, map_func):
                self.samples = [sample for sample in map(map_func, dataset) if sample]
            def __getitem__(self, index):
                return self.samples[index]
    """,
    "evaluation/__init__.py": "",
    "evaluation/coco_evaluation.py": """
        class COCOeval: pass
        class COCOeval_opt(COCOeval): pass
    """,
}


@pytest.fixture
def run(run_python):
    """Runs code in a fresh process, with an optional folder first on the path; gives its stdout."""

    def run(code, first_on_path=None):
        path = os.pathsep.join(map(str, filter(None, [first_on_path, ROOT])))
        result = run_python("-W", "ignore", "-c", textwrap.dedent(code), env={"PYTHONPATH": path})
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run


def write_package(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    return folder


def test_importing_the_package_imports_nothing_heavy(run):
    loaded = run(
        "import sys, virtex_d2; print({'torch', 'numpy', 'detectron2'} & set(sys.modules))"
    )
    assert loaded == "set()"


def test_without_detectron2_the_import_says_how_to_install_it(run_python):
    code = "import sys; sys.modules['detectron2'] = None; import virtex_d2"
    result = run_python("-c", code)
    assert result.returncode == 1
    for advice in ("make environment", "tools/install_detectron2.sh", "docs/install.md"):
        assert advice in result.stderr
    for file in ("Makefile", "tools/install_detectron2.sh", "docs/install.md"):
        assert (ROOT / file).exists()


def test_a_folder_that_is_only_called_detectron2_is_not_taken_for_it(run_python, tmp_path):
    (tmp_path / "detectron2").mkdir()
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    # -S: without site-packages, where a real detectron2 would come first.
    result = run_python("-S", "-c", "import virtex_d2", env={"PYTHONPATH": path})
    assert result.returncode == 1
    assert f"only a folder of that name, {tmp_path / 'detectron2'}" in result.stderr


def test_a_second_apply_changes_nothing(run):
    run("""
        import sys, numpy, virtex_d2
        from virtex_d2.engine import compat
        finders, applied, init = list(sys.meta_path), list(compat.applied), numpy.float
        compat.apply()
        assert (finders, applied, init) == (sys.meta_path, compat.applied, numpy.float)
    """)


def test_every_bridge_has_a_name_of_its_own_and_a_reason():
    from virtex_d2.engine.compat import BRIDGES

    assert len({bridge.name for bridge in BRIDGES}) == len(BRIDGES)
    assert all(len(bridge.reason) > 40 for bridge in BRIDGES)


def test_nothing_of_detectron2_is_touched_where_it_is_the_newer_official_build(run, tmp_path):
    write_package(tmp_path / "detectron2", NEWER_OFFICIAL)
    write_package(tmp_path, {"pkg_resources.py": "REAL = True"})
    run(
        """
        import numpy, PIL.Image
        for name in ("bool", "int", "float", "str", "object"):
            setattr(numpy, name, __builtins__.__dict__[name])
        PIL.Image.LINEAR = 2
        import virtex_d2
        from virtex_d2.engine import compat
        import detectron2.engine.hooks, detectron2.data.common
        from detectron2.evaluation import coco_evaluation
        from detectron2 import _C
        import pkg_resources, torch
        # Those that every version needs, of modules that were imported.
        every = ["caffe2", "torch warnings", "distributed CPU models"]
        assert compat.applied == every, compat.applied
        assert _C.COMPILED and compat.has_compiled_ops() and pkg_resources.REAL
        assert coco_evaluation.COCOeval_opt is not coco_evaluation.COCOeval
        assert torch.optim.lr_scheduler._LRScheduler is not torch.optim.lr_scheduler.LRScheduler
    """,
        first_on_path=tmp_path,
    )


def test_importing_detectron2_prints_no_warnings_of_torch_jit(run_python):
    result = run_python("-c", "import virtex_d2, detectron2.modeling")
    assert result.returncode == 0
    assert "torch.jit" not in result.stderr


class TestCompiledOps:
    def test_a_missing_extension_imports_and_says_on_use_what_is_missing(self, run):
        run("""
            import virtex_d2, importlib.util
            from virtex_d2.engine import compat
            assert not compat.has_compiled_ops()
            from detectron2 import _C
            import detectron2._C
            assert "compiled ops" in compat.applied
            assert _C.get_compiler_version() == _C.get_cuda_version() == "not compiled"
            assert not _C.has_cuda() and not hasattr(_C, "__file__")
            assert importlib.util.find_spec("detectron2._C") is not None
            try:
                _C.deform_conv_forward(1, 2)
            except NotImplementedError as error:
                assert "deform_conv_forward" in str(error) and "official build" in str(error)
            else:
                raise SystemExit("nothing raised")
        """)

    def test_a_compiled_extension_is_never_shadowed(self, run, tmp_path):
        write_package(tmp_path / "detectron2", NEWER_OFFICIAL)
        run(
            """
            import sys, virtex_d2
            from virtex_d2.engine import compat
            assert compat.has_compiled_ops() and "detectron2" not in sys.modules
            import detectron2._C
            assert detectron2._C.__file__.endswith("_C.py") and compat.has_compiled_ops()
        """,
            first_on_path=tmp_path,
        )

    def test_a_compiled_extension_that_does_not_load_is_not_hidden(self, run, tmp_path):
        broken = {**NEWER_OFFICIAL, "_C.py": "raise ImportError('undefined symbol: _ZN3c10')"}
        write_package(tmp_path / "detectron2", broken)
        message = run(
            """
            import virtex_d2
            try:
                from detectron2 import _C
            except ImportError as error:
                print(error)
        """,
            first_on_path=tmp_path,
        )
        assert message == "undefined symbol: _ZN3c10"


class TestExport:
    def test_it_imports_without_caffe2_and_what_needs_that_says_so(self):
        from detectron2.export import Caffe2Tracer, TracingAdapter, export_onnx_model

        assert TracingAdapter.__module__ == "detectron2.export.flatten"
        for gone in (Caffe2Tracer, export_onnx_model):
            with pytest.raises(NotImplementedError, match="needs caffe2.*TracingAdapter"):
                gone(None, None, None)


def test_a_lazy_config_is_told_as_python_without_a_formatter():
    import sys

    from detectron2.config import LazyCall, LazyConfig
    from omegaconf import OmegaConf

    cfg = OmegaConf.create({"layer": LazyCall(torch.nn.Linear)(in_features=3, out_features=4)})
    told = LazyConfig.to_py(cfg)
    assert told.replace(" ", "").strip() == (
        "cfg.layer=torch.nn.Linear(in_features=3,out_features=4)"
    )
    assert "black" not in sys.modules


@pytest.mark.parametrize("cut", [500, 120])
def test_a_cropped_polygon_begins_where_it_began(cut):
    import numpy as np
    from fvcore.transforms.transform import CropTransform

    corners = np.array([[91, 46], [144, 46], [144, 111], [91, 111]])
    for first in range(4):
        given = np.roll(corners, -first, axis=0)
        (found,) = CropTransform(50, 20, cut, 500).apply_polygons([given])
        assert found.shape == (4, 2)
        right = min(144 - 50, cut)
        wanted = {(41, 26), (right, 26), (right, 91), (41, 91)}
        assert {tuple(point) for point in found.tolist()} == wanted
        begins = tuple(given[0] - [50, 20])
        assert begins not in wanted or tuple(found[0]) == begins


class TestPkgResources:
    def test_the_model_zoo_finds_its_configs(self, run):
        run("""
            import virtex_d2, importlib.util
            from detectron2 import model_zoo
            path = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
            assert open(path).read().startswith("_BASE_")
            assert importlib.util.find_spec("pkg_resources") is not None
        """)

    def test_an_installed_one_is_used(self, run, tmp_path):
        write_package(tmp_path, {"pkg_resources.py": "REAL = True"})
        run(
            """
            import virtex_d2, pkg_resources
            from virtex_d2.engine import compat
            assert pkg_resources.REAL and "pkg_resources" not in compat.applied
        """,
            first_on_path=tmp_path,
        )


class TestNumpyAliases:
    def test_removed_aliases_are_back_and_existing_ones_stay(self, run):
        run("""
            import numpy
            existing = numpy.bool if "bool" in vars(numpy) else bool
            import virtex_d2
            from virtex_d2.engine import compat
            assert (numpy.int, numpy.float, numpy.str, numpy.object) == (int, float, str, object)
            assert numpy.bool is existing
            assert "numpy aliases" in compat.applied
        """)

    def test_numpy_imported_afterwards_is_bridged_too(self, run):
        run("""
            import sys, virtex_d2
            assert "numpy" not in sys.modules
            import numpy
            assert numpy.float is float
        """)

    def test_aliases_that_are_there_stay_as_they_are(self, run):
        run("""
            import numpy
            marks = {name: object() for name in ("bool", "int", "float", "str", "object")}
            vars(numpy).update(marks)
            import virtex_d2
            from virtex_d2.engine import compat
            assert all(getattr(numpy, name) is mark for name, mark in marks.items())
            assert "numpy aliases" not in compat.applied
        """)


class TestPillow:
    @pytest.mark.parametrize("order", ["PIL.Image, virtex_d2", "virtex_d2, PIL.Image"])
    def test_the_old_name_of_bilinear_is_back(self, run, order):
        run(f"""
            import {order}
            assert PIL.Image.LINEAR == PIL.Image.BILINEAR
        """)

    def test_a_name_that_is_there_stays(self, run):
        run("""
            import PIL.Image
            PIL.Image.LINEAR = "own"
            import virtex_d2
            assert PIL.Image.LINEAR == "own"
        """)


@pytest.mark.parametrize("kind", ["torch", "detectron2"])
def test_the_position_of_a_schedule_is_restored(kind):
    from detectron2.engine import hooks
    from detectron2.solver import LRMultiplier
    from fvcore.common.param_scheduler import LinearParamScheduler

    def scheduler():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        if kind == "torch":
            return torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return LRMultiplier(optimizer, LinearParamScheduler(1, 0), max_iter=9)

    stopped, resumed = scheduler(), scheduler()
    stopped.optimizer.step()
    stopped.step()
    state = hooks.LRScheduler(scheduler=stopped).state_dict()
    hooks.LRScheduler(scheduler=resumed).load_state_dict(state)
    assert resumed.last_epoch == 1


def keep_odd(number):
    return number if number % 2 else None


def test_a_record_that_the_mapper_skips_is_replaced_by_another():
    from detectron2.data.common import MapDataset

    dataset = MapDataset(list(range(20)), keep_odd)
    for candidate in (dataset, pickle.loads(pickle.dumps(dataset))):  # a worker gets a pickled one
        assert candidate[7] == 7
        assert all(candidate[index] % 2 == 1 for index in range(20))


def test_the_default_coco_evaluator_evaluates_without_compiled_ops(tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    box = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
    truth = {
        "info": {},
        "images": [{"id": 1, "file_name": "1.jpg", "height": 50, "width": 50}],
        "categories": [{"id": 1, "name": "circle"}],
        "annotations": [{"id": 1, **box}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    name = "truth of test_compat"
    register_coco_instances(name, {}, str(tmp_path / "truth.json"), str(tmp_path))
    try:
        DatasetCatalog.get(name)
        evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=str(tmp_path))
        evaluator.reset()
        found = Instances((50, 50))
        found.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 30.0, 30.0]]))
        found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(("device", "device_ids"), [("cpu", None), ("meta", [1])])
def test_only_a_model_on_a_cpu_is_distributed_without_device_ids(monkeypatch, device, device_ids):
    from detectron2.engine import create_ddp_model, defaults
    from detectron2.utils import comm

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 1)
    monkeypatch.setattr(defaults, "DistributedDataParallel", lambda model, **kwargs: kwargs)
    kwargs = create_ddp_model(torch.nn.Linear(1, 1, device=device), broadcast_buffers=False)
    assert kwargs == {"broadcast_buffers": False, "device_ids": device_ids}


def test_breaks_that_are_mended_already_are_left_alone(run):
    run("""
        import random, sys, types, torch
        sample = random.Random.sample
        random.Random.sample = lambda self, items, k: sample(self, tuple(items), k)
        torch.optim.lr_scheduler._LRScheduler = torch.optim.lr_scheduler.LRScheduler
        sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
        import virtex_d2
        from virtex_d2.engine import compat
        import detectron2.engine
        from detectron2.evaluation import coco_evaluation
        from detectron2.data.common import MapDataset
        mended = {"scheduler state", "dataset fallback", "COCO evaluation", "compiled ops"}
        assert not mended & set(compat.applied), compat.applied
        assert coco_evaluation.COCOeval_opt is not coco_evaluation.COCOeval
        assert type(MapDataset([1], print)._rng) is random.Random
    """)
