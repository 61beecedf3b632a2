"""The one place that bridges detectron2's versions and today's torch, numpy, Pillow, setuptools.

detectron2 v0.6 (November 2021, also what PyPI has, as pure Python) and the newer official build of
its main branch both work with what `BRIDGES` lists. Each bridge looks whether it is needed and does
nothing where it is not. It looks at the moment when the module that it mends is imported, so that
importing `virtex_d2` imports nothing heavy; a module that is loaded already is looked at at once.
"""

import functools
import importlib.machinery
import importlib.util
import logging
import os
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

INSTALL_HELP = """\
virtex_d2 needs detectron2, and no usable one is installed here ({found}). Any of these will do:
  make environment                    the project's own environment in .venv, complete
  tools/install_detectron2.sh PYTHON  detectron2 0.6, pure Python, for an interpreter with torch
  the official build                  as INSTALL.md in detectron2's repository says
docs/install.md has the details, and the way without internet."""


@dataclass(frozen=True)
class Bridge:
    """One known break, and what mends it."""

    name: str  # how the log and the tests call it
    module: str  # whose import is the moment to look; "" is at once
    reason: str  # what breaks, for whom
    needed: Callable[[], bool]  # whether it breaks here
    apply: Callable[[], None]  # mends it


BRIDGES: list[Bridge] = []


def _bridge(
    name: str, module: str, reason: str, needed: Callable[[], bool] = lambda: True
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a `Bridge` of the function that mends the break."""

    def register(apply: Callable[[], None]) -> Callable[[], None]:
        BRIDGES.append(Bridge(name, module, reason, needed, apply))
        return apply

    return register


class _Missing(types.ModuleType):
    """In the place of a module that cannot be there: imports, and says why on use."""

    def __init__(self, name: str, reason: str, **attributes: Any) -> None:
        super().__init__(name, reason)
        self.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} {self.__doc__}")

        return refuse


def has_compiled_ops() -> bool:
    """Whether this environment's detectron2 has its compiled extension `detectron2._C`."""
    loaded = sys.modules.get("detectron2._C")
    if loaded is not None:
        return not isinstance(loaded, _Missing)
    spec = importlib.util.find_spec("detectron2")
    locations = spec.submodule_search_locations if spec else None
    # PathFinder and not importlib.util.find_spec, which would import detectron2 and with it torch.
    return bool(
        locations and importlib.machinery.PathFinder.find_spec("detectron2._C", list(locations))
    )


@_bridge(
    "compiled ops",
    "",
    "v0.6 imports detectron2._C everywhere; its PyPI package has no compiled part. The "
    "ops that Mask R-CNN needs come from torchvision",
    needed=lambda: "detectron2._C" not in sys.modules and not has_compiled_ops(),
)
def _provide_missing_ops() -> None:
    sys.modules["detectron2._C"] = _Missing(
        "detectron2._C",
        "needs detectron2's compiled ops (deformable convolution, rotated boxes, the fast COCO "
        "evaluation), and this detectron2 is pure Python. Install the official build for them.",
        get_compiler_version=lambda: "not compiled",
        get_cuda_version=lambda: "not compiled",
        has_cuda=lambda: False,
    )


@_bridge(
    "pkg_resources",
    "",
    "setuptools 82 dropped it; detectron2.model_zoo asks it for the path of a config",
    needed=lambda: importlib.util.find_spec("pkg_resources") is None,
)
def _provide_pkg_resources() -> None:
    def resource_filename(package_or_requirement: str, resource_name: str) -> str:
        spec = importlib.util.find_spec(package_or_requirement)
        return os.path.join(spec.submodule_search_locations[0], *resource_name.split("/"))

    module = types.ModuleType("pkg_resources", "The one function of it that detectron2 calls.")
    # importlib.util.find_spec() raises on a loaded module without one.
    module.__spec__ = importlib.machinery.ModuleSpec("pkg_resources", loader=None)
    module.resource_filename = resource_filename
    sys.modules["pkg_resources"] = module


@_bridge(
    "caffe2",
    "",
    "v0.6's export imports caffe2, with which also its TorchScript cannot be had",
    needed=lambda: importlib.util.find_spec("caffe2") is None,
)
def _provide_missing_export() -> None:
    sys.modules["detectron2.export.api"] = _Missing(
        "detectron2.export.api",
        "needs caffe2, which no PyTorch from 2.0 on has. Export with TracingAdapter or "
        "scripting_with_instances of detectron2.export.",
        __all__=["Caffe2Model", "Caffe2Tracer", "add_export_config", "export_caffe2_model"]
        + ["export_onnx_model"],
    )


@_bridge(
    "black",
    "detectron2.config.lazy",
    "LazyConfig.to_py lays out its text by a formatter that it does not ask for",
    needed=lambda: importlib.util.find_spec("black") is None,
)
def _let_lazy_config_go_without_black() -> None:
    lazy_config = sys.modules["detectron2.config.lazy"].LazyConfig
    original = lazy_config.to_py

    @functools.wraps(original)
    def to_py(*args: Any, **kwargs: Any) -> str:
        # for the call alone, so that nobody else finds a black that formats nothing
        black = {"format_str": lambda text, mode: text, "Mode": object, "InvalidInput": ValueError}
        sys.modules["black"] = types.SimpleNamespace(**black)
        try:
            return original(*args, **kwargs)
        finally:
            del sys.modules["black"]

    lazy_config.to_py = staticmethod(to_py)


@_bridge(
    "polygons' first points",
    "fvcore.transforms.transform",
    "Shapely 2 lets a cropped polygon begin with another point than Shapely 1",
)
def _let_polygons_begin_where_they_began() -> None:
    crop = sys.modules["fvcore.transforms.transform"].CropTransform
    original = crop.apply_polygons

    @functools.wraps(original)
    def apply_polygons(self: Any, polygons: list) -> list:
        cropped = []
        for polygon in polygons:
            first = self.apply_coords(sys.modules["numpy"].array(polygon[:1], float))
            for part in original(self, [polygon]):
                begin = int((part == first).all(axis=1).argmax())  # 0 where it was cut off
                cropped.append(part[[*range(begin, len(part)), *range(begin)]])
        return cropped

    crop.apply_polygons = apply_polygons


@_bridge(
    "whole numbers",
    "detectron2.data.transforms.transform",
    "resizing writes into the array that it is given: boxes and polygons of whole numbers, as JSON "
    "files may have them, stay whole, up to a pixel too small",
)
def _let_whole_numbers_be_resized() -> None:
    resize = sys.modules["detectron2.data.transforms.transform"].ResizeTransform
    original = resize.apply_coords

    @functools.wraps(original)
    def apply_coords(self: Any, coords: Any) -> Any:
        return original(self, coords.astype(float) if coords.dtype.kind in "iu" else coords)

    resize.apply_coords = apply_coords


@_bridge(
    "torch warnings",
    "",
    "v0.6 and main script two small functions when imported, and torch 2.15 warns of "
    "torch.jit.script each time, any torch of comm.all_gather's TypedStorage in each process: "
    "lines on stderr about nothing that a user could change",
)
def _silence_torch() -> None:
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"TypedStorage is deprecated", UserWarning)


