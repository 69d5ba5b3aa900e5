from __future__ import annotations

import json

import pytest

from pyqlora.finetune.data import Sample, load

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "shape", "expected"),
    [
        ({"messages": TURNS}, "chat", {"messages": TURNS}),
        ({"prompt": "a", "completion": "b"}, "prompt/completion", {"prompt": "a", "completion": "b"}),
        (
            {"instruction": "hi", "input": "", "output": "ho"},
            "alpaca",
            {"messages": TURNS},
        ),
        (
            {"instruction": "hi", "input": "you", "output": "ho"},
            "alpaca",
            {"messages": [{"role": "user", "content": "hi\n\nyou"}, TURNS[1]]},
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "sharegpt",
            {"messages": TURNS},
        ),
        ({"text": "öğle"}, "text", {"text": "öğle"}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_shapes_are_recognised(tmp_path, record, shape, expected, suffix):
    path = write(tmp_path / f"d{suffix}", [record, record] if suffix == ".json" else json.dumps(record) + "\n\n")
    found, samples = load(path)
    assert found == shape
    assert samples[0] == Sample(f"{path}[0]" if suffix == ".json" else f"{path}:1", **expected)
    assert len(samples) == (2 if suffix == ".json" else 1)


def test_csv(tmp_path):
    path = write(tmp_path / "d.csv", 'prompt,completion,note\n"a, b","c\nd",x\ne,f,y\n')
    assert load(path) == (
        "prompt/completion",
        [Sample(f"{path}:3", prompt="a, b", completion="c\nd"), Sample(f"{path}:4", prompt="e", completion="f")],
    )


def test_csv_with_conversations_in_cells(tmp_path):
    cell = json.dumps(TURNS).replace('"', '""')
    assert load(write(tmp_path / "d.csv", f'messages\n"{cell}"\n'))[1][0].messages == TURNS


def test_txt(tmp_path):
    path = write(tmp_path / "d.txt", "\ufeffone\n\ntwo\n")
    assert load(path) == ("text", [Sample(str(path), text="one\n\ntwo")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": \n', r"d\.jsonl:2: not valid JSON at column 9: .*; expected an object"),
        ("d.jsonl", '{"text": "a"}\n[1]\n', r"d\.jsonl:2: expected a JSON object, got list"),
        ("d.json", "[1,", r"d\.json:1: not valid JSON: .*; expected a list of objects"),
        ("d.json", '{"text": "a"}', r"d\.json: expected a list of objects, got dict"),
        ("d.jsonl", '{"question": "a"}', r"d\.jsonl:1: found the keys question; expected messages; or conversations; "),
        (
            "d.jsonl",
            '{"text": "a"}\n{"prompt": "a"}',
            r"d\.jsonl:2: the key .text. is missing; the first",
        ),
        ("d.jsonl", '{"text": 1}', r"d\.jsonl:1: text must be a string, got int"),
        ("d.jsonl", '{"messages": []}', r"d\.jsonl:1: messages must be a list of turns with role and content"),
        ("d.jsonl", '{"messages": "hello"}', r"d\.jsonl:1: messages is not valid JSON"),
        ("d.jsonl", '{"messages": [{"role": "user"}]}', r"d\.jsonl:1: messages\[0\] must be an object with role and"),
        (
            "d.jsonl",
            '{"messages": [{"role": "bot", "content": "a"}]}',
            r"d\.jsonl:1: messages\[0\]: unknown role 'bot', expected one of system, user, assistant, tool",
        ),
        (
            "d.jsonl",
            '{"conversations": [{"from": "alien", "value": "a"}]}',
            r"d\.jsonl:1: conversations\[0\]: unknown role 'alien', expected one of system, human, user, gpt",
        ),
        ("d.csv", "prompt,completion\na\n", r"d\.csv:2: expected 2 columns, as in the first line"),
        ("d.csv", 'prompt,completion\n"a,b\n', r"d\.csv:\d: not valid CSV"),
        ("d.jsonl", "\n", r"d\.jsonl: the data set is empty"),
        ("d.json", "[]", r"d\.json: the data set is empty"),
        ("d.csv", "prompt,completion\n", r"d\.csv: the data set is empty"),
        ("d.txt", " \n", r"d\.txt: the data set is empty"),
        ("d.parquet", "", r"d\.parquet: unknown kind of data file '\.parquet', expected one of \.jsonl"),
    ],
)
def test_errors(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / name, content))


def test_unhashable_role_is_unknown(tmp_path):
    with pytest.raises(ValueError, match=r"unknown role \['user'\]"):
        load(write(tmp_path / "d.jsonl", '{"messages": [{"role": ["user"], "content": "a"}]}'))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such data file"):
        load(tmp_path / "gone.jsonl")


def test_not_text(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=r"d\.jsonl: not UTF-8 text at byte 10"):
        load(tmp_path / "d.jsonl")
