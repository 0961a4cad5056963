"""Who may import what: a model needs torch alone, and only launch/ knows Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rechub_dist"
# From what everything speaks of to what speaks to people. `launch` stands at the top of the checkout and knows all.
ROOMS = (
    "redaction", "errors", "typed", "seeds", "builds", "skips", "derived", "features", "schema", "embedded", "batch",
    "config", "distributed", "reporting", "data", "layers", "models", "metrics", "objectives", "embedding",
    "checkpoint", "assembly", "evaluation", "training", "inference", "notebook", "launching", "cli",
)  # fmt: skip
ROOMS_OF_DATA = (
    "parquet", "run_file", "places", "spec", "columns", "negatives", "order", "given", "collate", "rows", "reader",
    "counts", "stored", "passes", "prepare", "importing", "tools",
)  # fmt: skip
NO_ROOMS = {"__init__", "__main__", "__version__", "launch", "configs"}
ALLOWED = ("torch", "rechub_dist.embedded", "rechub_dist.features", "rechub_dist.layers")


def imports(file: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it, and `torch.distributed` where it is reached by dots."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and node.attr == "distributed":
            found.add(ast.unparse(node))
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("folder", ["models", "layers"])
def test_models_and_layers_import_torch_alone(folder: str) -> None:
    allowed = (*ALLOWED, "rechub_dist.models.base") if folder == "models" else ALLOWED
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in sorted(imports(file))
        if name.partition(".")[0] not in sys.stdlib_module_names
        and (not within(name, *allowed) or within(name, "torch.distributed"))
    ]
    assert not wrong, "\n".join(wrong)


def rooms(*inside: str) -> dict[str, set[str]]:
    """What each room below a folder of the package imports of the others there: a folder's files, or a file alone."""
    folder = PACKAGE.joinpath(*inside)
    prefix = ".".join(("rechub_dist", *inside, ""))
    found: dict[str, set[str]] = {}
    for file in folder.rglob("*.py"):
        room = file.relative_to(folder).parts[0].removesuffix(".py")
        if room not in NO_ROOMS:
            names = {name.removeprefix(prefix).partition(".")[0] for name in imports(file) if name.startswith(prefix)}
            found.setdefault(room, set()).update(names - {room})
    return found


@pytest.mark.parametrize(("inside", "order"), [((), ROOMS), (("data",), ROOMS_OF_DATA)])
def test_a_room_imports_only_rooms_above_it(inside: tuple[str, ...], order: tuple[str, ...]) -> None:
    found = rooms(*inside)
    assert sorted(found) == sorted(order), "a room has come or gone: say where it belongs"
    above = {room: set(order[:place]) for place, room in enumerate(order)}
    wrong = [f"{room} imports {name}" for room in order for name in sorted(found[room] - above[room] - NO_ROOMS)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("file", "ours"), [("derived.py", ()), ("features.py", ("rechub_dist.derived",))])
def test_features_need_the_standard_library_alone(file: str, ours: tuple[str, ...]) -> None:
    found = imports(PACKAGE / file)
    assert all(name.partition(".")[0] in sys.stdlib_module_names or within(name, *ours) for name in found)


def test_only_launch_imports_ray() -> None:
    files = [file for folder in ("rechub_dist", "benchmarks", "docker") for file in (ROOT / folder).rglob("*.py")]
    files.remove(ROOT / "benchmarks" / "reader_peers.py")  # it measures Ray's own loader
    files = [file for file in files if (ROOT / "launch") not in file.resolve().parents]
    wrong = [str(file.relative_to(ROOT)) for file in files for name in imports(file) if within(name, "ray")]
    assert not wrong, f"only launch/ may import ray: {wrong}"


def test_the_command_imports_nothing_slow() -> None:
    slow = ("torch", "torchrec", "fbgemm_gpu", "ray", "pyarrow", "numpy")
    code = f"import sys, rechub_dist.cli.main; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_a_notebook_needs_torch_alone() -> None:
    code = (
        "import sys; from rechub_dist.models import DeepFM; "
        "print([name for name in ('torchrec', 'fbgemm_gpu', 'ray', 'pydantic', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_imports_nothing_until_it_is_used() -> None:
    heavy = ("torch", "torchrec", "numpy", "pyarrow", "pydantic")
    code = f"import sys, rechub_dist; dir(rechub_dist); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_columns_become_ids_without_torch() -> None:
    modules = ("values", "derive", "cross", "strings", "vocabulary", "hashing", "window", "fit")
    code = (
        f"import sys, rechub_dist.data.given, rechub_dist.data.columns.{', rechub_dist.data.columns.'.join(modules)}; "
        "print([name for name in ('torch', 'torchrec', 'fbgemm_gpu', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