_NUMPY_ALIASES = {"bool": bool, "int": int, "float": float, "str": str, "object": object}


def _numpy_lacks_aliases() -> bool:
    # vars() and not hasattr(): numpy warns when a removed alias is asked for.
    return not vars(sys.modules["numpy"]).keys() >= _NUMPY_ALIASES.keys()


@_bridge(
    "numpy aliases",
    "numpy",
    "numpy 1.24 dropped np.bool, np.int, np.float, np.str, np.object (2.0 brought back "
    "np.bool alone); v0.6 and lvis 0.5.3 use them",
    needed=_numpy_lacks_aliases,
)
def _add_numpy_aliases() -> None:
    numpy = sys.modules["numpy"]
    for name, builtin in _NUMPY_ALIASES.items():
        if name not in vars(numpy):
            setattr(numpy, name, builtin)


@_bridge(
    "Pillow LINEAR",
    "PIL.Image",
    "Pillow 10 dropped the name for BILINEAR; v0.6's transforms use it",
    needed=lambda: not hasattr(sys.modules["PIL.Image"], "LINEAR"),
)
def _add_pillow_linear() -> None:
    sys.modules["PIL.Image"].LINEAR = sys.modules["PIL.Image"].BILINEAR


def _scheduler_hook_forgets_state() -> bool:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return not sys.modules["detectron2.engine.hooks"].LRScheduler(scheduler=scheduler).state_dict()


