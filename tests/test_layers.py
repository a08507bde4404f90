"""Imports run downwards only: by the table of layers, without circles, and without imports that hide one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import lightning_cl

ROOT = Path(lightning_cl.__file__).parent

# The highest first. Folders of one line are next to each other and do not know each other.
LAYERS = [
    ["__init__", "__main__"],
    ["cli"],
    ["sequence"],
    ["export", "integrations"],
    ["callbacks/__init__"],
    [f"callbacks/{family}" for family in ("architecture", "merging", "monitoring", "regularization", "replay")],
    ["models"],
    ["passes"],
    ["core"],
    ["evaluation"],
    ["metrics"],
    ["data"],
    ["buffers"],
    ["functional"],
    ["tasks", "files", "random_state", "checksum", "stopping", "lightning_internals"],
    ["arguments", "lazy_names", "version"],
]


@cache
def modules():
    return {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def file_of(name):
    """The module or package that a dotted name of ours is in."""
    path = name.removeprefix("lightning_cl").lstrip(".").replace(".", "/")
    return next((m for m in (path, f"{path}/__init__".lstrip("/")) if m in modules()), None)


@cache
def imports():
    """For each module: the modules of ours that it imports, and True if at its top."""
    found = {}
    for module, path in modules().items():
        found[module] = []
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_cl":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if file_of(name) else node.module for name in names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "lightning_cl"]
            found[module] += [(file_of(name), node in tree.body) for name in names]
    return found


def layer_of(module):
    (at,) = {
        i for i, layer in enumerate(LAYERS) for room in layer if module == room or module.startswith(f"{room}/")
    } or {None}
    return at


def room_of(module):
    return next(room for room in LAYERS[layer_of(module)] if module == room or module.startswith(f"{room}/"))


@pytest.mark.parametrize("module", modules())
def test_imports_run_downwards(module):
    wrong = [
        other
        for other, _ in imports()[module]
        # The command line looks up the names that a configuration may use.
        if (layer_of(other) < layer_of(module) and (room_of(module), other) != ("cli", "__init__"))
        or (layer_of(other) == layer_of(module) and room_of(other) != room_of(module))
    ]
    assert wrong == []


@pytest.mark.parametrize("module", [module for module in modules() if module not in ("__init__", "export/__init__")])
def test_no_import_hides_in_a_function(module):
    assert [other for other, at_top in imports()[module] if not at_top] == []


def test_there_is_no_circle():
    """No circle of files; the face of a folder counts as a file of its own."""
    done, on_way = set(), []

    def visit(module):
        assert module not in on_way, " → ".join([*on_way[on_way.index(module) :], module])
        if module in done:
            return
        on_way.append(module)
        for other, _ in imports()[module] if module != "__init__" else []:  # it imports for type checkers only
            visit(other)
        done.add(on_way.pop())

    for module in modules():
        visit(module)


def test_every_module_has_a_layer():
    assert [module for module in modules() if layer_of(module) is None] == []


@pytest.mark.parametrize("module", modules())
def test_two_files_touch_lightnings_internals(module):
    if module in ("lightning_internals", "core/loops"):
        return
    tree, theirs = (
        ast.parse(modules()[module].read_text()),
        re.compile("trainer|loop|strategy|connector|saver|callback"),
    )
    hidden = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and theirs.search(ast.unparse(node.value))
    ]
    hidden += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning.")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not hidden
