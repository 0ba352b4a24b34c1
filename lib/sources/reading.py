"""From words of --files, --eval-files and --trace-files to pools of records, and what was made of them.

A word is [KIND=]SOURCE[:N]; `settings` are stage 1's.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from huggingface_hub import HfApi
from tqdm import tqdm

from lib import UserError
from lib.chat import parse_completion
from lib.run.files import git_revision, sha256_file, write_json
from lib.run.text import readable, same_prompt, with_context
from lib.sources.known import EVAL_SETS, KIND_OF, KNOWN, OWN, DataSet
from lib.sources.tables import JSON, READABLE, load_rows, read_table, text_of

Pool = dict[str, list[dict]]  # records by kind, or by evaluation set
Traced = dict[str, list[dict]]  # by same_prompt: records with reasoning and answer
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
    usual: str = ""  # kind of rows that do not say theirs


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
    counts, usual = (int(sft or 0), int(rl) if rl else None), "harmful" if flag == "--trace-files" else ""
    return Source(text, name, data, files, hub or "", kind or "", *counts, usual)


def read_source(source: Source, dropped: Counter, max_chars: int = 10**9) -> list[dict]:
    """A record for each row that is taken; `dropped` counts the others by reason.

    UserError for a source that cannot be read, or has no prompt of the kind asked for.
    """
    rows = read_table(source.files[0]) if source.files else load_rows(source.hub, **source.data.options)
    records, columns = [], ", ".join(next(iter(rows), {}))
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
    says = source.kind if source.kind and source.data is OWN else texts["kind"] or source.usual
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
        record["hops"] = int(hops.removesuffix(".0"))  # pandas writes 3.0 where another row has none
    if source.files and source.files[0].suffix in JSON:
        record |= {key: fields[key] for key in fields if key not in (*TEXTS, "hops", "source")}
    return record


# ---- pools ----


def in_order(records: list[dict], seed: str) -> list[dict]:
    """By a hash of seed and prompt: another file more does not change which are taken of the others."""
    return sorted(records, key=lambda r: hashlib.sha256(f"{seed}/{r['prompt']}".encode()).digest())


def read_pool(sources: list[Source], settings, dropped: Counter, max_chars: int = 10**9) -> Pool:
    """Prompts shorter than `max_chars` by evaluation set, in the seed's order."""
    pool: Pool = {name: [] for name in EVAL_SETS}
    for source in sources:
        for record in read_source(source, dropped, max_chars):
            fields = {key: record[key] for key in record if key not in ("reasoning", "answer")}
            pool[record["kind"]].append(fields | {"kind": KIND_OF[record["kind"]]})
    return {name: in_order(records, f"{settings.seed}/{name}") for name, records in pool.items()}


def read_traces(sources: list[Source], settings, dropped: Counter) -> Traced:
    """Prompts with traces, in the seed's order; none without reasoning or answer (paper, stage I)."""
    records = [record for source in sources for record in read_source(source, dropped, settings.max_chars)]
    for record in records:
        record["kind"] = KIND_OF[record["kind"]]
        own = record.get("reasoning", "").strip()  # maybe with markers, which the format adds
        record["reasoning"] = own.removeprefix("<think>").removesuffix("</think>").strip()
    whole = [record for record in records if record["reasoning"] and "answer" in record]
    # One with a marker inside would teach to break the format.
    good = [r for r in whole if parse_completion(f"{r['reasoning']}</think>{r['answer']}").well_formed]
    dropped += Counter({"empty trace": len(records) - len(whole)})
    dropped += Counter({"trace with a marker inside": len(whole) - len(good)})
    traced: Traced = {}
    for record in in_order(good, f"{settings.seed}/traces"):
        traced.setdefault(same_prompt(record["prompt"]), []).append(record)
    return traced


