"""Rows of other people's tables, from files and from the hub, and the text in a cell.

Text stays what stands in the file: 007, 1e5, true and NA are names. `datasets` guesses types of csv and json,
so these are read without it.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from lib import UserError
from lib.run.files import read_jsonl

JSON = (".jsonl", ".json")  # their rows may hold anything; a table has columns
READABLE = (*JSON, ".csv", ".tsv", ".parquet")


def read_table(path: Path) -> list[dict]:
    """Rows of a READABLE file; a json file is an array, or like jsonl. UserError if there are none."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # slow to import; `datasets` needs it anyway

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix in (".csv", ".tsv"):
            csv.field_size_limit(2**31 - 1)
            with path.open(encoding="utf-8-sig", newline="") as file:
                comma = "\t" if path.suffix == ".tsv" else ","
                rows = list(csv.DictReader(file, delimiter=comma, restval="", strict=True))
        elif path.suffix == ".json" and (text := path.read_text(encoding="utf-8-sig")).lstrip()[:1] == "[":
            rows = json.loads(text)
        else:
            return read_jsonl(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's are ValueErrors
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} ({reason})") from error
    if not rows or not all(isinstance(row, dict) and None not in row for row in rows):
        what = "has a row that is no object, or has more cells than the header" if rows else "is empty"
        raise UserError(f"{path}: {what}")
    return rows


def load_rows(place: str, **options: Any) -> Any:
    """OWNER/NAME[:CONFIG]:SPLIT of the hub, a datasets.Dataset; its own code is not run. Raises UserError."""
    import datasets  # slow to import, and the sandbox has no need of it

    name, *config, split = place.split(":")
    try:
        return datasets.load_dataset(name, *config, split=split, **options)
    except Exception as error:  # not there, gated, no such split, malformed: each has its own kind
        reason = " ".join(str(error).split())[:160]
        hint = f"if it is gated, ask for access at https://huggingface.co/datasets/{name} and log in"
        hint += " (hf auth login), or give a file of it"
        raise UserError(f"{place}: cannot be read from the hub ({reason}); {hint}") from error


def text_of(value: Any) -> str:
    """The text in a cell, a number or truth value as in JSON; of a conversation the user's first turn.

    A turn is {"role", "content"} or {"from", "value"}; the content is a text, or parts with a text each.

    >>> text_of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    'Hello'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value) if value == value else ""  # pandas writes NaN where there is nothing
    for turn in value if isinstance(value, list) else ():
        if isinstance(turn, dict) and (turn.get("role") or turn.get("from")) in ("user", "human"):
            content = turn.get("content") or turn.get("value")
            parts = content if isinstance(content, list) else [{"text": content}]
            return "".join(part.get("text") or "" for part in parts)
    return ""
