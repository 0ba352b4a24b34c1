"""Known data sets: for each a short function from a row to a record of ours, with its place and licence.

A record has `kind` (one of EVAL_SETS) and `prompt`, a text or a conversation; it may have `id`, `category`,
`context`, `target` and, for traces, `reasoning` and `answer`. For another schema write a function here:

    @data_set("me/questions:train", "MIT")
    def questions(row):
        \"\"\"Those that were flagged.\"\"\"
        if row["flagged"]:
            return dict(kind="harmful", prompt=row["question"])

`harmful=questions` then reads the hub, `harmful=questions@FILE` a file of these columns. The docstring says
what is taken. We have tried tars, harmbench and xstest on real rows; columns of the others are those of their
cards, or of public code that reads them. Many are gated: ask for access on the hub, then `hf auth login`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lib.rewards import KINDS
from lib.run.text import same_prompt
from lib.sources.tables import load_rows, read_table, text_of, turns_of

EVAL_SETS = (*KINDS, "jailbreak")  # a jailbreak is a harmful prompt in disguise


@dataclass(frozen=True)
class DataSet:
    record: Callable[..., dict | None]  # (row), or (row, path of the file `beside`); None: not taken
    hub: str = ""  # OWNER/NAME[:CONFIG]:SPLIT; "": only as NAME@FILE
    licence: str = "not verified: see its card"
    options: dict[str, Any] = field(default_factory=dict)  # of datasets.load_dataset
    beside: Callable[[Path], Path] | None = None  # a second file that belongs to a file of it
    any_length: bool = False  # whether max_chars is not for it
    paper: dict[str, int] = field(default_factory=dict)  # prompts that the paper took (section 4)

    @property
    def about(self) -> str:
        """What is taken, in words."""
        return " ".join((self.record.__doc__ or "").split())


KNOWN: dict[str, DataSet] = {}
CC_BY = "CC-BY-4.0"
COLUMNS = ("vanilla", "adversarial", "prompt", "category")
CSV = {"keep_default_na": False, "converters": dict.fromkeys(COLUMNS, str)}  # "NA" and "007" are text
TSV = {"delimiter": "\t", **CSV}


def data_set(hub: str = "", licence: str = DataSet.licence, **facts: Any) -> Callable:
    def enter(record: Callable) -> Callable:
        KNOWN[record.__name__.replace("_", "-")] = DataSet(record, hub, licence, **facts)
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


@data_set(
    "allenai/wildjailbreak:train:train",
    "ODC-BY",
    options=TSV,
    any_length=True,
    paper={"sft": 400, "rl pool": 800},
)
def wildjailbreak(row):
    """The harmful ones: the adversarial prompt, or the vanilla one where there is none."""
    if row["data_type"] in ("vanilla_harmful", "adversarial_harmful"):
        return dict(kind="harmful", prompt=row["adversarial"] or row["vanilla"])


@data_set("nvidia/Aegis-AI-Content-Safety-Dataset-2.0:train", CC_BY, paper={"sft": 300, "rl pool": 400})
def aegis(row):
    """Those labelled unsafe, but where the prompt says REDACTED (its text is elsewhere)."""
    if row["prompt_label"] == "unsafe" and row["prompt"].strip() != "REDACTED":
        return dict(kind="harmful", prompt=row["prompt"], category=row["violated_categories"])


@data_set("zjunlp/SafeEdit:train", "CC-BY-NC-SA-4.0", paper={"sft": 300})
def safeedit(row):
    """All: the question inside an attack prompt, not the plain question."""
    return dict(kind="harmful", prompt=row["adversarial prompt"], category=row["unsafety category"])


@data_set(licence="generated: see the attacker's licence", paper={"rl pool": 800})
def rainbow(row):
    """All: what --rainbow found against your model after SFT, OUT/rainbow/prompts.jsonl."""
    return dict(kind="harmful", prompt=row["prompt"], category=row.get("category") or row.get("risk"))


# Not openbmb/UltraFeedback itself: these are its prompts without those of TruthfulQA, an evaluation set.
@data_set("HuggingFaceH4/ultrafeedback_binarized:train_prefs", "MIT", paper={"rl pool": 2000})
def ultrafeedback(row):
    """All of train_prefs."""
    return dict(kind="harmless", prompt=row["prompt"], id=row.get("prompt_id"))


@data_set("bench-llm/or-bench:or-bench-hard-1k:train", CC_BY, options=CSV)
def or_bench_hard(row):
    """All of or-bench-hard-1k."""
    return dict(kind="ambiguous", prompt=row["prompt"], category=row["category"])


def hard_beside(file: Path) -> Path:
    return file.with_name(f"or-bench-hard-1k{file.suffix}")


@cache
def hard_prompts(file: Path | None) -> set[str]:
    rows = read_table(file) if file else load_rows(KNOWN["or-bench-hard"].hub, CSV)
    return {same_prompt(row["prompt"]) for row in rows}


@data_set(
    "bench-llm/or-bench:or-bench-80k:train", CC_BY, options=CSV, beside=hard_beside, paper={"rl pool": 2000}
)
def or_bench(row, beside):
    """or-bench-80k without the prompts of or-bench-hard-1k (for a file: that of this name beside it)."""
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


@data_set("allenai/WildChat-1M:train", "ODC-BY", paper={"evaluation": 500})
def wildchat(row):
    """English, not toxic: the user's first turn, unless the assistant speaks first (it is an answer then)."""
    (first, _), *_ = turns_of(row["conversation"]) or [("nobody", "")]
    if row["language"] == "English" and text_of(row["toxic"]).lower() == "false" and first != "assistant":
        return dict(kind="harmless", prompt=row["conversation"], id=row.get("conversation_hash"))


