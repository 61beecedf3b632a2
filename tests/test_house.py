"""The arrows of CONTRIBUTING.md: who may import whom; and no circle anywhere."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Room -> rooms that it may import besides itself; the longest name that fits is a module's room.
MAY_IMPORT = {
    "virtex_d2": {"virtex_d2.engine"},
    "virtex_d2.engine": {"virtex_d2"},  # the package itself: its version, and detectron2's bridges
    "virtex_d2.checkpoint": {"virtex_d2", "virtex_d2.engine"},
    "virtex_d2.annotations": {"virtex_d2", "virtex_d2.engine"},
    "virtex_d2.detection": {
        *("virtex_d2", "virtex_d2.engine", "virtex_d2.checkpoint", "virtex_d2.annotations")
    },
    "virtex_d2.slurm": {"virtex_d2", "virtex_d2.engine"},
    "virtex_d2.studies": {
        *("virtex_d2", "virtex_d2.engine", "virtex_d2.checkpoint", "virtex_d2.annotations"),
        *("virtex_d2.detection", "virtex_d2.slurm"),
    },
    "pretrain": {
        *("virtex_d2", "virtex_d2.engine", "virtex_d2.checkpoint"),
        *("pretrain.data", "pretrain.methods"),
    },
    "pretrain.data": {"pretrain", "virtex_d2", "virtex_d2.engine"},
    "pretrain.methods": {
        *("pretrain", "pretrain.data", "virtex_d2", "virtex_d2.engine", "virtex_d2.checkpoint")
    },
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("virtex_d2", "pretrain")
    for path in (ROOT / package).rglob("*.py")
}


def room(module: str) -> str:
    fitting = [name for name in MAY_IMPORT if f"{module}.".startswith(f"{name}.")]
    return max(fitting, key=len)


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name if name in MODULES else name.rpartition(".")[0] for name in found]
    return {name for name in parts if name in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_go_down(module):
    own = room(module)
    rooms = {room(name) for name in imports(MODULES[module])}
    assert rooms <= MAY_IMPORT[own] | {own}


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imports(path) for name, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())
