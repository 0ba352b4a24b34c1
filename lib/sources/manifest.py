"""manifest.json of stage 1: what was made of what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from huggingface_hub import HfApi

from lib.run.files import git_revision, sha256_file
from lib.sources.known import OWN
from lib.sources.reading import Source


def manifest(
    sources: list[Source], made: dict[str, list[dict]], pool: dict[str, list[dict]], out: Path
) -> dict:
    """{"files", "sources", "git_revision"}: counts beside the paper's, licences, checksums of what was read and written.

    made: records by the name of their file in `out`; pool: RL's, from which a mixture was drawn.
    """
    stages = {"rl pool": [record for records in pool.values() for record in records]}
    stages |= {name.removesuffix(".jsonl"): records for name, records in made.items()}
    facts = {}
    for source in sources:
        prompts = {
            name: {r["prompt"] for r in rs if r["source"] == source.name} for name, rs in stages.items()
        }
        counts = {name: len(found) for name, found in prompts.items() if found}
        facts[source.text] = {**provenance(source), "prompts": counts}
    files = {
        name: {
            "records": len(records),
            "prompts": len({record["prompt"] for record in records}),
            "by kind and source": dict(Counter(f"{r['kind']} from {r['source']}" for r in records)),
            "sha256": sha256_file(out / name),
        }
        for name, records in made.items()
    }
    return {"git_revision": git_revision(), "files": files, "sources": facts}


def provenance(source: Source) -> dict:
    """Place, checksums or revision, licence, what is taken, the paper's counts."""
    facts: dict = {"licence": source.data.licence}
    if source.data is not OWN:
        facts["taken"] = " ".join((source.data.record.__doc__ or "").split())
    if source.data.paper:
        facts["paper"] = source.data.paper
    if source.hub:
        return facts | {"hub": source.hub, "revision": revision_of(source.hub.split(":")[0])}
    return facts | {"sha256": {str(path): sha256_file(path) for path in source.files()}}


def revision_of(name: str) -> str:
    """The commit of the data set that the hub has now; "unknown" if it cannot be asked."""
    try:
        return HfApi().dataset_info(name, timeout=10).sha or "unknown"
    except Exception:  # of the hub's, of the network's
        return "unknown"
