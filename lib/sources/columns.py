"""Rows of any table to records, by the column flags of stage 1."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Protocol

from tqdm import tqdm

from lib import UserError
from lib.run.text import with_context
from lib.sources.readers import COPYRIGHT, say_left_out
from lib.sources.tables import JSON, columns_of, first_text, other_turns
from lib.sources.words import SETS, Given

# What stage 4 reads of a request beside those that every record has: how deep it is disguised (a number), how a compliant
# answer would begin if the attacker writes that, and a request that deserves an answer.
OPTIONAL = ("hops", "prefill", "twin")
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


def fingerprint(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def prompts_by_columns(
    rows: Iterable[dict], given: Given, columns: Columns, targets: dict[str, str]
) -> list[PromptRecord]:
    """(set, record) for each row; rows of kind "drop" are left out. UserError if no row has a prompt.

    A record keeps `OPTIONAL` fields. Of a jsonl or json file it keeps all others, too, but for the columns that the flags
    name; what we set wins (id, kind, source, ...).
    """
    if not any(first_text(row, columns.prompt_column) for row in rows):
        seen = ", ".join(columns_of(rows))
        raise UserError(f"{given.text}: no text in --prompt-column {columns.prompt_column}; has {seen}")
    pairs, left = [], Counter[str]()
    for number, row in enumerate(tqdm(rows, desc=given.source, unit="row", delay=2, leave=False), start=1):
        known_as, context = first_text(row, columns.id_column), first_text(row, columns.context_column)
        where = f"{given.text}: record {known_as or number}"
        if (
            given.kind and first_text(row, "FunctionalCategory") == "copyright"
        ):  # HarmBench's; --kind-map may say otherwise
            left[COPYRIGHT] += 1
            continue
        name = given.kind or kind_of(row, columns, where)
        left.update(f"turns of {role or 'no role'}" for role in other_turns(row, columns.prompt_column))
        prompt = with_context(first_text(row, columns.prompt_column).strip(), context)
        record = {
            "id": "-".join(
                filter(None, (_stem(given), known_as, fingerprint(prompt)))
            ),  # two files may use the same names
            "prompt": prompt,
            "kind": "harmful" if name == "jailbreak" else name,
            "source": given.source,
            "category": first_text(row, columns.category_column),
            "target": first_text(row, "target") or targets.get(known_as, ""),
        }
        record |= {"context": context} if context.strip() else {}
        own = own_fields(row, given, columns, where)
        pairs.append((name, record | {key: value for key, value in own.items() if key not in record}))
    say_left_out(given.text, left)
    return [pair for pair in pairs if pair[0] != "drop"]


def own_fields(row: dict, given: Given, columns: Columns, where: str) -> dict:
    """What a record keeps of a row as it is, see `prompts_by_columns`."""
    named = (
        columns.prompt_column,
        columns.context_column,
        columns.kind_column,
        columns.id_column,
        columns.category_column,
    )
    known = {name.strip().split(".")[0] for names in named for name in names.split(",")}
    everything = given.path is not None and given.path.suffix in JSON
    kept = {key: value for key, value in row.items() if key not in known} if everything else {}
    for key in OPTIONAL:
        kept.pop(key, None)
        value = row.get(key)
        if (
            value in (None, "") or value != value
        ):  # a table has a cell for each row, maybe one that is no number
            continue
        if not isinstance(value, str | int | float) or (key != "hops" and not isinstance(value, str)):
            raise UserError(
                f"{where}: {key} is {value!r}; allowed: {'a number' if key == 'hops' else 'some text'}"
            )
        kept[key] = (
            int(value) if key == "hops" and str(value).isdecimal() else value
        )  # a csv knows no numbers
    return kept


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
    traces, left = [], Counter[str]()
    for row in rows:
        left.update(f"turns of {role or 'no role'}" for role in other_turns(row, columns.prompt_column))
        prompt = first_text(row, columns.prompt_column).strip()
        record = {
            "id": f"{_stem(given)}-{fingerprint(prompt)}",
            "prompt": prompt,
            "kind": "harmful",
            "source": given.source,
        }
        traces.append(
            (record, (first_text(row, columns.reasoning_column), first_text(row, columns.answer_column)))
        )
    if not any(record["prompt"] and all(pair) for record, pair in traces):
        wanted = f"--prompt-column {columns.prompt_column}, --reasoning-column {columns.reasoning_column} "
        wanted += f"and --answer-column {columns.answer_column}"
        raise UserError(
            f"--trace-files: {given.text}: no record has text in each of {wanted}; has {', '.join(columns_of(rows))}"
        )
    say_left_out(given.text, left)
    return traces


def _stem(given: Given) -> str:
    return given.path.stem if given.path else given.source
