"""From a word of --files, --eval-files or --trace-files, [KIND=]SOURCE[:N], to records."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import UserError
from lib.run.text import readable, same_prompt, with_context
from lib.sources.known import EVAL_SETS, KNOWN, OWN, DataSet, Pool
from lib.sources.tables import JSON, READABLE, load_rows, read_table, text_of, turns_of

Trace = tuple[str, str]  # (reasoning, answer)
Traced = dict[str, tuple[dict, list[Trace]]]  # by same_prompt: a record, its traces
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
    kind = kind or ("harmful" if flag == "--trace-files" else "")
    return Source(text, name, data, files, hub or "", kind, int(sft or 0), int(rl) if rl else None)


def kind_of(set_name: str) -> str:
    return "harmful" if set_name == "jailbreak" else set_name


def read_source(source: Source, dropped: Counter, max_chars: int = 10**9) -> list[tuple[str, dict, Trace]]:
    """(evaluation set, record, trace) for each row that is taken; `dropped` counts the others by reason.

    A record has id, prompt, kind, source, category, target; context, prefill, twin, hops if they are there;
    of a jsonl or json file of yours every other field. UserError for a source that cannot be read, or has no
    prompt of the kind asked for.
    """
    rows = read_table(source.files[0]) if source.files else load_rows(source.hub, **source.data.options)
    found, columns = [], ", ".join(rows[0])
    for place, row in enumerate(tqdm(rows, source.name, unit="row", delay=2, leave=False), start=1):
        try:
            fields = readable(source.data.record(row, *source.files[1:]))
            taken = make_record(fields, source) if fields else None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}; its columns are {columns}"
            raise UserError(f"{source.text}: record {place}: {reason}") from error
        if taken:
            found.append(taken)
            turns = Counter(f"turns of {role}" for role, _ in turns_of(fields.get("prompt")))
            dropped += turns - Counter(["turns of user"])  # the first one is the prompt
        else:
            dropped[f"rows of {source.name}"] += 1
    if not any(record["prompt"] for _, record, _ in found):
        wanted = f"no {source.kind or 'usable'} prompt in {len(rows)} rows of {columns}"
        raise UserError(f"{source.text}: {wanted}; taken is: {source.data.record.__doc__}")
    short = [one for one in found if len(one[1]["prompt"]) < max_chars or source.data.any_length]
    dropped += Counter({"too long": len(found) - len(short)})
    return short


def make_record(fields: dict, source: Source) -> tuple[str, dict, Trace] | None:
    """(evaluation set, record, trace); None where the word asks for another kind.

    KIND= overrules what a file of yours says. ValueError for an unknown kind, or hops that are no number.
    """
    says = source.kind if source.kind and source.data is OWN else text_of(fields.get("kind"))
    if says not in EVAL_SETS:
        raise ValueError(f"kind is {says!r}, allowed {' | '.join(EVAL_SETS)}, or give KIND=SOURCE")
    name = source.kind or says
    if kind_of(name) != kind_of(says):
        return None
    texts = {key: text_of(fields.get(key)) for key in TEXTS}
    prompt = with_context(texts["prompt"].strip(), texts["context"])
    # two sources may use the same ids, so it is not the source's alone
    stem = source.files[0].stem if source.data is OWN and source.files else source.name
    parts = [stem, texts["id"], hashlib.sha256(prompt.encode()).hexdigest()[:12]]
    record: dict[str, Any] = {"id": "-".join(filter(None, parts)), "prompt": prompt, "kind": kind_of(name)}
    record |= {"source": source.name, "category": texts["category"], "target": texts["target"]}
    record |= {key: texts[key] for key in ("context", "prefill", "twin") if texts[key].strip()}
    if hops := text_of(fields.get("hops")):
        record["hops"] = int(hops)
    if source.files and source.files[0].suffix in JSON:
        record |= {key: fields[key] for key in fields if key not in (*TEXTS, "hops", "source")}
    return name, record, (texts["reasoning"], texts["answer"])


# ---- many sources: `settings` are stage 1's ----


def read_pool(sources: list[Source], settings, dropped: Counter, max_chars: int = 10**9) -> Pool:
    """Prompts shorter than `max_chars` by evaluation set, in the seed's order."""
    pool: Pool = {name: [] for name in EVAL_SETS}
    for source in sources:
        for name, record, _ in read_source(source, dropped, max_chars):
            pool[name].append(record)
    return {name: in_order(records, f"{settings.seed}/{name}") for name, records in pool.items()}


