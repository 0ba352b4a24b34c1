"""manifest.json of stage 1: what was made of what."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

from huggingface_hub import HfApi

from lib.run.files import git_revision, sha256_file
from lib.sources.known import OWN, Pool
from lib.sources.reading import Source


def manifest(settings, made: Pool, dropped: Counter) -> dict:
    """Counts, licences, checksums of what was read and written.

    settings: stage 1's; made: records by the name of their file. A prompt of SFT is in several records.
    """
    sources = {source.text: provenance(source) for source in chain(*settings.parsed())}
    if settings.source == "sandbox":
        sources["sandbox"] = {"made by": "lib/sandbox/world.py", "licence": "Apache-2.0, as the code"}
    if settings.trace_model:
        sources[settings.trace_model] = {"wrote": "traces", "licence": OWN.licence}
    if settings.rainbow:
        sources["rainbow"] = {"found against": settings.rainbow, "written by": settings.rainbow_attacker}
    files = {}
    for name, records in made.items():
        prompts = {(record["prompt"], f"{record['kind']} from {record['source']}") for record in records}
        counts = Counter(origin for _, origin in prompts)
        sha256 = sha256_file(Path(settings.out) / name)
        files[name] = {"records": len(records), "sha256": sha256, "prompts by kind and source": counts}
    fixed = {"lambda": settings.lambda_harmful, "seed": settings.seed, "git_revision": git_revision()}
    return fixed | {"files": files, "dropped": dropped, "sources": sources}


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


def summary(made: Pool, dropped: Counter) -> str:
    """A line for each file, and what was left out."""
    lines = []
    for name, records in made.items():
        kinds = Counter(record["kind"] for record in records)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"{len(records):6}  {name:22} {counts}")
    if without := [record["id"] for record in made.get("eval_harmful.jsonl", []) if not record["target"]]:
        prompts = f"{len(without)} harmful evaluation prompts"
        lines.append(f"{prompts} have no target, which GCG needs: {without[0]}, ...")
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    return "\n".join([*lines, f"left out: {reasons or 'nothing'}"])