@_bridge(
    "scheduler state",
    "detectron2.engine.hooks",
    "torch 2 renamed the schedulers' base class; v0.6's hook no longer recognises "
    "torch's own schedulers, and forgets their position on resume",
    needed=_scheduler_hook_forgets_state,
)
def _alias_scheduler_base() -> None:
    import torch

    torch.optim.lr_scheduler._LRScheduler = torch.optim.lr_scheduler.LRScheduler


def _map_dataset_cannot_fall_back() -> bool:
    dataset = sys.modules["detectron2.data.common"].MapDataset([None, "sample"], lambda item: item)
    try:
        return dataset[0] != "sample"
    except TypeError:
        return True


class SetSampler(random.Random):
    """random.Random whose `sample` takes a set, as it did before Python 3.11."""

    def sample(self, population: Iterable, k: int, **kwargs: Any) -> list:
        if isinstance(population, (set, frozenset)):
            population = tuple(population)
        return super().sample(population, k, **kwargs)


@_bridge(
    "dataset fallback",
    "detectron2.data.common",
    "Python 3.11 samples from no set; MapDataset does, where a mapper skips a record",
    needed=_map_dataset_cannot_fall_back,
)
def _let_map_dataset_fall_back() -> None:
    map_dataset = sys.modules["detectron2.data.common"].MapDataset
    original = map_dataset.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._rng = SetSampler(42)  # detectron2's own seed

    map_dataset.__init__ = init


def _in_its_package() -> bool:
    """Whether the project's other files can be imported: this one may have been loaded alone."""
    return bool(__package__)


@_bridge(
    "image decoder",
    "detectron2.data.detection_utils",
    "detectron2's reader clips 16-bit grey to white and turns TIFFs twice; no version "
    "of it differs",
    needed=_in_its_package,
)
def _read_images_in_one_way() -> None:
    module = sys.modules["detectron2.data.detection_utils"]
    original = module.read_image

    @functools.wraps(original)
    def read_image(file_name: str, format: str | None = None) -> Any:
        if format is None:  # the file's own levels, whatever they mean
            return original(file_name)
        from virtex_d2.engine.images import read_image as read

        with module.PathManager.open(file_name, "rb") as file:
            return module.convert_PIL_to_numpy(read(file), format)

    module.read_image = read_image


def _fast_coco_evaluation_is_missing() -> bool:
    module = sys.modules["detectron2.evaluation.coco_evaluation"]
    return not has_compiled_ops() and module.COCOeval_opt is not module.COCOeval


@_bridge(
    "COCO evaluation",
    "detectron2.evaluation.coco_evaluation",
    "COCOEvaluator's default is the compiled evaluation; pycocotools gives the same AP",
    needed=_fast_coco_evaluation_is_missing,
)
def _use_official_coco_evaluation() -> None:
    module = sys.modules["detectron2.evaluation.coco_evaluation"]
    module.COCOeval_opt = module.COCOeval


@_bridge(
    "distributed CPU models",
    "detectron2.engine.defaults",
    "create_ddp_model gives device_ids, which DistributedDataParallel refuses on a CPU; "
    "no version of detectron2 differs",
)
def _let_cpu_models_be_distributed() -> None:
    defaults = sys.modules["detectron2.engine.defaults"]
    original = defaults.create_ddp_model

    @functools.wraps(original)
    def create_ddp_model(model: Any, **kwargs: Any) -> Any:
        if all(parameter.device.type == "cpu" for parameter in model.parameters()):
            kwargs.setdefault("device_ids", None)
        return original(model, **kwargs)

    defaults.create_ddp_model = create_ddp_model


# Coordinates stay in float32 where detectron2 would take them in the precision of features. Under
# autocast features, predicted offsets and masks are bfloat16, which tells whole pixels apart up to
# 256 only: boxes rounded to it were off by 0.8 px on average on 1344 x 800 (4 px at most), and what
# is pooled from them by 13 to 16 %. What TorchScript compiles of it it still compiles.
_ROUNDED = "under autocast coordinates are rounded to the features' 8 bits, in every detectron2"


def _full(tensor: Any) -> Any:
    return tensor.float() if str(tensor.dtype) in ("torch.float16", "torch.bfloat16") else tensor


