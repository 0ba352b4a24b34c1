"""Known data sets: for each a short function from a row to a record of ours, with its place and licence.

A record has `kind` (one of EVAL_SETS) and `prompt`, a text or a conversation; it may have `id`, `category`,
`context`, `target` and, for traces, `reasoning` and `answer`. For another schema write a function here:

    @data_set("me/questions:train", "MIT")
    def questions(row):
        \"\"\"Those that were flagged.\"\"\"
        if row["flagged"] in (True, "True"):  # in a csv file all is text, and "False" is true
            return dict(kind="harmful", prompt=row["question"])

`harmful=questions` then reads the hub, `harmful=questions@FILE` a file of these columns. The docstring, one
line, says what is taken and how many prompts the paper took (section 4). We have tried tars, harmbench and
xstest on real rows; columns of the others are those of their cards, or of public code that reads them. Many
are gated: ask for access on the hub, then `hf auth login`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lib.rewards import KINDS
from lib.run.text import same_prompt
from lib.sources.tables import load_rows, read_table, text_of

KIND_OF = {kind: kind for kind in KINDS} | {"jailbreak": "harmful"}  # of an evaluation set: it is in disguise
EVAL_SETS = tuple(KIND_OF)


@dataclass(frozen=True)
class DataSet:
    record: Callable[..., dict | None]  # (row), or (row, the file `beside`); None: not taken
    hub: str = ""  # OWNER/NAME[:CONFIG]:SPLIT; "": only as NAME@FILE
    licence: str = "not verified: see its card"
    options: dict[str, Any] = field(default_factory=dict)  # of datasets.load_dataset
    beside: Callable[[str], str] | None = None  # from a file's name to that of a second one that it needs
    any_length: bool = False  # whether max_chars is not for it


KNOWN: dict[str, DataSet] = {}
CC_BY = "CC-BY-4.0"
TSV = {"delimiter": "\t", "keep_default_na": False}


def data_set(*facts: Any, **more: Any) -> Callable:
    """Enter a function into KNOWN, under its name, with the fields of DataSet."""

    def enter(record: Callable) -> Callable:
        KNOWN[record.__name__.replace("_", "-")] = DataSet(record, *facts, **more)
        return record

    return enter


def own(row):
    """All; a row needs `prompt`, a text or a conversation, and `kind` where the word has no KIND=."""
    return row


OWN = DataSet(own, licence="not stated: see where it is from")

# ---- to train on ----


@data_set(licence="mixed sources, research use")
def tars(row):
    """The authors' parquet files, RL's prompts or the test set. WildJailbreak's count as jailbreaks."""
    kind = {"wildjailbreak": "jailbreak", "refusal": "harmless"}.get(row["ability"], "harmful")
    return dict(kind=kind, prompt=row["prompt"], category=row["ability"])


@data_set("allenai/wildjailbreak:train:train", "ODC-BY", options=TSV, any_length=True)
def wildjailbreak(row):
    """The harmful ones, adversarial, or else vanilla. Paper: 400 for SFT, 800 for RL, of any length."""
    if row["data_type"] in ("vanilla_harmful", "adversarial_harmful"):
        return dict(kind="harmful", prompt=row["adversarial"] or row["vanilla"])


@data_set("nvidia/Aegis-AI-Content-Safety-Dataset-2.0:train", CC_BY)
def aegis(row):
    """Unsafe ones, but for REDACTED, whose text is elsewhere. Paper: 300 for SFT, 400 for RL."""
    if row["prompt_label"] == "unsafe" and row["prompt"].strip() != "REDACTED":
        return dict(kind="harmful", prompt=row["prompt"], category=row["violated_categories"])


@data_set("zjunlp/SafeEdit:train", "CC-BY-NC-SA-4.0")
def safeedit(row):
    """All: the question inside an attack prompt, not the plain question. Paper: 300 for SFT."""
    return dict(kind="harmful", prompt=row["adversarial prompt"], category=row["unsafety category"])


@data_set(licence="generated: see the attacker's licence")
def rainbow(row):
    """What --rainbow found against your model after SFT, OUT/rainbow/prompts.jsonl. Paper: 800 for RL."""
    return dict(kind="harmful", prompt=row["prompt"], category=row.get("category") or row.get("risk"))


