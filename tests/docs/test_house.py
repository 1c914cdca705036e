"""The house keeps its plan: imports go down, files and functions stay short, and the drawn plan is the built one."""

import ast
import re
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import house  # noqa: E402

MOST_FLAT, MOST_LINES, MOST_OF_A_FUNCTION = 16, 300, 60
SOURCES = sorted(
    path
    for folder in ("lightning_fdfo", "rewards", "examples", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if not {"build", ".venv"} & set(path.relative_to(ROOT).parts)
)
STALE = "run: python docs/house.py"


def test_every_room_has_its_floor():
    built = {house.room_of(name) for name in house.sources() if name} - {"assets"}
    assert built == {room for floor in house.FLOORS for room in floor}


def test_a_room_imports_only_rooms_below_it():
    upward = [pair for pair in house.edges(for_types=False) if house.floor_of(pair[0]) >= house.floor_of(pair[1])]
    assert not upward


def test_imports_for_annotations_alone_go_down_too():
    upward = {pair for pair in house.edges(for_types=True) if house.floor_of(pair[0]) >= house.floor_of(pair[1])}
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    graph = {}
    for one, other, for_types in house.imports():
        if not for_types:
            graph.setdefault(one, set()).add(other)
    assert not [name for name in graph if name in house.below(graph, name)]


def test_few_modules_lie_flat():
    assert len(list(house.PACKAGE.glob("*.py"))) <= MOST_FLAT


def test_no_file_is_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES
    }
    assert not {path: length for path, length in lengths.items() if length > MOST_LINES}


def test_no_function_is_long():
    long = [
        f"{path.relative_to(ROOT)}: {node.name} has {length} lines"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1 - docstring_lines(node)) > MOST_OF_A_FUNCTION
    ]
    assert not long


def docstring_lines(node):
    """What documents a function does not count as its length."""
    first = node.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0


def test_the_picture_is_current():
    assert house.PICTURE.read_text(encoding="utf-8") == house.picture(), STALE


def test_the_file_tree_is_the_repositorys():
    page = house.CONTRIBUTING.read_text(encoding="utf-8")
    tree = page.partition(house.START)[2].partition(house.END)[0]
    paths, folder = set(), ""
    for line in tree.splitlines()[1:]:
        name = line.split()[0]
        folder = name if name.endswith("/") else folder
        if not name.endswith("/"):
            paths.add(f"{folder if line.startswith('    ') else ''}{name}")
    built = {path.relative_to(house.PACKAGE).as_posix() for path in house.PACKAGE.rglob("*.py")}
    assert paths == {path for path in built if not path.endswith("__init__.py")}, STALE
    assert house.with_tree(page) == page, STALE


def test_the_plan_names_what_is_there():
    """Rows of the tables in CONTRIBUTING: `file` exists, and has the names that stand beside it."""
    page = house.CONTRIBUTING.read_text(encoding="utf-8")
    found = 0
    for row in re.findall(r"^\|.*\|$", page.partition("## Rules")[0], flags=re.MULTILINE):
        words = re.findall(r"`([^`]+)`", row)
        paths = [ROOT / word for word in words if "/" in word]
        text = ""
        for path in paths:
            assert path.exists(), row
            text += path.read_text(encoding="utf-8") if path.is_file() else ""
        for name in [word for word in words if re.fullmatch(r"\w+", word)] if paths else []:
            assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", text, flags=re.MULTILINE), f"{row}: {name}"
            found += 1
    assert found > 10
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page):
        assert (ROOT / (target[0] or target[1])).exists(), target


@pytest.mark.parametrize("path", [path for path in SOURCES if house.PACKAGE in path.parents], ids=lambda p: p.stem)
def test_files_that_a_docstring_or_comment_names_exist(path):
    """`stop.py` beside the file, `guards/stop.py` in the package, `docs/resume.md` in the repository."""
    for name in re.findall(
        r"(?<![\w/.<{*])((?:[\w-]+/)*[a-z_]\w*\.(?:py|md))\b(?!\()", path.read_text(encoding="utf-8")
    ):
        places = [path.parent, house.PACKAGE, ROOT, ROOT / "docs"]
        assert name == "README.md" or any((place / name).exists() for place in places), name


def docstrings(kinds):
    for path in house.sources().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds) and (text := ast.get_docstring(node, clean=not isinstance(node, ast.Module))):
                yield path.relative_to(ROOT), text


def test_blocks_in_docstrings_are_indented_and_are_what_they_look_like():
    """A block of Python or YAML, such as in the docstring of `reward/term.py`, keeps its indentation, and parses.

    ruff formats an indented block away, unless an unindented sentence stands between it and the first line.
    """
    found = []
    for path, text in docstrings(ast.Module | ast.ClassDef | ast.FunctionDef):
        assert not re.search(r"^(?:from \S+ import |import \w+$|def \w+\(|lightning-fdfo .*--)", text, re.MULTILINE), (
            path
        )
        for block in re.findall(r"(?:^|\n\n)((?: {4}.*(?:\n|$)|\n(?= {4}))+)", text):
            code = textwrap.dedent(block)
            if re.match(r"(?:from|import|def|class) \w", code):
                ast.parse(code)
            elif re.match(r"\w+:\n +\S", code):
                assert isinstance(yaml.safe_load(code), dict), path
            else:
                continue
            found.append(path.name)
    assert {"term.py", "flow_checks.py"} <= set(found)


def test_only_hooks_of_lightning_have_no_docstring():
    hooks = {name for cls in (Callback, LightningModule, LightningDataModule) for name in dir(cls)}
    bare = [
        f"{path.relative_to(ROOT)}: {cls.name}.{method.name}"
        for path in house.sources().values()
        for cls in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(cls, ast.ClassDef) and not cls.name.startswith("_")
        for method in cls.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
        if ast.get_docstring(method) is None and method.name not in hooks
    ]
    assert not bare
