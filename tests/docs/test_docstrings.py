"""Examples in the docstrings of modules and classes are what they look like: Python, YAML, TOML or JSON.

An example is a block that is indented by four spaces. What it is written in is seen from its first lines; commands,
formulas and drawings are not parsed. Text at the margin that looks like an example has lost its indentation, and the
site would show it as one paragraph. The formatter takes the indentation away where nothing but the first line stands at
the margin: introduce the example by a line that does.
"""

import ast
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for folder in ("lightning_fdfo", "rewards/lightning_fdfo_rewards") for path in (ROOT / folder).rglob("*.py")
)
SECTION = re.compile(r"(Args|Attributes|Example|Raises|Returns|Yields):")
STATEMENT = re.compile(r"(from \S+ import|import|def|class) ?\b.*|@\w.*")
KEY = re.compile(r"[\w.-]+:( .*)?")
COLUMN = re.compile(r"[\w ]+: {2,}\S.*")
"""`file:       what it holds`, as in a table."""


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef) and (text := ast.get_docstring(node, clean=False)) is not None:
            yield re.sub(rf"^ {{{node.body[0].col_offset}}}", "", text, flags=re.MULTILINE).rstrip()


def paragraphs(docstring: str) -> Iterator[str]:
    """What stands at the margin, each as it is written, and each indented block; sections like `Args:` are left out."""
    lines: list[str] = []
    in_section = False
    for line in docstring.splitlines()[1:]:
        if line and not line.startswith(" "):
            in_section = SECTION.fullmatch(line) is not None
        if in_section:
            continue
        if line:
            lines.append(line)
        elif lines and not lines[0].startswith(" "):
            yield "\n".join(lines)
            lines = []
        elif lines:
            lines.append("")  # a block may have empty lines
        if lines and lines[0].startswith(" ") and line and not line.startswith(" "):
            yield "\n".join(lines[:-1]).rstrip()
            lines = [line]
    if lines:
        yield "\n".join(lines).rstrip()


def language(block: str) -> str | None:
    lines = [line for line in block.splitlines() if line and not line.startswith(" ")]
    if lines[0].startswith('{"'):
        return "JSON"
    if re.fullmatch(r"\[[\w.\"-]+\]", lines[0]):
        return "TOML"
    if any(STATEMENT.fullmatch(line) for line in lines):
        return "Python"
    return "YAML" if all(KEY.fullmatch(line) or line.startswith("#") for line in lines) else None


def parse(block: str) -> None:
    """Raises ValueError or SyntaxError for a block that is not what it looks like."""
    kind = language(block)
    if kind == "JSON":
        for line in block.splitlines():
            json.loads(line)
    elif kind == "TOML":
        tomllib.loads(block)
    elif kind == "Python":
        ast.parse(block)
    elif kind == "YAML":
        try:
            parsed = yaml.safe_load(block)
        except yaml.YAMLError as error:
            raise ValueError(f"no YAML: {error}") from error
        if any(value is None for value in parsed.values()):
            raise ValueError("a key without a value: what belongs to it is not indented")


def has_lost_its_indentation(paragraph: str) -> bool:
    lines = paragraph.splitlines()
    above_all = [line for line in lines if not line.startswith(" ")]
    return (
        lines[0].startswith("lightning-fdfo ")
        or any("-->" in line for line in lines)
        or STATEMENT.fullmatch(lines[0]) is not None
        or (len(lines) > 1 and all(KEY.fullmatch(line) or COLUMN.fullmatch(line) for line in above_all))
    )


def problems(source: str) -> Iterator[str]:
    for docstring in docstrings(source):
        for paragraph in paragraphs(docstring):
            if not paragraph.startswith(" "):
                if has_lost_its_indentation(paragraph):
                    yield f"an example at the margin: indent it by four spaces\n{paragraph}"
                continue
            try:
                parse(textwrap.dedent(paragraph))
            except (ValueError, SyntaxError) as error:
                yield f"{error}\n{paragraph}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_are_what_they_look_like(path):
    assert not list(problems(path.read_text(encoding="utf-8")))


LOST = {
    "YAML": "small:\nreward: {class_path: JPEGSize}\nscale: std",
    "YAML with a comment": "OCR: 1.0      # short\nsmall:        # long\nreward: JPEGSize\nweight: {0: 1.0, 20: 0.3}",
    "Python": "from lightning_fdfo.testing import check_reward\n\ndef test_it():\n    check_reward(Redness())",
    "a command": "lightning-fdfo fit --config configs/quickstart.yaml",
    "a drawing": "RunFiles --pictures--> template.html --> one file",
    "a table": "file:          model.flow: {class_path: Flux}\ncommand line:  --model.flow.class_path Flux",
}
"""As examples stood in docstrings when they had lost their indentation."""


@pytest.mark.parametrize("text", LOST.values(), ids=LOST)
def test_an_example_without_its_indentation_is_found(text):
    assert "at the margin" in next(problems(f'"""What it is.\n\n{text}\n"""'))
    assert "at the margin" in next(
        problems(f'class A:\n    """What it is, for example:\n\n{textwrap.indent(text, "    ")}\n    """')
    )
    assert not list(problems(f'"""What it is.\n\n{textwrap.indent(text.replace("small:", "small: 1"), "    ")}\n"""'))


@pytest.mark.parametrize(
    "block",
    [
        "small:\nreward: JPEGSize",
        "rewards: {OCR: 1.0\nscale: std",
        "def test_it():\ncheck_reward(Redness())",
        '{"prompt": "\\"427" in red"}',
        '[project.entry-points."a.b"]\nName = module:Class',
    ],
)
def test_a_block_that_does_not_parse_is_found(block):
    assert list(problems(f"r'''What it is.\n\n{textwrap.indent(block, '    ')}\n'''"))


def test_prose_formulas_and_drawings_are_left_alone():
    text = """What it is.

    Legend: N images, P pairs.

    Source: https://example.org, section 3, and
    what else there is.

        total = sum_t weight_t * score_t
        GET  /reward    -> Description

    Args:
        flow: the model.
        rewards:
            the mixture.
    """
    assert not list(problems(f'"""{text}"""'))
