"""A message of jsonargparse as one sentence: which option, what was expected, what came.

The parser tries every type that an option may have, and lists what each of them says. Messages that are not known here
stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

MAX_LISTED = 25
"""Options that an error names; the Trainer has twice as many."""
_CLASS = re.compile(
    r"Expected a dot import path string: (?P<name>[\w.]+)"
    r"|Problem with given class_path '(?P<path>[^']+)': (?P<problem>.+?)(?= - |$| Given value)"
    r"|Multiple subclasses with name (?P<several>\w+)\. Give .+? ambiguity: (?P<paths>.+?)\.(?= )"
    r"|does not correspond to a subclass of (?P<base>\w+)"
    r"|expects a function or a callable class: (?P<missing>.+?)\. Got value: (?P<value>\S+)"
)
_KEY = re.compile(r'Parser key "(?P<key>[^"]+)": (?P<rest>.*)')
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes.*Errors: (?P<errors>.*?) Given value type: .*?"
)
_VALUE = re.compile(r"(?:Given value:|Got value:) ?(?P<value>.*)$")
_EXPECTED = re.compile(r"Expected an? (<class '[^']+'>|typing\.Literal\[[^\]]*\])")
OPTION = re.compile(r"(?:Option|does not accept option) '(?P<option>[^']+)'")
_ARGUMENTS = re.compile(r"unrecognized arguments: --(?P<option>[^\s=]+)")
_REQUIRED = re.compile(r"the following arguments are required: (?P<names>.*)")


def sentence(
    message: str, classes: Mapping[str, Iterable[type]], accepted: Sequence[str], place: str, owner: str
) -> str:
    """What to say of a parser's message.

    Args:
        message: the parser's.
        classes: the classes that an option may name, by its key.
        accepted: keys that were accepted where one was not.
        place: full key of what was not accepted, or lacks something, with its file; "" if unknown.
        owner: class whose options these are; "" if none.

    Example:
        >>> sentence("Option 'rnk' is not accepted", {}, ["alpha", "rank"], "model.lora.rnk", "LoRA")
        'model.lora.rnk: no such option of LoRA (did you mean rank?); there are alpha, rank'
        >>> sentence('Parser key "trainer.max_epochs": Does not validate against any of the Union subtypes Subtypes: '
        ...          "[<class 'int'>, <class 'NoneType'>] Errors: - Expected a <class 'int'> - Expected a "
        ...          "<class 'NoneType'> Given value type: <class 'str'> Given value: abc", {}, [], "", "")
        'trainer.max_epochs: expected int or null, got abc'
    """
    text = " ".join(message.split())
    if found := OPTION.search(text) or _ARGUMENTS.search(text):
        return _not_accepted(found["option"], accepted, place, owner)
    if found := _REQUIRED.search(text):
        return f"{place or 'an option'}: {owner} needs {found['names']}" if owner else text
    if (located := _KEY.search(text)) is None:
        return text
    key, rest = located["key"], located["rest"]
    if owner:  # the key is one of the class's own
        return f"{place or 'an option'}: {owner}: {key}: {_values(rest) or rest}"
    if found := _CLASS.search(rest):
        value = _VALUE.search(rest)
        return f"{key}: {_no_class(found, classes.get(key, ()), value['value'] if value else '')}"
    return f"{key}: {_values(rest) or rest}"


def near(name: str, names: Iterable[str]) -> str:
    """` (did you mean …?)` if there is something near.

    Example:
        >>> near("rnk", ["rank", "alpha"]), near("xyz", ["rank"])
        (' (did you mean rank?)', '')
    """
    by_lower = {other.lower(): other for other in names}
    matches = [by_lower[match] for match in get_close_matches(name.lower(), by_lower, n=2)]
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def _not_accepted(option: str, accepted: Sequence[str], place: str, owner: str) -> str:
    """Compares an option with those beside it: of the same class, or below the same key."""
    beside, inside = sorted(accepted), f" of {owner}" if owner else ""
    above, _, last = option.rpartition(".")
    if not owner:
        known = any(name.startswith(f"{above}.") for name in accepted)
        above, last = (above, last) if known or not above else ("", option.partition(".")[0])
        below = [name.removeprefix(f"{above}.") for name in accepted if not above or name.startswith(f"{above}.")]
        beside = sorted({name.partition(".")[0] for name in below})
        inside = f" of {above}" if above else ""
    listed = f"; there are {', '.join(beside)}" if len(beside) <= MAX_LISTED else "; see --help"
    return f"{place or option}: no such option{inside}{near(last, beside)}{listed}"


def _no_class(found: re.Match[str], classes: Iterable[type], value: str) -> str:
    if found["several"]:
        return f"{found['several']} may be {' or '.join(found['paths'].split(', '))}: give the dotted path"
    if found["base"]:
        return f"expected a {found['base']}, got {value}"
    name = found["name"] or found["path"] or found["value"]
    names = [kind.__name__ for kind in classes]
    hint = near(name.rpartition(".")[2], names)
    problem = found["problem"] or found["missing"]
    if problem:
        return f"{name} cannot be imported: {problem.strip()}{hint}"
    return f"no class is named {name}{hint}; expected a class of Lightning, torch or this package, or a dotted path"


def _values(rest: str) -> str | None:
    value = _VALUE.search(rest)
    union = _UNION.search(rest)
    expected = _EXPECTED.findall(union["errors"] if union else rest)
    if not expected or value is None:
        return None
    words = list(dict.fromkeys(word for one in expected for word in _words(one)))
    if union and len(words) > 1 and "NoneType" in words:
        words = [word for word in words if word != "NoneType"] + ["null"]
    return (
        f"expected {', '.join(words[:-1])}{' or ' if words[:-1] else ''}{words[-1]}, got {value['value'] or 'nothing'}"
    )


def _words(expected: str) -> list[str]:
    """`<class 'a.B'>` as `B`, and a literal as its values."""
    if expected.startswith("typing.Literal"):
        return [value.strip(" '\"") for value in expected[len("typing.Literal[") : -1].split(",")]
    return [expected[len("<class '") : -len("'>")].rpartition(".")[2]]
