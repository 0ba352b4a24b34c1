"""Where stage 1's prompts and traces come from: files, data sets of the hub, and the sources that the paper names.

A word of --files, --eval-files or --trace-files is taken apart by `words`; rows become records by the column
flags (`columns`), or, for a known source (`known`), by its own short function (`readers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lib import UserError
from lib.run.files import sha256_file
from lib.run.text import same_prompt, with_context
from lib.sources.columns import (
    Columns,
    PromptRecord,
    TraceRecord,
    fingerprint,
    prompts_by_columns,
    traces_by_columns,
)
from lib.sources.hub import load_rows, revision_of
from lib.sources.known import SOURCES, Source, found_in
from lib.sources.readers import Found
from lib.sources.tables import read_table
from lib.sources.words import SETS, Given, parse_word, source_names

__all__ = [
    "SETS",
    "UNKNOWN",
    "described",
    "files_of",
    "parse_word",
    "provenance",
    "read_prompts",
    "read_traces",
    "same_prompt",
]
__all__ += ["source_names"]
UNKNOWN = "not stated: see where it is from"


def read_prompts(word: str, columns: Columns, targets: dict[str, str]) -> list[PromptRecord]:
    """(set, record) for each prompt; `targets` maps the name by which a source knows it to its target.

    A record has id, prompt, kind, source, category and target; and the context, where the prompt is about one. Raises
    UserError for a source that cannot be read, has other columns than expected, or has no prompt of the KIND that the word
    says.
    """
    given = parse_word(word)
    if not given.name:
        return prompts_by_columns(_rows(given), given, columns, targets)
    kind = "harmful" if given.kind == "jailbreak" else given.kind
    found = _known(given)
    if kind and not any(one.kind == kind for one in found):
        raise UserError(
            f"{word}: the prompts of {given.name} are {' and '.join(sorted({one.kind for one in found}))}"
        )
    return [(given.kind or one.kind, _record(one, given, targets)) for one in found if kind in ("", one.kind)]


def read_traces(word: str, columns: Columns) -> list[TraceRecord]:
    """(a prompt's record, (reasoning, answer)) for each row. Any of the texts may be empty, but not all of them."""
    given = parse_word(word, "--trace-files")
    if given.name:
        traces = [(_record(one, given, {}), (one.reasoning, one.answer)) for one in _known(given)]
        if not any(reasoning for _, (reasoning, _) in traces):
            raise UserError(
                f"--trace-files: {given.name} has prompts, no reasoning; allowed files with it, or {_tracers()}"
            )
        return traces
    return traces_by_columns(_rows(given), given, columns)


def files_of(word: str) -> list[Path]:
    """The files here that reading the word reads; none for what comes from the hub."""
    given = parse_word(word)
    if given.path is None:
        return []
    return [given.path, *([_beside(given)] if given.name and SOURCES[given.name].minus else [])]


def provenance(word: str, licences: dict[str, str]) -> tuple[str, dict]:
    """(SOURCE as given, what the manifest says of it): place, revision or checksums, licence, filter, the paper's counts."""
    given = parse_word(word)
    facts: dict = {"licence": licences.get(given.source, UNKNOWN)}
    if given.name:
        source = SOURCES[given.name]
        facts = {
            "hub": source.hub,
            "licence": licences.get(given.name, source.licence),
            "filter": source.filter,
        }
        if source.paper:
            facts["paper"] = source.paper
    if given.path:
        sums = {str(path): sha256_file(path) for path in files_of(word)}
        facts = {"sha256": sums[str(given.path)] if len(sums) == 1 else sums} | facts
    else:
        facts["revision"] = revision_of(given.hub[0] if given.hub else SOURCES[given.name].hub)
    return given.text, facts


def described(word: str) -> str:
    """One line on where the word leads: a file here, or a data set of the hub, with its licence and whether it is gated."""
    given = parse_word(word)
    if given.path:
        return f"{given.text}: {'a file here' if given.path.is_file() else 'no such file yet'}"
    if given.hub:
        return f"{given.text}: https://huggingface.co/datasets/{given.hub[0]}"
    source = SOURCES[given.name]
    if not source.hub:
        return f"{given.text}: a file of yours, {given.name}@FILE ({source.seen_in})"
    access = "gated: ask for access on its page" if source.gated else "open"
    return f"{given.text}: https://huggingface.co/datasets/{source.hub}, {source.licence}, {access}"


def _rows(given: Given) -> Iterable[dict]:
    if given.path:
        return read_table(given.path)
    assert given.hub
    name, config, split = given.hub
    page = f"https://huggingface.co/datasets/{name}"
    hint = f"if it is gated, ask for access at {page} and log in (hf auth login); or give a file of it"
    return load_rows(name, config, split, hint=hint)


def _known(given: Given) -> list[Found]:
    """The prompts that a known source's filter leaves, from the hub or from a file of the same columns."""
    source = SOURCES[given.name]
    if not (given.path or source.hub):
        raise UserError(f"{given.name}: is no data set of the hub; give {given.name}@FILE ({source.seen_in})")
    found = found_in(
        given.text, source, read_table(given.path) if given.path else _from_hub(given.name, source)
    )
    if source.minus:
        other = SOURCES[source.minus]
        if given.path and not (beside := _beside(given)).is_file():
            raise UserError(
                f"{beside}: no such file; {given.name} is without the prompts of {source.minus}, so it needs both"
            )
        rows = read_table(_beside(given)) if given.path else _from_hub(source.minus, other)
        taken = {same_prompt(one.prompt) for one in found_in(source.minus, other, rows)}
        found = [one for one in found if same_prompt(one.prompt) not in taken]
    return found


def _beside(given: Given) -> Path:
    """The file of what is taken away from `given`, under its name on the hub, beside the given file."""
    assert given.path
    return given.path.with_name(f"{SOURCES[SOURCES[given.name].minus].config}{given.path.suffix}")


def _from_hub(name: str, source: Source) -> Iterable[dict]:
    page = f"https://huggingface.co/datasets/{source.hub}"
    access = (
        f"is gated: ask for access at {page} and log in (hf auth login)"
        if source.gated
        else f"needs no account: {page}"
    )
    hint = f"it {access}; or give a local file of it: {name}@FILE"
    wanted = [column for names in (*source.columns, *source.optional) for column in names.split("|")]
    return load_rows(source.hub, source.config, source.split, hint=hint, only=wanted, **source.options)


def _record(one: Found, given: Given, targets: dict[str, str]) -> dict:
    prompt = with_context(one.prompt, one.context)
    record = {
        "id": "-".join(filter(None, (given.name, one.id, fingerprint(prompt)))),
        "prompt": prompt,
        "kind": one.kind,
        "source": given.name,
        "category": one.category,
        "target": targets.get(one.id, ""),
    }
    return record | ({"context": one.context} if one.context.strip() else {})


def _tracers() -> str:
    return ", ".join(name for name, source in SOURCES.items() if source.traces)