# Not openbmb/UltraFeedback itself: these are its prompts without those of TruthfulQA, an evaluation set.
@data_set("HuggingFaceH4/ultrafeedback_binarized:train_prefs", "MIT")
def ultrafeedback(row):
    """All of train_prefs. Paper: 2000 for RL."""
    return dict(kind="harmless", prompt=row["prompt"], id=row.get("prompt_id"))


@data_set("bench-llm/or-bench:or-bench-hard-1k:train", CC_BY)
def or_bench_hard(row):
    """All of or-bench-hard-1k."""
    return dict(kind="ambiguous", prompt=row["prompt"], category=row["category"])


@cache
def hard_prompts(file: Path | None) -> set[str]:
    rows = read_table(file) if file else load_rows(KNOWN["or-bench-hard"].hub)
    return {same_prompt(row["prompt"]) for row in rows}


@data_set("bench-llm/or-bench:or-bench-80k:train", CC_BY, beside=lambda name: "or-bench-hard-1k.csv")
def or_bench(row, beside=None):
    """or-bench-80k without or-bench-hard-1k (for a file: the csv of this name beside it). Paper: 2000."""
    return None if same_prompt(row["prompt"]) in hard_prompts(beside) else or_bench_hard(row)


@data_set("UCSC-VLAA/STAR-1:train")
def star1(row):
    """All, with a trace by DeepSeek-R1: `<think> reasoning </think> answer`."""
    reasoning, marker, answer = row["response"].partition("</think>")
    reasoning = reasoning.replace("<think>", "", 1).strip() if marker else ""
    category = text_of(row["category"]) or row["category"][0]
    trace = dict(reasoning=reasoning, answer=answer.strip())
    return dict(kind="harmful", prompt=row["question"], category=category, **trace)


# ---- to evaluate on ----


@data_set("allenai/WildChat-1M:train", "ODC-BY")
def wildchat(row):
    """English, not toxic: the user's first turn, no answer to the assistant's. Paper: 500."""
    answers = [turn["role"] for turn in row["conversation"][:1]] == ["assistant"]
    if row["language"] == "English" and not row["toxic"] and not answers:
        return dict(kind="harmless", prompt=row["conversation"], id=row.get("conversation_hash"))


@data_set("walledai/XSTest:test", CC_BY)
def xstest(row):
    """Safe: ambiguous (paper: 250). Unsafe, by the hub's label or the authors' type contrast_...: harmful."""
    unsafe = row.get("label") == "unsafe" or row["type"].startswith("contrast_")
    return dict(kind="harmful" if unsafe else "ambiguous", prompt=row["prompt"], category=row["type"])


@data_set("walledai/StrongREJECT:train")
def strongreject(row):
    """All; or by @FILE the small set, strongreject_small_dataset.csv of alexandrasouly/strongreject."""
    prompt = row.get("forbidden_prompt") or row["prompt"]
    return dict(kind="harmful", prompt=prompt, category=row["category"])


DOMAINS = {5: "hate speech", 24: "crimes or torts"}  # by the last of their categories
DOMAINS |= {39: "potentially inappropriate topics", 44: "unqualified advice"}


@data_set("sorry-bench/sorry-bench-202503:train", "its own, research only: see its card")
def sorry_bench(row):
    """prompt_style base; of the 44 categories, the four domains of the paper's table 3."""
    category = text_of(row["category"])
    if category.isdecimal():
        category = next((domain for last, domain in DOMAINS.items() if int(category) <= last), category)
    if row["prompt_style"] == "base":
        return dict(kind="harmful", prompt=row["turns"][0], category=category)


@cache
def targets(file: Path | None) -> dict[str, str]:
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}


@data_set(
    "walledai/HarmBench:standard:train",
    "MIT",
    beside=lambda name: name.replace("behaviors", "targets").replace(".csv", ".json"),
)
def harmbench(row, beside=None):
    """Without copyright, which hashes decide and no judge: the hub's 200, the csv's 300. Paper: all 400."""
    if row.get("FunctionalCategory") != "copyright":
        name, prompt = row.get("BehaviorID"), row.get("Behavior") or row["prompt"]
        category = row.get("SemanticCategory") or row["category"]
        more = dict(id=name, context=row.get("ContextString"), target=name and targets(beside).get(name))
        return dict(kind="harmful", prompt=prompt, category=category, **more)
