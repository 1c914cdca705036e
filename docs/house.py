"""The house: the package's rooms, which imports which, as a picture, and every file in a line, as a tree.

A room is a folder of `lightning_fdfo`, or a module that lies flat in it. `FLOORS` says which rooms may import which:

    python docs/house.py    # draws docs/images/house.svg, and writes the tree into CONTRIBUTING.md

The imports are read from the source, wherever they stand in a file; nothing of the package is imported. `__init__.py`
of the package is no room: it imports each public name when it is first used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import house_picture

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_fdfo"
PICTURE = ROOT / "docs/images/house.svg"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
FLOORS = (
    ("__main__",),
    ("commands",),
    ("export", "people"),
    ("report", "remote", "testing"),
    ("callbacks",),
    ("module",),
    ("guards", "evaluation", "data"),
    ("checkpoints",),
    ("training",),
    ("rollout",),
    ("flows", "reward"),
    ("settings", "sampling", "hub", "parallel", "prompts"),
    ("files", "finite", "schedules"),
    ("objective", "randomness", "image_statistics", "errors"),
)
"""From the roof down. A room imports only rooms on floors below its own."""
GROUND = 3
"""Floors of small modules at the bottom, which every room may import: the picture shows them as one."""
START, END = "<!-- tree: python docs/house.py -->\n```text\n", "```\n<!-- end of tree -->"


class Import(NamedTuple):
    """An import of one of the package's modules by another."""

    importer: str
    imported: str
    for_types: bool
    """under `if TYPE_CHECKING`: for annotations, and not executed"""


def module_name(path: Path) -> str:
    """The dotted name below the package: `rollout.pairs`; `rollout` for `rollout/__init__.py`, and `` for the root."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module: str) -> str:
    """The room of a module: its first folder, or itself."""
    return module.partition(".")[0]


def sources() -> dict[str, Path]:
    """Name of each module -> its file."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports() -> Iterator[Import]:
    """Every import of one of the package's modules by another, the package's root left out."""
    names = sources()
    for importer, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = {
            id(node)
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
            for statement in branch.body
            for node in ast.walk(statement)
        }
        for node in ast.walk(tree) if importer else ():
            for imported in _imported(node, names):
                yield Import(importer, imported, id(node) in for_types)


def _imported(node: ast.AST, names: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        full = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
        full = [alias.name for alias in node.names]
    else:
        return
    for name in full:
        package, _, module = name.partition(".")
        if package == PACKAGE.name:
            yield module if module in names else module.rpartition(".")[0]


def edges(*, for_types: bool) -> set[tuple[str, str]]:
    """Pairs of rooms, the first of which imports the second; those that imports for types alone make, or the others."""
    found = [(room_of(one), room_of(other), typed) for one, other, typed in imports()]
    run = {(one, other) for one, other, typed in found if one != other and not typed}
    return {(one, other) for one, other, typed in found if one != other and typed} - run if for_types else run


def floor_of(room: str) -> int:
    """The number of a room's floor, 0 at the top.

    Raises:
        ValueError: the room stands on no floor of `FLOORS`.
    """
    for number, floor in enumerate(FLOORS):
        if room in floor:
            return number
    raise ValueError(f"{room}: expected every folder and flat module of {PACKAGE.name} in FLOORS of {__file__}")


def below(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that can be reached from a node, the node itself only if there is a circle."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def reduced(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges of an acyclic graph that no chain of others implies."""
    graph: dict[str, set[str]] = {}
    for one, other in pairs:
        graph.setdefault(one, set()).add(other)
    return {(a, b) for a, b in pairs if not any(b in below(graph, c) for c in graph[a] - {b})}


def summary(path: Path) -> str:
    """The first sentence or line of a module's docstring, without its last full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ").rstrip(".")


def summary_of(room: str) -> str:
    """What a room is for."""
    return summary(PACKAGE / f"{room}.py" if (PACKAGE / f"{room}.py").exists() else PACKAGE / room / "__init__.py")


def picture() -> str:
    """The rooms as SVG: one box each, with what it is for, and an arrow to each room that it imports.

    An arrow that a chain of others implies is left out. The floors of the ground are one box, without arrows.
    """
    rooms = [room for floor in FLOORS[:-GROUND] for room in floor]
    ground = [f"{room}.py" for floor in FLOORS[-GROUND:] for room in floor]
    boxes = [{room: summary_of(room).replace("`", "") for room in floor} for floor in FLOORS[:-GROUND]]
    boxes.append({"ground: every room may import it": ", ".join(ground)})
    return house_picture.draw(boxes, reduced({edge for edge in edges(for_types=False) if set(edge) <= set(rooms)}))


def tree() -> str:
    """Every Python file of the package below its folder, each with the first sentence of its docstring."""
    lines = [f"{PACKAGE.name}/"]
    for folder in [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)]:
        indent = "  "
        if folder != PACKAGE:
            name = f"{folder.relative_to(PACKAGE).as_posix()}/"
            lines.append(f"{indent}{name:24}  {summary(folder / '__init__.py')}")
            indent = "    "
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"{indent}{path.name:{26 - len(indent)}}  {summary(path)}")
    return "\n".join(lines) + "\n"


def with_tree(text: str) -> str:
    """A page with the tree between its two marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{tree()}{END}{after}"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    CONTRIBUTING.write_text(with_tree(CONTRIBUTING.read_text(encoding="utf-8")), encoding="utf-8")