def in_order(records: list[dict], seed: str) -> list[dict]:
    """By a hash of seed and prompt: another file more does not change which are taken of the others."""
    return sorted(records, key=lambda r: hashlib.sha256(f"{seed}/{r['prompt']}".encode()).digest())


def read_traces(sources: list[Source], settings, dropped: Counter) -> Traced:
    """Prompts with traces, in the seed's order; none without reasoning or answer (paper, stage I)."""
    traced: Traced = {}
    for source in sources:
        found = read_source(source, dropped, settings.max_chars)
        if not any(all(trace) for _, _, trace in found):
            raise UserError(f"--trace-files: {source.text}: no row has prompt, reasoning and answer")
        for _, record, trace in found:
            if all(text.strip() for text in trace):
                traced.setdefault(same_prompt(record["prompt"]), (record, []))[1].append(trace)
            else:
                dropped["empty trace"] += 1
    records = in_order([record for record, _ in traced.values()], f"{settings.seed}/traces")
    return {key: traced[key] for key in (same_prompt(record["prompt"]) for record in records)}


def hold_out(pool: Pool, evaluation: Pool, settings) -> None:
    """Move prompts of the pool to evaluation sets without a file: at most half."""
    for name in [name for name in pool if pool[name] and not evaluation[name]]:
        count = min(settings.eval_prompts, len(pool[name]) // 2)
        evaluation[name], pool[name] = pool[name][:count], pool[name][count:]
        print(f"no --eval-files for {name}: {count} prompts of --files are held out")
    if "jailbreak" in pool:  # to train on, it is a harmful prompt like others
        pool["harmful"] = in_order(pool["harmful"] + pool.pop("jailbreak"), f"{settings.seed}/pool")


def take_sft(pool: Pool, sources: list[Source], settings) -> list[dict]:
    """Move SFT's prompts out of the pool: by the quotas S+R, or else the first harmful ones.

    Of a source the first S prompts are SFT's, the next R stay, others leave the pool. UserError for too few.
    """
    sft: list[dict] = []
    quotas = [source for source in sources if source.rl is not None]
    for source in quotas:
        kind, last = kind_of(source.kind), source.sft + (source.rl or 0)
        mine = [record for record in pool[kind] if record["source"] == source.name]
        if len(mine) < last:
            raise UserError(f"--files: {source.text} has {len(mine)} {kind} prompts; its quota needs {last}")
        sft += mine[: source.sft]
        others = [record for record in pool[kind] if record["source"] != source.name]
        pool[kind] = others + mine[source.sft : last]
    if quotas:  # in a new order: the first prompts of a large source came early, and would fill a small share
        pool |= {kind: in_order(records, f"{settings.seed}/rl pool") for kind, records in pool.items()}
    count = 0 if settings.trace_files else settings.sft_prompts
    if sft and count not in (0, len(sft)):
        raise UserError(f"--sft-prompts: given {count}; the quotas S+R of --files say {len(sft)}")
    if not sft:
        sft, pool["harmful"] = pool["harmful"][:count], pool["harmful"][count:]
    return sft[:count]


def check_traces(traced: Traced, sft: list[dict], rl: list[dict], settings: Any) -> None:
    """UserError where --trace-files have not what is asked for."""
    if traced and len(sft) < settings.sft_prompts:
        raise UserError(f"--sft-prompts: given {settings.sft_prompts}; the trace files have {len(sft)}")
    if traced and settings.rl_traces and not any(same_prompt(record["prompt"]) in traced for record in rl):
        raise UserError(f"--rl-traces: --trace-files have none for the {len(rl)} RL prompts; give 0")