def hold_out(pool: Pool, evaluation: Pool, settings) -> None:
    """Move prompts of the pool to evaluation sets without a file: at most half."""
    for name in [name for name in pool if pool[name] and not evaluation[name]]:
        count = min(settings.eval_prompts, len(pool[name]) // 2)
        evaluation[name], pool[name] = pool[name][:count], pool[name][count:]
        print(f"no --eval-files for {name}: {count} prompts of --files are held out")
    if "jailbreak" in pool:  # to train on, it is a harmful prompt like others
        pool["harmful"] = in_order(pool["harmful"] + pool.pop("jailbreak"), f"{settings.seed}/pool")


def take_sft(pool: Pool, sources: list[Source], settings) -> list[dict]:
    """Move SFT's prompts out of the pool: by the quotas M+N, or else the first harmful ones.

    Of a source the first M prompts are SFT's, the next N stay, others leave the pool. UserError for too few.
    """
    sft: list[dict] = []
    quotas = [source for source in sources if source.rl is not None]
    for source in quotas:
        kind, last = KIND_OF[source.kind], source.sft + (source.rl or 0)
        words = [s for s in sources if s.name == source.name and KIND_OF.get(s.kind, kind) == kind]
        if len(words) > 1:
            raise UserError(f"--files: {source.name} stands {len(words)} times, with a quota: give one file")
        mine = [record for record in pool[kind] if record["source"] == source.name]
        if len(mine) < last:
            raise UserError(f"--files: {source.text} has {len(mine)} {kind} prompts; its quota needs {last}")
        sft += mine[: source.sft]
        others = [record for record in pool[kind] if record["source"] != source.name]
        pool[kind] = others + mine[source.sft : last]
    if quotas:  # in a new order: the first prompts of a large source came early, and would fill a small share
        pool |= {kind: in_order(records, f"{settings.seed}/rl pool") for kind, records in pool.items()}
    if sft or settings.trace_files:
        return sft
    sft, pool["harmful"] = pool["harmful"][: settings.sft_prompts], pool["harmful"][settings.sft_prompts :]
    return sft


def write_manifest(settings, made: Pool, dropped: Counter) -> None:
    """OUT/manifest.json: counts, licences, checksums of what was read and written; prints the counts.

    made: records by the name of their file. A prompt of SFT is in several records.
    """
    sources = {source.text: provenance(source) for source in chain(*settings.parsed())}
    if settings.source == "sandbox":
        sources["sandbox"] = {"made by": "lib/sandbox/world.py", "licence": "Apache-2.0, as the code"}
    if settings.trace_model:
        sources[settings.trace_model] = {"wrote": "traces", "licence": OWN.licence}
    if settings.rainbow:
        sources["rainbow"] = {"found against": settings.rainbow, "written by": settings.rainbow_attacker}
    files, out = {}, Path(settings.out)
    for name, records in made.items():
        origins = {record["prompt"]: f"{record['kind']} from {record['source']}" for record in records}
        counts = Counter(origins.values())
        files[name] = {"records": len(records), "sha256": sha256_file(out / name)}
        files[name]["prompts by kind and source"] = counts
        print(f"{len(records):6}  {name:22}", ", ".join(f"{n} {origin}" for origin, n in counts.items()))
    print("left out:", ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing")
    fixed = {"lambda": settings.lambda_harmful, "seed": settings.seed, "git_revision": git_revision()}
    write_json(out / "manifest.json", fixed | {"files": files, "dropped": dropped, "sources": sources})


def provenance(source: Source) -> dict:
    """Licence, what is taken, checksums or the hub's revision."""
    facts: dict = {"licence": source.data.licence, "taken": source.data.record.__doc__}
    if source.files:
        return facts | {"sha256": {str(path): sha256_file(path) for path in source.files if path.is_file()}}
    try:
        revision = HfApi().dataset_info(source.hub.split(":")[0], timeout=10).sha
    except Exception:  # of the hub's, or of the network's
        revision = "unknown"
    return facts | {"hub": source.hub, "revision": revision}
