import json
import os
import time
import tracemalloc

import pytest

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import MAX_DEPTH, MAX_LINE, read_prompts


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_text_is_a_prompt_a_line(tmp_path):
    prompts = read_prompts(write(tmp_path, "p.txt", "\ufeffeins\r\n\n  zwei ü \n"))
    assert [prompt.text for prompt in prompts] == ["eins", "zwei ü"]
    assert prompts[1].source.endswith("p.txt:3")


def test_json_lines_carry_metadata(tmp_path):
    (prompt,) = read_prompts(
        write(tmp_path, "p.jsonl", '{"prompt": "a", "negative_prompt": "b", "text": "7", "n": 1}\n')
    )
    assert (prompt.text, prompt.negative, prompt.metadata) == ("a", "b", {"text": "7", "n": 1})


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.csv", "a", "ends in .txt or .jsonl"),
        ("p.txt", "", r"p\.txt is empty"),
        ("p.txt", "\n \n", r"p\.txt is empty"),
        ("p.txt", b"fine\nb\xe4d\n", r"p\.txt:2: not UTF-8 \(byte 2 of the line\)"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", '{"text": "a"}', r'p\.jsonl:1: expected an object with a "prompt" string'),
        ("p.jsonl", '["a"]', r"p\.jsonl:1: expected an object"),
        (
            "p.jsonl",
            '{"prompt": "a", "negative_prompt": 3}',
            r"p\.jsonl:1: expected \"negative_prompt\" to be a string",
        ),
        ("p.jsonl", "[" * 100_000, r"p\.jsonl:1: not JSON"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, data, message):
    with pytest.raises(ConfigurationError, match=message):
        read_prompts(write(tmp_path, name, data))


def nested(depth):
    return '{"prompt": "a", "x": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", "fine\nnot \0 fine\n", r"p\.txt:2: character U\+0000 \(byte 5 of the line\) is no text"),
        ("p.txt", "ü\x1b[2J", r"p\.txt:1: character U\+001B \(byte 3 "),
        ("p.txt", "a\x7f", r"U\+007F"),
        ("p.txt", "a\x85b", r"U\+0085"),
        ("p.txt", "a cat\n".encode("utf-16"), r"p\.txt:1: not UTF-8 \(byte 1 of the line\)"),
        ("p.txt", "a cat\n".encode("utf-16-le"), r"p\.txt:1: character U\+0000 \(byte 2 "),
        ("p.txt", "ü\n".encode() + b"ok\n" + "aü".encode() + b"\xff\n", r"p\.txt:3: not UTF-8 \(byte 4 of the line\)"),
        ("p.txt", b"\xed\xa0\x80", r"p\.txt:1: not UTF-8 \(byte 1 "),
        ("p.txt", b"a\n\xc3", r"p\.txt:2: not UTF-8 \(byte 1 "),
        ("p.txt", "ok\n" + "ü" * (MAX_LINE + 1), rf"p\.txt:2: expected at most {MAX_LINE} characters a line"),
        ("p.jsonl", b'{"prompt": "\x00"}', r"p\.jsonl:1: character U\+0000 \(byte 13 "),
        ("p.jsonl", r'{"prompt": "a\u0000b"}', r"p\.jsonl:1: character U\+0000 in a string"),
        ("p.jsonl", r'{"prompt": "a", "negative_prompt": "\u001b"}', r"character U\+001B in a string"),
        ("p.jsonl", r'{"prompt": "a", "x": [{"y": "\b"}]}', r"character U\+0008 in a string"),
        ("p.jsonl", r'{"prompt": "a", "\f": 1}', r"character U\+000C in a string"),
        ("p.jsonl", r'{"prompt": "\ud83d"}', r"character U\+D83D in a string"),
        ("p.jsonl", '{"prompt": "a", "x": NaN}', r"p\.jsonl:1: expected finite numbers, got NaN"),
        ("p.jsonl", '{"prompt": "a", "x": [-Infinity]}', r"expected finite numbers, got -Infinity"),
        ("p.jsonl", '{"prompt": "a", "x": 1e999}', r"expected finite numbers, got 1e999"),
        ("p.jsonl", '{"prompt": "a", "x": ' + "9" * 5000 + "}", r"at most 100 digits, got one of 5000"),
        (
            "p.jsonl",
            '{"prompt": "a", "x": 1, "prompt": "b"}',
            r"p\.jsonl:1: expected each key once, got 'prompt' twice",
        ),
        ("p.jsonl", '{"prompt": "a", "x": {"y": 1, "y": 1}}', r"expected each key once, got 'y' twice"),
        ("p.jsonl", nested(MAX_DEPTH + 1), rf"p\.jsonl:1: expected at most {MAX_DEPTH} lists and objects"),
        ("p.jsonl", nested(40_000), r"p\.jsonl:1: not JSON that can be read: nested too deeply"),
        ("p.jsonl", '{"a":' * 15_000, r"p\.jsonl:1: not JSON"),
        ("p.jsonl", '"a cat"', r"p\.jsonl:1: expected an object"),
        ("p.jsonl", "7", r"p\.jsonl:1: expected an object"),
        ("p.jsonl", "null", r"p\.jsonl:1: expected an object"),
        ("p.jsonl", '[{"prompt": "a"}]', r"p\.jsonl:1: expected an object"),
        ("p.jsonl", '{"prompt": "a"} {"prompt": "b"}', r"p\.jsonl:1: not JSON: Extra data"),
    ],
)
def test_hostile_files_are_named_with_their_line(tmp_path, name, data, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        read_prompts(write(tmp_path, name, data))
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_what_is_unusual_but_well(tmp_path):
    lines = ["\ttab", "\ufeffmark", "👩\u200d🎨", "right\u200fto left", "a\u2028b"]
    texts = [prompt.text for prompt in read_prompts(write(tmp_path, "p.txt", "\r".join(lines)))]
    assert texts == ["tab", "mark", "👩\u200d🎨", "right\u200fto left", "a\u2028b"]
    row = {
        "prompt": "two\nlines 🐈",
        "path": "C:\\ubar",
        "x": 10**30,
        "y": [1.5, None, True],
        "tag": "!!python/name:os",
    }
    (prompt,) = read_prompts(write(tmp_path, "p.jsonl", "\ufeff" + json.dumps(row)))
    assert {"prompt": prompt.text, **prompt.metadata} == row
    assert read_prompts(write(tmp_path, "p.txt", "ü" * MAX_LINE + "\nb"))[0].text == "ü" * MAX_LINE
    read_prompts(write(tmp_path, "p.jsonl", nested(MAX_DEPTH)))


@pytest.mark.parametrize("data", [b"x" * 50_000_000, b"[" * 50_000_000, b'{"prompt": "' + b"x" * 50_000_000 + b'"}'])
def test_a_line_of_50_mb_is_refused_without_reading_it(tmp_path, data):
    path = write(tmp_path, "p.jsonl", data)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigurationError, match=rf"p\.jsonl:1: expected at most {MAX_LINE} characters a line$"):
            read_prompts(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_million_lines_are_read_in_seconds(tmp_path):
    path = write(tmp_path, "p.txt", "".join(f"a cat and {number} dogs\n" for number in range(1_000_000)))
    start = time.process_time()
    prompts = read_prompts(path)
    assert time.process_time() - start < 20  # 2.5 s on a slow machine
    assert (len(prompts), prompts[-1].text) == (1_000_000, "a cat and 999999 dogs")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.mkdir(), "a directory"),
        (lambda path: os.mkfifo(path), r"a named pipe \(FIFO\)"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, make, kind):
    """A pipe would be waited for, a device might never end."""
    path = tmp_path / "prompts.txt"
    make(path)
    with pytest.raises(ConfigurationError, match=rf"prompts\.txt: expected a prompt file, got {kind}: save"):
        read_prompts(path)
