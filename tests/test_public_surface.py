"""What can be imported: the faces of the packages, names that begin with an underscore, and what the documents say."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fault_injection", "bounds", "monitoring", "experiments")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FACES = sorted(
    path.parent.relative_to(ROOT).as_posix().replace("/", ".")
    for path in MODULES
    if path.name == "__init__.py" and "__all__" in path.read_text(encoding="utf-8")
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def handed_on(face: str) -> set[str]:
    """The names that a face imports: those of its stub, where it has one."""
    folder = ROOT / face.replace(".", "/")
    stub = folder / "__init__.pyi"
    source = stub if stub.exists() else folder / "__init__.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    return {name.asname or name.name for node in imported for name in node.names}


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of every ``from ... import ...``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", name.name) for name in node.names)


def is_importable(module: str, name: str) -> bool:
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


def test_packages_have_faces() -> None:
    assert {"fault_injection", "bounds", "monitoring", "experiments.config", "experiments.analysis"} <= set(FACES)


@pytest.mark.parametrize("face", FACES)
def test_a_face_lists_what_it_hands_on(face: str) -> None:
    names = importlib.import_module(face).__all__
    assert list(names) == sorted(names)
    assert set(names) == handed_on(face)


@pytest.mark.parametrize("face", FACES)
def test_every_name_of_a_face_is_there(face: str) -> None:
    module = importlib.import_module(face)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert set(module.__all__) <= set(dir(module))


def test_a_face_says_what_it_lacks() -> None:
    for face in FACES:
        with pytest.raises(AttributeError, match="no_such_name"):
            importlib.import_module(face).no_such_name  # noqa: B018


def test_no_module_imports_a_private_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in MODULES
        for module, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if module.split(".")[0] in PACKAGES and any(re.match("_(?!_)", part) for part in (*module.split("."), name))
    ]
    assert found == []


def test_no_docstring_lists_public_names() -> None:
    said = re.compile("Public " + "names?:")
    assert [str(path) for path in MODULES if said.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_imports_is_there(document: Path) -> None:
    said = re.findall(r"^[> ]*from ([\w.]+) import ([\w, ]+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    missing = [
        f"{module}.{name}"
        for module, names in said
        if module.split(".")[0] in PACKAGES
        for name in re.findall(r"\w+", names)
        if not is_importable(module, name)
    ]
    assert missing == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_docstring_imports_is_there(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    said = re.findall(r"^(?:>>> | *)from ([\w.]+) import ([\w, ]+?)(?: *#.*)?$", text, re.MULTILINE)
    missing = [
        f"{module}.{name}"
        for module, names in said
        if module.split(".")[0] in PACKAGES
        for name in re.findall(r"\w+", names)
        if not is_importable(module, name)
    ]
    assert missing == []


def test_a_face_loads_without_torch() -> None:
    code = f"import sys; [__import__(name) for name in {list(PACKAGES)!r}]; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
