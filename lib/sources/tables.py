"""Rows of other people's files: jsonl, json, csv, tsv, parquet; and the text in a column of theirs.

A name is a text, whatever it looks like: 007, 1e5, true and NA stay what stands in the file, in every format.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from lib import UserError
from lib.run.files import read_jsonl
from lib.run.text import readable

JSON = (".jsonl", ".json")  # their rows may hold anything, and are a user's own; a table has columns
LONGEST_CELL = 2**31 - 1  # characters, of a csv


class AsWritten(float):
    """A number of a JSON file that remembers how it was written there: "1e5" is no "100000.0"."""

    text: str

    def __new__(cls, text: str) -> AsWritten:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def read_table(path: Path) -> list[dict]:
    """Rows of a jsonl, json, csv, tsv or parquet file, `readable`. UserError if it is not there, malformed or empty."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.suffix not in READERS:
        raise UserError(f"{path}: ends in {path.suffix or 'nothing'}; allowed {', '.join(READERS)}")
    try:
        rows = READERS[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # each format has its own kinds of malformed
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} ({reason})") from error
    if not rows:
        raise UserError(f"{path}: is empty")
    return [readable(row) for row in rows]


def _read_lines(path: Path) -> list[dict]:
    return read_jsonl(path, parse_float=AsWritten)


def _read_json(path: Path) -> list[dict]:
    """An array of objects; or an object a line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), parse_float=AsWritten)
    except json.JSONDecodeError:
        return _read_lines(path)
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("allowed: an array of objects, or an object a line")
    return rows


def _read_csv(path: Path) -> list[dict]:
    """Cells as they stand, with no guess at their types. A tsv, too."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(
            file, delimiter="\t" if path.suffix == ".tsv" else ",", restval="", strict=True
        )
        rows = []
        try:
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"line {reader.line_num}: more cells than the header has, {len(reader.fieldnames or [])}"
                    )
                rows.append(row)
        except csv.Error as error:
            raise ValueError(f"the record that begins in line {reader.line_num + 1}: {error}") from None
    return rows


def _read_parquet(path: Path) -> list[dict]:
    import datasets  # slow to import, and other formats have no need of it

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        return datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()  # type: ignore[union-attr]


READERS: dict[str, Callable[[Path], list[dict]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def columns_of(rows: Iterable[dict]) -> list[str]:
    """Names of the columns: of a datasets.Dataset, or the keys of any row."""
    names = getattr(rows, "column_names", None)
    return list(names) if names is not None else list(dict.fromkeys(key for row in rows for key in row))


# ---- the text that a prompt is about: HarmBench's contextual behaviours --------------------------------------


# ---- the text in a column ------------------------------------------------------------------------------------


def first_text(row: dict, columns: str) -> str:
    """The text in the first of `columns`, names by comma, that has some, or "". A name may be a path, "a.0.b". Of a
    conversation, it is the first turn of the user.

    >>> first_text({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}, "goal,prompt")
    'Hello'
    """
    return next((text for value in _cells(row, columns) if (text := text_of(value)).strip()), "")


def other_turns(row: dict, columns: str) -> list[str]:
    """Roles of the turns that `first_text` leaves out, where it takes one of a conversation."""
    value = next((value for value in _cells(row, columns) if text_of(value).strip()), None)
    roles = [role for role, _ in turns(value)]
    return roles[: (first := roles.index("user"))] + roles[first + 1 :] if roles else []


def turns(value: Any) -> list[tuple[str, str]]:
    """(role, text) of each turn of a conversation: [{"role", "content"}, ...], or ShareGPT's [{"from", "value"}, ...]. Of
    anything else, []."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return []
    found = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):  # of parts: [{"type": "text", "text": ...}, ...]
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        found.append(("user" if role == "human" else str(role or ""), str(content or "")))
    return found


def text_of(value: Any) -> str:
    """The text that stands in a cell, numbers and truth values as JSON writes them; "" for what holds no text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | date) or (isinstance(value, float) and value == value):
        return str(value)
    return next((text for role, text in turns(value) if role == "user"), "")


def _cells(row: dict, columns: str) -> Iterator[Any]:
    """What stands in each of the columns, where they are there."""
    for column in columns.split(","):
        value: Any = row
        for step in column.strip().split("."):
            if isinstance(value, dict):
                value = value.get(step)
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                value = None
        yield value
