"""manifest.json of stage 1: what was made of what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lib.run.files import git_revision, sha256_file
from lib.sources import UNKNOWN, files_of, parse_word, provenance, source_names


def words_of(settings) -> list[str]:
    """Every word that names a source; `settings` are those of stage 1."""
    return settings.files + settings.eval_files + settings.trace_files


def inputs(settings) -> list[Path]:
    """Every file that stage 1 reads; `settings` are its own."""
    words = words_of(settings)
    return [path for word in words for path in files_of(word)] + (
        [Path(settings.targets)] if settings.targets else []
    )


def manifest(settings, files: dict[str, list[dict]], pool: dict[str, list[dict]], dropped: Counter) -> dict:
    """What was made of what: counts beside the paper's, sources, licences, checksums of all that was read and written."""
    licences = dict(text.rpartition("=")[::2] for text in settings.licences)
    words = words_of(settings)
    names = source_names(words)
    sources = dict(provenance(word, licences) for word in words)
    stages = {"rl pool": [record for records in pool.values() for record in records]}
    stages |= {name.removesuffix(".jsonl"): records for name, records in files.items()}
    for given in map(parse_word, words):
        ours = {
            name: {r["prompt"] for r in records if r["source"] == names[given.text]}
            for name, records in stages.items()
        }
        sources[given.text] |= {"prompts": {name: len(prompts) for name, prompts in ours.items() if prompts}}
    if settings.targets:
        name = Path(settings.targets).name
        sources[settings.targets] = {
            "sha256": sha256_file(settings.targets),
            "licence": licences.get(name, UNKNOWN),
        }
    if settings.source == "sandbox":
        sources["sandbox"] = {"made by": "lib/sandbox/world.py", "licence": "Apache-2.0, as the code"}
    if settings.trace_model:
        sources[settings.trace_model] = {
            "wrote": "traces",
            "licence": licences.get(settings.trace_model, UNKNOWN),
        }
    if settings.rainbow:
        sources["rainbow"] = {"found against": settings.rainbow, "written by": settings.rainbow_attacker}
    counts = {
        name: {
            "records": len(records),
            "prompts": len({record["prompt"] for record in records}),
            "by kind and source": dict(Counter(f"{r['kind']} from {r['source']}" for r in records)),
            "sha256": sha256_file(Path(settings.out) / name),
        }
        for name, records in files.items()
    }
    fixed = {"lambda": settings.lambda_harmful, "seed": settings.seed, "git_revision": git_revision()}
    return fixed | {"files": counts, "dropped": dict(dropped), "sources": sources}