@_bridge("RoI coordinates", "detectron2.layers.roi_align", _ROUNDED)
def _keep_boxes_that_features_are_pooled_from() -> None:
    import torch

    module = sys.modules["detectron2.layers.roi_align"]
    roi_align = module.roi_align

    def forward(self, input, rois):
        assert rois.dim() == 2
        assert rois.size(1) == 5
        if input.is_quantized:
            input = input.dequantize()
        dtype = input.dtype
        if dtype == torch.float16 or dtype == torch.bfloat16:
            input = input.float()
        return roi_align(
            input,
            rois.to(dtype=input.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        ).to(dtype=dtype)

    module.ROIAlign.forward = forward


@_bridge("rotated RoIs", "detectron2.layers.roi_align_rotated", _ROUNDED)
def _keep_rotated_boxes_that_features_are_pooled_from() -> None:
    cls = sys.modules["detectron2.layers.roi_align_rotated"].ROIAlignRotated
    original = cls.forward  # it knows of float16 alone

    @functools.wraps(original)
    def forward(self: Any, input: Any, rois: Any) -> Any:
        return original(self, _full(input), _full(rois)).to(input.dtype)

    cls.forward = forward


@_bridge("decoded boxes", "detectron2.modeling.box_regression", _ROUNDED)
def _keep_boxes_that_are_told_as_offsets() -> None:
    module = sys.modules["detectron2.modeling.box_regression"]

    def widen(cls: type) -> None:
        original = cls.apply_deltas

        @functools.wraps(original)
        def apply_deltas(self: Any, deltas: Any, boxes: Any) -> Any:
            return original(self, _full(deltas), boxes)

        cls.apply_deltas = apply_deltas

    for name in ("Box2BoxTransformRotated", "Box2BoxTransformLinear"):  # the latter is FCOS's
        if hasattr(module, name):
            widen(getattr(module, name))


@_bridge("keypoints", "detectron2.structures.keypoints", _ROUNDED)
def _keep_places_where_a_heat_map_is_highest() -> None:
    import torch

    module = sys.modules["detectron2.structures.keypoints"]
    original = module.heatmaps_to_keypoints

    def heatmaps_to_keypoints(maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        if maps.dtype != torch.float64:
            maps = maps.float()
        return original(maps, rois)

    module.heatmaps_to_keypoints = heatmaps_to_keypoints


@_bridge("pasted masks", "detectron2.layers.mask_ops", _ROUNDED)
def _keep_places_that_pixels_of_a_mask_are_looked_up_at() -> None:
    import torch

    module = sys.modules["detectron2.layers.mask_ops"]
    original = module._do_paste_mask

    def _do_paste_mask(
        masks: torch.Tensor, boxes: torch.Tensor, img_h: int, img_w: int, skip_empty: bool = True
    ):
        if masks.dtype != torch.float64:
            masks = masks.float()
        return original(masks, boxes, img_h, img_w, skip_empty)

    module._do_paste_mask = _do_paste_mask


applied: list[str] = []
"""Names of the bridges that were needed so far, in the order of their application."""

_waiting: dict[str, list[Bridge]] = {}


def apply() -> None:
    """Check that detectron2 is there, and set every bridge up. Doing it twice changes nothing.

    Raises:
        ImportError: there is no detectron2; the message says how to install it.
    """
    _require_detectron2()
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for bridge in BRIDGES:
        if not bridge.module or bridge.module in sys.modules:
            _mend(bridge)
        else:
            _waiting.setdefault(bridge.module, []).append(bridge)


def _mend(bridge: Bridge) -> None:
    if bridge.needed():
        bridge.apply()
        applied.append(bridge.name)
        logger.debug("bridge applied: %s (%s)", bridge.name, bridge.reason)


def _require_detectron2() -> None:
    spec = importlib.util.find_spec("detectron2")
    if spec is None:
        raise ImportError(INSTALL_HELP.format(found="no package of that name"))
    if spec.origin is None:  # a namespace package: some folder that happens to have the name
        folder = next(iter(spec.submodule_search_locations))
        raise ImportError(INSTALL_HELP.format(found=f"only a folder of that name, {folder}"))


class _AfterImport:
    """An import hook: runs the bridges of a module right after the module's own code.

    The module is found and loaded by whoever would have done it; only `exec_module` of its own
    loader is followed by the bridges.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        bridges = _waiting.pop(name, None)
        if bridges is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            _waiting[name] = bridges
            return None
        execute = spec.loader.exec_module

        def execute_then_bridge(module: types.ModuleType) -> None:
            execute(module)
            for bridge in bridges:
                _mend(bridge)

        spec.loader.exec_module = execute_then_bridge
        return spec
