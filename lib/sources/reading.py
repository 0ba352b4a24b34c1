"""From a word of --files, --eval-files or --trace-files, [KIND=]SOURCE[:N], to records."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lib import UserError
from lib.run.text import readable, same_prompt, with_context
from lib.sources.known import EVAL_SETS, KNOWN, OWN, DataSet
from lib.sources.tables import JSON, READERS, load_rows, read_table, text_of, turns_of

Pool = dict[str, list[dict]]  # records by kind, or by evaluation set
Traced = dict[
    str, tuple[dict, list[tuple[str, str]]]
]  # by same_prompt: a record, its (reasoning, answer) pairs
WORD = re.compile(rf"(?:({'|'.join(EVAL_SETS)})=)?(.+?)(?::(?:(\d{{1,9}})\+)?(\d{{1,9}}))?")
HUB = re.compile(r"hub:([^:/]+/[^:/]+(?::[^:]+){1,2})")
TEXTS = ("prompt", "kind", "id", "category", "target", "context", "reasoning", "answer")
OPTIONAL = ("hops", "prefill", "twin")  # what stage 4 reads of a request, if it is there


@dataclass
class Source:
    """A word taken apart."""

    text: str  # SOURCE, as given
    name: str  # what records call it
    data: DataSet
    file: Path | None  # none: read from the hub
    hub: str  # OWNER/NAME[:CONFIG]:SPLIT
    kind: str  # of EVAL_SETS; "": what the rows say
    sft: int  # prompts for SFT
    rl: int | None  # prompts in RL's pool; none: all

    def beside(self) -> Path | None:
        return self.data.beside(self.file) if self.file and self.data.beside else None

    def files(self) -> list[Path]:
        """What is read here."""
        return [path for path in (self.file, self.beside()) if path and path.is_file()]


def parse_word(word: str, flag: str = "--files") -> Source:
    """Reads nothing. UserError for a word that says nothing.

    >>> source = parse_word("harmful=wildjailbreak:400+800")
    >>> source.kind, source.name, source.sft, source.rl
    ('harmful', 'wildjailbreak', 400, 800)
    """
    found = WORD.fullmatch(word)
    kind, text, sft, rl = found.groups("") if found else ("", "", "", "")
    name, at, path = text.partition("@")
    hub, data = HUB.fullmatch(text), KNOWN.get(name, OWN)
    if hub:
        name, file, place = hub[1], None, hub[1]
    elif data is OWN:
        name, file, place = text, Path(text), ""
    else:
        file, place = (Path(path), "") if at else (None, data.hub)
    is_wrong = not place and not (file and file.suffix in READERS)
    if rl:
        is_wrong |= flag != "--files" or not kind or (int(sft or 0) > 0 and kind_of(kind) != "harmful")
    if is_wrong or (kind and flag == "--trace-files"):
        raise UserError(
            f"{flag}: given {word}; allowed [KIND=]SOURCE, in --files KIND=SOURCE:N, in --trace-files SOURCE; KIND "
            f"{' | '.join(EVAL_SETS)}; SOURCE a file ({', '.join(READERS)}), hub:OWNER/NAME[:CONFIG]:SPLIT, or NAME or "
            f"NAME@FILE of {', '.join(KNOWN)}"
        )
    return Source(text, name, data, file, place, kind, int(sft or 0), int(rl) if rl else None)


def kind_of(set_name: str) -> str:
    return "harmful" if set_name == "jailbreak" else set_name


# ---- one source ------------------------------------------------------------------------------------------


class Found(NamedTuple):
    set: str  # of EVAL_SETS
    record: dict
    trace: tuple[str, str]  # (reasoning, answer), empty where the source has none


def read_source(source: Source) -> list[Found]:
    """What a source holds, in its order; what is left out is printed. UserError if it cannot be read, or fits KIND nowhere.

    A record has id, prompt, kind, source, category and target; context, hops, prefill and twin where the source
    has them; and of a jsonl or json file of yours every other field.
    """
    rows: Any = read_table(source.file) if source.file else load_rows(source.hub, source.data.options)
    beside = [source.beside()] if source.data.beside else []
    found, left = [], Counter[str]()
    for place, row in enumerate(tqdm(rows, source.name, unit="row", delay=2, leave=False), start=1):
        try:
            fields = readable(source.data.record(row, *beside))
        except KeyError as error:
            has = ", ".join(row)
            raise UserError(
                f"{source.text}: no column {error}, it has {has}: see lib/sources/known.py"
            ) from None
        where = f"{source.text}: record {place}"
        if fields is None or not (name := set_of(fields, source, where)):
            left["rows"] += 1
            continue
        left.update(f"turns of {role}" for role in other_turns(fields.get("prompt")))
        trace = text_of(fields.get("reasoning")), text_of(fields.get("answer"))
        found.append(Found(name, make_record(fields, name, source, where), trace))
    if not any(one.record["prompt"] for one in found):
        where = f"{len(rows)} rows of {', '.join(rows[0])}"
        raise UserError(
            f"{source.text}: no {source.kind or 'usable'} prompt in {where}; taken is: {source.data.about}"
        )
    if left:
        print(f"{source.text}: left out {', '.join(f'{count} {what}' for what, count in left.items())}")
    return found


def set_of(fields: dict, source: Source, where: str) -> str:
    """Of EVAL_SETS; "" where the word asks for another kind than the row says."""
    says = text_of(fields.get("kind")) or source.kind
    if says not in EVAL_SETS:
        raise UserError(f"{where}: kind is {says!r}; allowed {' | '.join(EVAL_SETS)}, or give KIND=SOURCE")
    if not source.kind:
        return says
    return source.kind if kind_of(source.kind) == kind_of(says) else ""


def other_turns(prompt: Any) -> list[str]:
    """Roles of a conversation's turns, but for the user's first one, which is the prompt."""
    roles = [role for role, _ in turns_of(prompt)]
    if "user" in roles:
        roles.remove("user")
    return roles


def make_record(fields: dict, name: str, source: Source, where: str) -> dict:
    """UserError for a field that holds no text, or no number."""
    texts = {key: text_of(fields.get(key)) for key in TEXTS}
    prompt = with_context(texts["prompt"].strip(), texts["context"])
    stem = source.file.stem if source.data is OWN and source.file else source.name
    parts = (
        stem,
        texts["id"],
        hashlib.sha256(prompt.encode()).hexdigest()[:12],
    )  # two sources may use the same ids
    record: dict[str, Any] = {"id": "-".join(filter(None, parts)), "prompt": prompt, "kind": kind_of(name)}
    record |= {"source": source.name, "category": texts["category"], "target": texts["target"]}
    if texts["context"].strip():
        record["context"] = texts["context"]
    for key in OPTIONAL:
        value = fields.get(key)
        if value in (None, ""):
            continue
        text = text_of(value)
        if not text or (key == "hops" and not text.isdecimal()):
            raise UserError(
                f"{where}: {key} is {value!r}; allowed {'a whole number' if key == 'hops' else 'some text'}"
            )
        record[key] = int(text) if key == "hops" else text
    if source.file and source.file.suffix in JSON:
        record |= {key: fields[key] for key in fields if key not in (*TEXTS, *OPTIONAL, "source")}
    return record


# ---- many sources ----------------------------------------------------------------------------------------


def read_pool(sources: list[Source], seed: int, dropped: Counter, max_chars: int = 10**9) -> Pool:
    """Prompts shorter than `max_chars` by evaluation set, in the seed's order; `dropped` counts the others."""
    pool: Pool = {name: [] for name in EVAL_SETS}
    for source in sources:
        for name, record, _ in read_source(source):
            if len(record["prompt"]) < max_chars or source.data.any_length:
                pool[name].append(record)
            else:
                dropped["too long"] += 1
    return {name: in_order(records, f"{seed}/{name}") for name, records in pool.items()}


