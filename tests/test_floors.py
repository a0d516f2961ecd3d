"""Imports only point down the floors that CONTRIBUTING.md lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIST = re.search(
    r"Imports only point down these floors:\n(.*?)\.\n", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S
)[1]
FLOORS = {name: floor for floor, names in enumerate(LIST.split("<")) for name in re.findall(r"\w+", names)}


def imported(file: Path, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, module or package of blipfast) for everything that a file of `package` imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "blipfast" and rest:
                yield node.lineno, rest.partition(".")[0]


def files_of(name: str) -> list[tuple[Path, list[str]]]:
    """The files of a module or package, each with the dotted name of the package it lies in."""
    folder = ROOT / name if name == "kernels" else ROOT / "blipfast" / name
    if not folder.is_dir():
        return [(folder.with_suffix(".py"), ["blipfast"])]
    return [
        (file, ["blipfast", name, *file.parent.relative_to(folder).parts])
        for file in sorted(folder.rglob("*.py"))
    ]


def test_every_module_has_a_floor():
    found = {path.stem for path in (ROOT / "blipfast").glob("*.py")}
    found |= {path.parent.name for path in (ROOT / "blipfast").glob("*/__init__.py")}
    assert found - {"__init__", "__main__", "reference"} | {"kernels"} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_point_down(name):
    upward = [
        f"{file.relative_to(ROOT)}:{line} imports {other}"
        for file, package in files_of(name)
        for line, other in imported(file, package)
        if other == "reference" or FLOORS.get(other, 0) > FLOORS[name]
    ]
    assert not upward


def test_an_import_that_points_up_is_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "from ..tasks import build\ndef f():\n    import blipfast.train\n    from . import loader\n"
    )
    assert list(imported(file, ["blipfast", "data"])) == [(1, "tasks"), (3, "train"), (4, "data")]
