"""Imports point downwards only, and the light layers stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "koret"
# from the top: a module may import from its own layer and those below
LAYERS = [
    ["__main__"],
    ["cli"],
    ["commands"],
    ["web", "serving"],
    ["export"],
    ["training"],
    ["evaluation"],
    ["retrieval"],
    ["data"],
    ["runs"],
    ["config", "files", "privacy", "figures", "native"],
]
HEAVY = ("torch", "transformers", "sentence_transformers", "peft")


def list_modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("koret", *(p for p in parts if p != "__init__")))


def find_imports(path: Path) -> set[str]:
    """Every koret or heavy module a file imports when it runs, in functions too; type-checking blocks do not count."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.update({f"{module}.{alias.name}" for alias in node.names} if module.startswith("koret") else {module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def rank_of(name: str) -> int | None:
    parts = name.split(".")
    return next((i for i, layer in enumerate(LAYERS) if len(parts) > 1 and parts[1] in layer), None)


def test_every_module_has_a_layer_and_a_caption():
    for path in list_modules():
        name = name_of(path)
        assert name == "koret" or rank_of(name) is not None, f"{name} belongs to no layer"
        caption = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert caption and len(caption.splitlines()[0]) <= 120, f"{name} has no one-line caption"


def test_imports_point_downwards():
    for path in list_modules():
        name = name_of(path)
        if name == "koret":
            continue
        for target in find_imports(path):
            if target.startswith("koret.") and rank_of(target) is not None:
                assert rank_of(target) >= rank_of(name), f"{name} imports {target} from a layer above"


def test_nobody_inside_imports_the_package_face():
    for path in list_modules():
        for target in find_imports(path):
            assert target != "koret", f"{name_of(path)} imports koret itself"


def test_no_circles():
    modules = {name_of(path): path for path in list_modules()}
    edges = {
        name: {
            m
            for target in find_imports(path)
            for m in (target, target.rpartition(".")[0])
            if m in modules and m != name
        }
        for name, path in modules.items()
        if name != "koret"
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in edges.get(name, ()):
                walk(other, (*trail, name))
            done.add(name)

    for name in edges:
        walk(name, ())


@pytest.mark.parametrize("module", ["koret", "koret.config", "koret.runs", "koret.cli"])
def test_light_modules_load_without_torch(module):
    check = f"import sys, {module}; sys.exit(any(m in sys.modules for m in {HEAVY!r}))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_the_data_layer_loads_without_torch():
    modules = [name_of(p) for p in list_modules() if name_of(p).startswith("koret.data.")]
    check = f"import sys, {', '.join(modules)}; sys.exit(any(m in sys.modules for m in {HEAVY!r}))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_public_names_resolve():
    import koret

    for name in koret.__all__:
        assert getattr(koret, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        koret.no_such_name  # noqa: B018
