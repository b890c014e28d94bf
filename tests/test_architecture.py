"""The floors of docs/architecture.md: an import points down only. Imports inside functions count; those that only a
type checker reads do not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import _PUBLIC

ROOT = Path(__file__).resolve().parents[1]

# (floor, storey within the floor). A module may import one with a smaller pair, and its own room whatever the order.
# A name ending in "." is a room: a package whose modules see one another.
FLOORS: dict[str, tuple[int, int]] = {
    "engine.errors": (0, 0),
    "engine.log": (0, 0),
    "engine.config": (0, 1),
    "engine.types": (0, 1),
    "engine.atomic": (0, 1),
    "engine.region": (0, 1),
    "engine.tensor_file": (0, 1),
    "engine._C": (1, 0),
    "engine._cuda": (1, 0),
    "engine.kernels.": (1, 1),
    "engine.parallel.": (1, 2),
    "engine.batch": (2, 0),
    "engine.architectures": (2, 1),
    "engine.layers": (2, 2),
    "engine.parts": (2, 3),
    "engine.gather": (2, 4),
    "engine.model": (2, 4),
    "engine.side_by_side": (2, 5),
    "engine.checkpoint": (3, 0),
    "engine.losses": (3, 0),
    "engine.planner.": (3, 1),
    "engine.optim": (3, 0),
    "engine.packing": (3, 0),
    "engine.response": (3, 0),
    "engine.tokenizer": (3, 0),
    "engine.chat": (3, 1),
    "engine.sampler.": (3, 3),
    "engine.targets": (3, 1),
    "engine.micro_batches": (3, 2),
    "engine.trainer": (3, 3),
    "engine.pieces": (3, 4),
    "engine.state": (3, 5),
    "engine.saver": (3, 6),
    "engine.engine": (4, 0),
    "engine.__main__": (4, 1),
    "rl.": (5, 0),
    "forge.": (5, 0),
}


def room_of(module: str) -> str | None:
    """The entry of FLOORS that `module` lives in, or None."""
    if module in FLOORS:
        return module
    return next((room for room in FLOORS if room.endswith(".") and f"{module}.".startswith(room)), None)


def module_name(path: Path) -> str:
    """engine/kernels/__init__.py -> engine.kernels"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import under `tree`, those under `if TYPE_CHECKING:` left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from imports(other)
        else:
            yield from imports(node)


def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules an import reaches. `from engine import Engine` reaches the module that defines Engine."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        if base == "engine" and alias.name in _PUBLIC:
            yield _PUBLIC[alias.name]
        else:
            yield inner if room_of(inner) else base


def violations(source: str, module: str) -> list[str]:
    """What the imports of `module` do wrong, one line each."""
    found = []
    own_package = module.split(".")[0]
    for node in imports(ast.parse(source)):
        where = f"{module}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"{where} a relative import; write the whole name")
            continue
        for target in targets(node):
            package = target.split(".")[0]
            if package in ("tests", "benchmarks"):
                found.append(f"{where} imports {target}; the product does not know its tests and benchmarks")
                continue
            if package not in ("engine", "rl", "forge"):
                continue
            if own_package in ("rl", "forge") and package == "engine":
                public = isinstance(node, ast.ImportFrom) and node.module == "engine"
                if not public or any(alias.name not in _PUBLIC for alias in node.names):
                    found.append(f"{where} `{ast.unparse(node)}` reaches inside; only engine's public names are open")
                continue
            mine, theirs = room_of(module), room_of(target)
            if mine is None or theirs is None:
                lost = module if mine is None else target
                found.append(f"{where} {lost} has no floor; give it one in tests/test_architecture.py")
            elif mine != theirs and FLOORS[theirs] >= FLOORS[mine]:
                arrow = "sideways" if FLOORS[theirs] == FLOORS[mine] else "up"
                found.append(f"{where} imports {target}, which points {arrow}")
    return found


def sources() -> list[Path]:
    return sorted(path for package in ("engine", "rl", "forge") for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    if module == "engine":
        assert not [t for n in imports(ast.parse(path.read_text())) for t in targets(n) if t.startswith("engine")]
    else:
        assert violations(path.read_text(), module) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("engine.kernels.linear", "from engine.model import Transformer", "up"),
        ("engine.kernels.linear", "def late():\n    from engine import Engine", "up"),
        ("engine.kernels.linear", "import engine.trainer", "up"),
        ("engine.sampler.runner", "from engine.trainer import Trainer", "sideways"),
        ("engine.losses", "from engine import optim", "sideways"),
        ("engine.errors", "from engine.config import ModelConfig", "up"),
        ("engine.sampler.runner", "from .scheduler import Scheduler", "relative"),
        ("engine.somewhere_new", "from engine.errors import EngineError", "has no floor"),
        ("engine.model", "from tests.test_tiny import model", "tests"),
        ("rl.loop", "from engine.engine import Engine", "reaches inside"),
        ("rl.loop", "import engine", "reaches inside"),
        ("rl.loop", "from engine import kernels", "reaches inside"),
        ("rl.loop", "from forge.graph import Graph", "sideways"),
        ("forge.run", "try:\n    import rl.loop\nexcept ImportError:\n    raise", "sideways"),
    ],
)
def test_planted_violation_is_reported(module: str, source: str, complaint: str) -> None:
    assert [line for line in violations(source, module) if complaint in line]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.model", "from engine.kernels.linear import linear\nimport torch"),
        ("engine.kernels.linear", "from engine import _C\nfrom engine.kernels.op import Op"),
        ("engine.engine", "from engine.sampler.runner import Runner\nfrom engine.trainer import Trainer"),
        ("engine.errors", "if TYPE_CHECKING:\n    from engine.engine import Engine"),
        ("rl.envs.arithmetic", "from engine import Sample, SamplingParams\nfrom rl.env import Env"),
    ],
)
def test_import_that_points_down_is_let_through(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_every_floor_is_lived_on() -> None:
    """A room that was renamed must not leave its old name here."""
    modules = [module_name(path) for path in sources()] + ["engine._C", "engine._cuda"]
    assert {room for room in FLOORS} <= {room_of(module) for module in modules}
