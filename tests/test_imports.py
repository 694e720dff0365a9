"""Imports go one way: optimizations._native <- optimizations <- pytest_inferencepio, and no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("optimizations", "pytest_inferencepio")
TORCH_FREE = [
    "pytest_inferencepio/errors.py",
    "pytest_inferencepio/record.py",
    "pytest_inferencepio/stats.py",
    "pytest_inferencepio/baselines.py",
    "pytest_inferencepio/comparison.py",
    "pytest_inferencepio/plugin.py",
    "pytest_inferencepio/catalog/entries.py",
]


def module_files() -> dict[str, Path]:
    files = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = module_files()


def imported(path: Path, *, module_level: bool) -> set[str]:
    """Names of modules a file imports; with `module_level` only what importing it runs."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = {f"{base}.{alias.name}" for alias in node.names}
            modules = names & set(FILES)
            found.update(modules)
            if names - modules:
                found.add(base)
        elif module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif module_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("optimizations")))
def test_optimizations_do_not_know_the_plugin(name: str) -> None:
    outside = {each for each in imported(FILES[name], module_level=False) if each.startswith("pytest")}
    assert not outside


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_module_imports_its_package_root(name: str) -> None:
    root = name.split(".")[0]
    if name == root:
        return
    assert root not in imported(FILES[name], module_level=False)


def test_no_cycles() -> None:
    graph = {
        name: {each for each in imported(path, module_level=True) if each in FILES and each != name}
        for name, path in FILES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for each in sorted(graph[name]):
            visit(each, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("file", TORCH_FREE)
def test_records_and_hooks_load_without_torch(file: str) -> None:
    heavy = {
        each
        for each in imported(ROOT / file, module_level=True)
        if each.split(".")[0] in {"torch", "transformers", "optimizations"}
    }
    assert not heavy


def test_kernels_is_no_package() -> None:
    assert not list((ROOT / "kernels").rglob("*.py"))