def in_order(records: list[dict], seed: str) -> list[dict]:
    """By a hash of seed and prompt: another file more does not change which are taken of the others."""
    return sorted(records, key=lambda r: hashlib.sha256(f"{seed}/{r['prompt']}".encode()).digest())


def read_traces(sources: list[Source], dropped: Counter, max_chars: int) -> Traced:
    """Whole traces by prompt, in the sources' order. One without reasoning or answer is left out (paper, stage I)."""
    traced: Traced = {}
    for source in sources:
        found = read_source(source)
        if not any(all(one.trace) for one in found):
            raise UserError(
                f"--trace-files: {source.text}: no row has text in each of prompt, reasoning and answer"
            )
        for _, record, trace in found:
            if not all(text.strip() for text in trace):
                dropped["empty trace"] += 1
            elif len(record["prompt"]) >= max_chars:
                dropped["too long"] += 1
            else:
                traced.setdefault(same_prompt(record["prompt"]), (record, []))[1].append(trace)
    return traced


def hold_out(pool: Pool, evaluation: Pool, most: int, seed: int) -> None:
    """Move prompts of the pool to evaluation sets without a file: `most`, and half of them at most."""
    for name in [name for name in pool if pool[name] and not evaluation[name]]:
        count = min(most, len(pool[name]) // 2)
        evaluation[name], pool[name] = pool[name][:count], pool[name][count:]
        print(f"no --eval-files for {name}: {count} prompts of --files are held out")
    if "jailbreak" in pool:  # to train on, it is a harmful prompt like others
        pool["harmful"] = in_order(pool["harmful"] + pool.pop("jailbreak"), f"{seed}/pool")


def take_sft(pool: Pool, sources: list[Source], count: int, seed: int) -> list[dict]:
    """Move SFT's prompts out of the pool: by the quotas S+R, or else the first `count` harmful ones.

    Of a source's prompts the first S are SFT's, the next R stay in the pool, others leave it.
    """
    sft = []
    for source in sources:
        if source.rl is not None:
            kind, last = kind_of(source.kind), source.sft + source.rl
            mine = [record for record in pool[kind] if record["source"] == source.name]
            if len(mine) < last:
                raise UserError(
                    f"--files: {source.text} has {len(mine)} {kind} prompts; its quota needs {last}"
                )
            sft += mine[: source.sft]
            others = [record for record in pool[kind] if record["source"] != source.name]
            # in a new order: the first prompts of a large source come early, and would fill a small share
            pool[kind] = in_order(others + mine[source.sft : last], f"{seed}/rl pool")
    if not sft:
        sft, pool["harmful"] = pool["harmful"][:count], pool["harmful"][count:]
    return sft
