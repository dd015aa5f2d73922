"""Who may import whom: every import points to the same layer's own room or to a lower layer.

The imports are read from the source, those inside functions and under TYPE_CHECKING included.
docs/architecture.md explains the layers.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "distillm_ray"

# From the bottom to the top. A name is a module of the package, or a folder and all that is in it.
# Rooms of one layer do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("activity", "cache_directory", "errors", "methods", "types"),
    ("config", "files", "directory_lock", "dynamic_batching", "packing", "text_metrics"),
    ("log", "run_directory"),
    ("remote",),
    ("models",),
    ("weights",),
    ("data", "loss", "replay", "rollout", "teacher"),
    ("batching",),
    ("cluster",),
    ("learner",),
    ("evaluation",),
    ("report",),
    ("preflight", "watch"),
    (
        "check",
        "checkpoint_export",
        "jobs",
        "local",
        "manifest",
        "new_student",
        "pipeline",
        "plan",
        "scoring",
    ),
    ("doctor",),
    ("cli",),
)
LAYER_OF = {room: index for index, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path) for path in FILES}


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, by their names within it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their room"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] + [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            inside = name.removeprefix("distillm_ray.")
            if name != inside and inside in MODULES:
                found.add(inside)
    return found - {module_name(path)}


IMPORTS = {module_name(path): imports_of(path) for path in FILES}


def test_every_module_has_a_room() -> None:
    rooms = {room_of(module) for module in MODULES if module}
    assert rooms == set(LAYER_OF), "a new room needs a place in LAYERS and in docs/architecture.md"


@pytest.mark.parametrize("module", sorted(module for module in MODULES if module))
def test_imports_point_downwards(module: str) -> None:
    here = room_of(module)
    upwards = sorted(
        other
        for other in IMPORTS[module]
        if room_of(other) != here and LAYER_OF[room_of(other)] >= LAYER_OF[here]
    )
    assert upwards == [], f"{module} ({here}) must not import from its own layer or a higher one"


def test_there_is_no_circle_of_modules() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_only_the_top_imports_reports() -> None:
    users = {
        module
        for module, imports in IMPORTS.items()
        if room_of(module) != "report" and any(room_of(other) == "report" for other in imports)
    }
    assert users <= {"check", "cli", "jobs", "local", "pipeline", "scoring", "watch"}


def test_roles_know_nothing_of_ray() -> None:
    """Ray is applied in cluster/; what stands below it is plain."""
    ray_users = {
        module_name(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray")
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "ray" for a in node.names))
    }
    below = {module for module in ray_users if LAYER_OF[room_of(module)] < LAYER_OF["cluster"]}
    assert below == {"data.ray_data"}, "reading data is Ray Data's work"
