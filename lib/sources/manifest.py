"""manifest.json of stage 1: what was made of what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from huggingface_hub import HfApi

from lib.run.files import git_revision, sha256_file
from lib.sources.known import OWN
from lib.sources.reading import Pool, Source


def manifest(settings, made: Pool, pool: Pool, dropped: Counter) -> dict:
    """What was made of what: counts beside the paper's, licences, checksums of what was read and written.

    settings: stage 1's; made: records by the name of their file; pool: what RL's prompts were drawn from.
    """
    stages = {"rl pool": [record for records in pool.values() for record in records]}
    stages |= {name.removesuffix(".jsonl"): records for name, records in made.items()}
    sources: dict[str, dict] = {}
    for source in (source for part in settings.parsed() for source in part):
        counts = {}
        for stage, records in stages.items():
            if prompts := {record["prompt"] for record in records if record["source"] == source.name}:
                counts[stage] = len(prompts)
        sources[source.text] = {**provenance(source), "prompts": counts}
    if settings.source == "sandbox":
        sources["sandbox"] = {"made by": "lib/sandbox/world.py", "licence": "Apache-2.0, as the code"}
    if settings.trace_model:
        sources[settings.trace_model] = {"wrote": "traces", "licence": OWN.licence}
    if settings.rainbow:
        sources["rainbow"] = {"found against": settings.rainbow, "written by": settings.rainbow_attacker}
    files: dict[str, dict] = {}
    for name, records in made.items():
        kinds = Counter(f"{record['kind']} from {record['source']}" for record in records)
        prompts = {record["prompt"] for record in records}
        sha256 = sha256_file(Path(settings.out) / name)
        files[name] = {"records": len(records), "prompts": len(prompts), "sha256": sha256}
        files[name]["by kind and source"] = dict(kinds)
    fixed = {"lambda": settings.lambda_harmful, "seed": settings.seed, "git_revision": git_revision()}
    return fixed | {"files": files, "dropped": dict(dropped), "sources": sources}


def provenance(source: Source) -> dict:
    """Licence, what is taken, the paper's counts, checksums or the hub's revision."""
    facts: dict = {"licence": source.data.licence}
    if source.data is not OWN:
        facts["taken"] = source.data.about
    if source.data.paper:
        facts["paper"] = source.data.paper
    if source.file:
        return facts | {"sha256": {str(path): sha256_file(path) for path in source.files()}}
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
    without = [record["id"] for record in made.get("eval_harmful.jsonl", []) if not record["target"]]
    if without:
        lines.append(
            f"{len(without)} harmful evaluation prompts have no target, which GCG needs: {without[0]}, ..."
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    return "\n".join([*lines, f"left out: {reasons or 'nothing'}"])
