"""Training data: .jsonl, .json, .csv and .txt files in five shapes, recognised by their keys.

Every shape becomes one of three samples: messages (chat, sharegpt, alpaca), prompt and completion, or text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SUFFIXES = (".jsonl", ".json", ".csv", ".txt")


@dataclass(frozen=True)
class Sample:
    """`messages`, or `prompt` with `completion`, or `text`; `where` names its place in the file."""

    where: str
    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


def load(path: str | Path) -> tuple[str, list[Sample]]:
    """Read a data file: its shape's name, and its samples.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: with file:line and what was expected, for anything malformed, mixed, unknown or empty.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of data file {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8-sig").strip()
            shape, samples = "text", [Sample(str(path), text=text)] if text else []
        else:
            shape, samples = _recognise(path, list(_records(path)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if not samples:
        raise ValueError(f"{path}: the data set is empty")
    return shape, samples


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its place in the file."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            try:
                for row in reader:
                    where = f"{path}:{reader.line_num}"
                    if None in row or None in row.values():
                        raise ValueError(f"{where}: expected {len(reader.fieldnames)} columns, as in the first line")
                    yield where, row
            except csv.Error as error:
                raise ValueError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error
        return
    if path.suffix == ".json":
        try:
            records = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg}; expected a list of objects"
            ) from error
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a list of objects, got {type(records).__name__}")
        places = [(f"{path}[{index}]", record) for index, record in enumerate(records)]
    else:
        places = _json_lines(path)
    for where, record in places:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield where, record


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not valid JSON at column {error.colno}: {error.msg}; expected an object a line"
                ) from error


def _recognise(path: Path, records: list[tuple[str, dict]]) -> tuple[str, list[Sample]]:
    if not records:
        return "", []
    where, first = records[0]
    shape = next((name for name, (keys, _) in SHAPES.items() if keys <= first.keys()), None)
    if shape is None:
        expected = "; or ".join(" and ".join(sorted(keys)) for keys, _ in SHAPES.values())
        raise ValueError(f"{where}: found the keys {', '.join(map(str, first)) or '(none)'}; expected {expected}")
    keys, convert = SHAPES[shape]
    samples = []
    for where, record in records:
        missing = keys - record.keys()
        if missing:
            raise ValueError(
                f"{where}: the key {sorted(missing)[0]!r} is missing; the first record is of shape {shape}"
            )
        samples.append(convert(where, record))
    return shape, samples


def _string(where: str, record: dict, key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key} must be a string, got {type(record[key]).__name__}")
    return record[key]


def _turns(where: str, record: dict, key: str, role_key: str, content_key: str, roles: dict[str, str]) -> list[dict]:
    """A conversation as chat messages; each turn's role and content checked."""
    turns = record[key]
    if isinstance(turns, str):  # a CSV cell
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: {key} is not valid JSON: {error.msg}") from error
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: {key} must be a list of turns with {role_key} and {content_key}")
    messages = []
    for index, turn in enumerate(turns):
        place = f"{where}: {key}[{index}]"
        if not isinstance(turn, dict) or not {role_key, content_key} <= turn.keys():
            raise ValueError(f"{place} must be an object with {role_key} and {content_key}")
        if not isinstance(turn[role_key], str) or turn[role_key] not in roles:
            raise ValueError(f"{place}: unknown role {turn[role_key]!r}, expected one of {', '.join(roles)}")
        messages.append({"role": roles[turn[role_key]], "content": _string(place, turn, content_key)})
    return messages


def _chat(where: str, record: dict) -> Sample:
    roles = {role: role for role in ROLES}
    return Sample(where, messages=_turns(where, record, "messages", "role", "content", roles))


def _sharegpt(where: str, record: dict) -> Sample:
    return Sample(where, messages=_turns(where, record, "conversations", "from", "value", SHAREGPT_ROLES))


def _prompt_completion(where: str, record: dict) -> Sample:
    prompt, completion = _string(where, record, "prompt"), _string(where, record, "completion")
    return Sample(where, prompt=prompt, completion=completion)


def _alpaca(where: str, record: dict) -> Sample:
    question = _string(where, record, "instruction")
    if record.get("input"):
        question += "\n\n" + _string(where, record, "input")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _string(where, record, "output")}]
    return Sample(where, messages=turns)


def _text(where: str, record: dict) -> Sample:
    return Sample(where, text=_string(where, record, "text"))


SHAPES = {
    "chat": ({"messages"}, _chat),
    "sharegpt": ({"conversations"}, _sharegpt),
    "prompt/completion": ({"prompt", "completion"}, _prompt_completion),
    "alpaca": ({"instruction", "output"}, _alpaca),
    "text": ({"text"}, _text),
}
