"""From a word of --files, --eval-files or --trace-files, [KIND=]SOURCE[:N], to records."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lib import UserError
from lib.run.text import readable, with_context
from lib.sources.known import EVAL_SETS, KIND_OF, KNOWN, OWN, DataSet
from lib.sources.tables import JSON, READABLE, load_rows, read_table, text_of

HUB = r"hub:([^:/]+/[^:/]+(?::[^:]+){1,2}?)"
WORD = re.compile(rf"(?:({'|'.join(EVAL_SETS)})=)?({HUB}|.+?)(?::(?:(\d{{1,9}})\+)?(\d{{1,9}}))?")
HELP = f"""[KIND=]SOURCE; of --files also KIND=SOURCE:N to take N for RL, or KIND=SOURCE:M+N, and M for SFT.
KIND is {" | ".join(EVAL_SETS)}. SOURCE is a FILE ({", ".join(READABLE)}); or NAME, or NAME@FILE for a
copy of it, of {", ".join(KNOWN)}; or hub:OWNER/NAME[:CONFIG]:SPLIT. For other columns write a function in
lib/sources/known.py: it is one NAME more"""
TEXTS = ("prompt", "kind", "id", "category", "target", "context", "prefill", "twin", "reasoning", "answer")


@dataclass
class Source:
    """A word taken apart."""

    text: str  # SOURCE, as given
    name: str  # what records call it
    data: DataSet
    files: list[Path]  # the file, and the one beside it if the data set has two; none: read from the hub
    hub: str  # OWNER/NAME[:CONFIG]:SPLIT
    kind: str  # of EVAL_SETS; "": what the rows say
    sft: int  # prompts for SFT
    rl: int | None  # prompts in RL's pool; none: all


def parse_word(word: str, flag: str = "--files") -> Source:
    """Reads nothing. UserError for a word that says nothing.

    >>> source = parse_word("harmful=wildjailbreak:400+800")
    >>> source.kind, source.name, source.sft, source.rl
    ('harmful', 'wildjailbreak', 400, 800)
    """
    found = WORD.fullmatch(word)
    kind, text, hub, sft, rl = found.groups() if found else (None, word, None, None, None)
    name, at, path = text.partition("@")
    data = KNOWN.get(name, OWN)
    if data is OWN:
        name, path = hub or text, text
    elif not at:
        hub = data.hub
    files = [] if hub else [Path(path)]
    if rl and (flag != "--files" or not kind) or not (hub or files[0].suffix in READABLE):
        raise UserError(f"{flag}: given {word}; allowed {' '.join(HELP.split())}")
    if files and data.beside:
        files.append(files[0].with_name(data.beside(files[0].name)))
    if flag == "--trace-files":
        kind = KIND_OF[kind or "harmful"]
    return Source(text, name, data, files, hub or "", kind or "", int(sft or 0), int(rl) if rl else None)


def read_source(source: Source, dropped: Counter, max_chars: int = 10**9) -> list[dict]:
    """A record for each row that is taken; `dropped` counts the others by reason.

    UserError for a source that cannot be read, or has no prompt of the kind asked for.
    """
    rows = read_table(source.files[0]) if source.files else load_rows(source.hub, **source.data.options)
    records, columns = [], ", ".join(rows[0])
    for place, row in enumerate(tqdm(rows, source.name, unit="row", delay=2, leave=False), start=1):
        try:
            fields = readable(source.data.record(row, *source.files[1:]))
            record = make_record(fields, source) if fields else None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}; its columns are {columns}"
            raise UserError(f"{source.text}: record {place}: {reason}") from error
        if not record:
            dropped[f"rows of {source.name}"] += 1
        elif len(record["prompt"]) < max_chars or source.data.any_length:
            records.append(record)
        else:
            dropped["too long"] += 1
    if not any(record["prompt"] for record in records):
        wanted = f"no {source.kind or 'usable'} prompt in {len(rows)} rows of {columns}, or none short enough"
        raise UserError(f"{source.text}: {wanted}; taken is: {source.data.record.__doc__}")
    return records


def make_record(fields: dict, source: Source) -> dict | None:
    """What one row says, `kind` being the name of its set; None where the word asks for another kind.

    It has id, prompt, kind, source, category, target; context, prefill, twin, reasoning, answer, hops if they
    are there; of a jsonl or json file of yours every other field. KIND= overrules what such a file says.
    ValueError for an unknown kind, or hops that are no number.
    """
    texts = {key: text_of(fields.get(key)) for key in TEXTS}
    says = source.kind if source.kind and source.data is OWN else texts["kind"]
    if says not in EVAL_SETS:
        raise ValueError(f"kind is {says!r}, allowed {' | '.join(EVAL_SETS)}, or give KIND=SOURCE")
    name = source.kind or says
    if KIND_OF[name] != KIND_OF[says]:
        return None
    prompt = with_context(texts["prompt"].strip(), texts["context"])
    # two sources may use the same ids, so it is not the source's alone
    stem = source.files[0].stem if source.data is OWN and source.files else source.name
    parts = [stem, texts["id"], hashlib.sha256(prompt.encode()).hexdigest()[:12]]
    record: dict = {"id": "-".join(filter(None, parts)), "prompt": prompt, "kind": name}
    record |= {"source": source.name, "category": texts["category"], "target": texts["target"]}
    record |= {key: text for key, text in texts.items() if text.strip() and key not in record}
    if hops := text_of(fields.get("hops")):
        record["hops"] = int(hops)
    if source.files and source.files[0].suffix in JSON:
        record |= {key: fields[key] for key in fields if key not in (*TEXTS, "hops", "source")}
    return record
