"""The package as a whole: what importing costs, which part may know which, and what the documents claim."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import innersight

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "innersight"

# What each part may import of innersight; errors may be known to all. Data flows one way (docs/how-it-works.md).
ALLOWED = {
    "errors": set(),
    "observe": {"observe"},
    "preprocess": set(),
    "images": {"preprocess"},
    "methods": {"methods", "observe"},  # of the engine, its tables of backward rules
    "targets": {"observe"},
    "draw": {"draw"},
    "storage": {"draw"},
    "localize": set(),
    "results": {"draw", "images", "localize", "storage"},
    "layers": {"observe"},
    "formats": {"formats", "observe", "preprocess"},
    "inquiry": {"layers", "methods", "observe", "targets"},
    "network": {"formats", "images", "inquiry", "layers", "maximize", "methods", "observe", "results", "targets"},
    "maximize": {"formats", "layers", "observe", "preprocess", "results", "targets"},
    "data": {"data", "preprocess"},
    "comparison": {
        "comparison", "draw", "images", "inquiry", "layers", "methods", "network", "observe", "results", "storage",
        "targets",
    },
    "viewer": {
        "comparison", "draw", "images", "inquiry", "methods", "network", "observe", "results", "scanning", "storage",
        "targets", "viewer",
    },
}  # fmt: skip


def imported(file, everything=True):
    """(module, line) of every import; without `everything`, of those that run when the file is imported."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if everything else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def for_type_checkers(file):
    """Lines of the imports that do not run."""
    for branch in ast.walk(ast.parse(file.read_text())):
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test):
            yield from (node.lineno for node in ast.walk(branch) if isinstance(node, ast.ImportFrom))


def part(file):
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_data_flows_one_way(file):
    allowed = ALLOWED.get(part(file))
    if allowed is None:
        return  # the command line, the demo and the checks stand on top of everything
    typing_only = set(for_type_checkers(file))
    for name, line in imported(file):
        if name.startswith("innersight.") and line not in typing_only:
            known = name.split(".")[1]
            assert known in allowed | {"errors", "__version__"}, f"{file.name}:{line} imports {name}"


def test_only_plots_knows_matplotlib_and_nobody_pyplot():
    for file in SOURCE.rglob("*.py"):
        names = {name for name, _ in imported(file)}
        assert not any("pyplot" in n for n in names), file
        if file.name != "plots.py":
            assert not any(n.startswith("matplotlib") for n, _ in imported(file, everything=False)), file


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_innersight_loads_nothing_heavy():
    heavy = "torch torchvision numpy PIL matplotlib rich click".split()
    assert run(f"import sys, innersight; print([m for m in {heavy!r} if m in sys.modules])").strip() == "[]"


def test_listing_the_methods_needs_no_torch():
    code = "import sys; from innersight import methods; print(len(methods.all_methods()) > 4, 'torch' in sys.modules)"
    assert run(code).split() == ["True", "False"]


def test_every_public_name_is_there_and_documented():
    for name in innersight.__all__:
        assert getattr(innersight, name) is not None
        assert name == "__version__" or getattr(innersight, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        innersight.nothing  # noqa: B018
    assert set(innersight.__all__) == set(dir(innersight))


def test_the_commands_in_the_documents_exist():
    from innersight.cli import main

    text = "\n".join(f.read_text() for f in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    commands = set(re.findall(r"^(?:\.venv/bin/)?innersight +([a-z]+)", text, re.MULTILINE))
    assert commands
    assert commands <= set(main.list_commands(None))
    targets = set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE))
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_links_and_pictures_in_the_documents_exist():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in link or (document.parent / link).exists(), f"{document.name} links {link}"
