"""Rows of any table to records, by the column flags of stage 1."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Protocol

from tqdm import tqdm

from lib.files import UserError
from lib.sources.words import SETS, Given
from lib.tables import columns_of, first_text, with_context

PromptRecord = tuple[str, dict]  # (set, record)
TraceRecord = tuple[dict, tuple[str, str]]  # (record, (reasoning, answer))


class Columns(Protocol):
    """The settings that are read here: which columns mean what, each a list of names by comma."""

    prompt_column: str
    context_column: str
    kind_column: str
    kind_map: list[str]
    id_column: str
    category_column: str
    reasoning_column: str
    answer_column: str


def same_prompt(prompt: str) -> str:
    """What two prompts share that differ in spaces and capitals only: they count as duplicates."""
    return " ".join(prompt.casefold().split())


def fingerprint(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def prompts_by_columns(rows: Iterable[dict], given: Given, columns: Columns, targets: dict[str, str]) -> list[PromptRecord]:
    """(set, record) for each row; rows of kind "drop" are left out. UserError if no row has a prompt."""
    if not any(first_text(row, columns.prompt_column) for row in rows):
        seen = ", ".join(columns_of(rows))
        raise UserError(f"{given.text}: no text in --prompt-column {columns.prompt_column}; has {seen}")
    pairs = []
    for number, row in enumerate(tqdm(rows, desc=given.source, unit="row", delay=2, leave=False), start=1):
        name = given.kind or kind_of(row, columns, f"{given.text}: record {number}")
        prompt, known_as = first_text(row, columns.prompt_column).strip(), first_text(row, columns.id_column)
        prompt = with_context(prompt, first_text(row, columns.context_column))
        record = {
            "id": "-".join(filter(None, (_stem(given), known_as, fingerprint(prompt)))),  # two files may use the same names
            "prompt": prompt,
            "kind": "harmful" if name == "jailbreak" else name,
            "source": given.source,
            "category": first_text(row, columns.category_column),
            "target": first_text(row, "target") or targets.get(known_as, ""),
        }
        pairs.append((name, record))
    return [pair for pair in pairs if pair[0] != "drop"]


def kind_of(row: dict, columns: Columns, where: str) -> str:
    """The set that --kind-map gives to what stands in the row's kind column; without a rule, that itself."""
    value = first_text(row, columns.kind_column)
    for pattern, _, kind in (rule.rpartition("=") for rule in columns.kind_map):
        if value and fnmatchcase(value, pattern):
            return kind
    if value in SETS:
        return value
    found = f"kind {value!r}" if value else f"no {columns.kind_column}"
    raise UserError(f"{where}: {found}; give KIND=FILE, --kind-column, or --kind-map PATTERN=KIND")


def traces_by_columns(rows: Iterable[dict], given: Given, columns: Columns) -> list[TraceRecord]:
    """(a prompt's record, (reasoning, answer)) for each row. UserError if no row has all three texts."""
    traces = []
    for row in rows:
        prompt = first_text(row, columns.prompt_column).strip()
        record = {"id": f"{_stem(given)}-{fingerprint(prompt)}", "prompt": prompt, "kind": "harmful", "source": given.source}
        traces.append((record, (first_text(row, columns.reasoning_column), first_text(row, columns.answer_column))))
    if not any(record["prompt"] and all(pair) for record, pair in traces):
        wanted = f"--prompt-column {columns.prompt_column}, --reasoning-column {columns.reasoning_column} "
        wanted += f"and --answer-column {columns.answer_column}"
        raise UserError(f"--trace-files: {given.text}: no record has text in each of {wanted}; has {', '.join(columns_of(rows))}")
    return traces


def _stem(given: Given) -> str:
    return given.path.stem if given.path else given.source
