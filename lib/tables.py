"""Rows of other people's files: jsonl, json, csv, tsv, parquet; and the text in a column of theirs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.files import UserError, read_jsonl


def read_table(path: Path) -> list[dict]:
    """Rows of a jsonl, json, csv, tsv or parquet file."""
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    import datasets  # slow to import, and the sandbox has no need of it

    readers: dict[str, tuple[Any, dict]] = {
        ".json": (datasets.Dataset.from_json, {}),
        ".csv": (datasets.Dataset.from_csv, {"keep_default_na": False}),  # "NA" is text
        ".tsv": (datasets.Dataset.from_csv, {"keep_default_na": False, "sep": "\t"}),
        ".parquet": (datasets.Dataset.from_parquet, {}),
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: ends in {path.suffix or 'nothing'}; allowed .jsonl, .json, .csv, .tsv, .parquet")
    read, options = readers[path.suffix]
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = read(str(path), cache_dir=cache, keep_in_memory=True, **options).to_list()
        except Exception as error:  # each format has its own kinds of malformed
            reason = " ".join(str(error.__cause__ or error).split())[:160]
            raise UserError(f"{path}: cannot be read as {path.suffix[1:]} ({reason})") from error
    if not rows:
        raise UserError(f"{path}: is empty")
    return rows


def columns_of(rows: Iterable[dict]) -> list[str]:
    """Names of the columns: of a datasets.Dataset, or the keys of any row."""
    names = getattr(rows, "column_names", None)
    return list(names) if names is not None else list(dict.fromkeys(key for row in rows for key in row))


def with_context(prompt: str, context: str) -> str:
    """The prompt behind the text that it is about, as HarmBench's own pipeline joins them."""
    return f"{context.strip()}\n\n---\n\n{prompt}" if prompt and context.strip() else prompt


def first_text(row: dict, columns: str) -> str:
    """The text in the first of `columns` that has some, or "".

    >>> first_text({"prompt": [{"role": "user", "content": "Hello"}]}, "Behavior,prompt.0.content")
    'Hello'
    """
    for column in columns.split(","):
        value: Any = row
        for step in column.strip().split("."):
            if isinstance(value, dict):
                value = value.get(step)
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                value = None
        if isinstance(value, str | int) and str(value).strip():
            return str(value)
    return ""
