"""Many sources: pools of prompts, those with traces, what was made of what. `settings` are stage 1's."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import chain
from pathlib import Path

from huggingface_hub import HfApi

from lib import UserError
from lib.run.files import git_revision, sha256_file, write_json
from lib.run.text import same_prompt
from lib.sources.known import EVAL_SETS, KIND_OF, OWN
from lib.sources.reading import Source, read_source

Pool = dict[str, list[dict]]  # records by kind, or by evaluation set
Traced = dict[str, list[dict]]  # by same_prompt: records with reasoning and answer


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
    whole = [record for record in records if "reasoning" in record and "answer" in record]
    dropped += Counter({"empty trace": len(records) - len(whole)})
    traced: Traced = {}
    for record in in_order(whole, f"{settings.seed}/traces"):
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
