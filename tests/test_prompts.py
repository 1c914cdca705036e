import pytest

from lightning_fdfo.errors import ConfigurationError
from lightning_fdfo.prompts import read_prompts


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


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "nowhere.txt")