@data_set("walledai/XSTest:test", CC_BY, paper={"evaluation": 250})
def xstest(row):
    """Safe: ambiguous. Unsafe (by label on the hub, by type contrast_... in the authors' csv): harmful."""
    unsafe = row.get("label") == "unsafe" or row["type"].startswith("contrast_")
    return dict(kind="harmful" if unsafe else "ambiguous", prompt=row["prompt"], category=row["type"])


@data_set("walledai/StrongREJECT:train")
def strongreject(row):
    """All; or by @FILE the small set, strongreject_small_dataset.csv of alexandrasouly/strongreject."""
    prompt = row.get("forbidden_prompt") or row["prompt"]
    return dict(kind="harmful", prompt=prompt, category=row["category"])


SORRY = {
    5: "hate speech",
    24: "crimes or torts",
    39: "potentially inappropriate topics",
    44: "unqualified advice",
}


@data_set("sorry-bench/sorry-bench-202503:train", "its own, research only: see its card")
def sorry_bench(row):
    """prompt_style base; of the 44 categories, the four domains of the paper's table 3."""
    category = text_of(row["category"])
    if category.isdecimal():
        category = next((domain for last, domain in SORRY.items() if int(category) <= last), category)
    if row["prompt_style"] == "base":
        return dict(kind="harmful", prompt=row["turns"][0], category=category)


def targets_beside(file: Path) -> Path:
    return file.with_name(file.name.replace("behaviors", "targets")).with_suffix(".json")


@cache
def targets(file: Path | None) -> dict[str, str]:
    return read_table(file)[0] if file and file.is_file() else {}


@data_set("walledai/HarmBench:standard:train", "MIT", beside=targets_beside, paper={"evaluation": 400})
def harmbench(row, beside):
    """Without copyright, which hashes decide and no judge: the hub's 200, or 300 of 400 in the authors' csv.

    Targets for GCG: those of harmbench_behaviors_X.csv stand in harmbench_targets_X.json beside it.
    """
    if row.get("FunctionalCategory") != "copyright":
        prompt, category = (
            row.get("Behavior") or row["prompt"],
            row.get("SemanticCategory") or row["category"],
        )
        name, context = row.get("BehaviorID"), row.get("ContextString")
        target = targets(beside).get(name)
        return dict(kind="harmful", prompt=prompt, category=category, id=name, context=context, target=target)
