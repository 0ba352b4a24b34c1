"""Known sources: the place, columns, licence and filter of each, in one table.

None of these data sets has been opened by us: their columns and splits are those that `seen_in` names, found in
stored copies of cards and of code that reads them. A data set that has changed since ends in one line that names
the columns seen and expected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from lib import UserError
from lib.sources import readers
from lib.sources.readers import Found, say_left_out
from lib.sources.tables import columns_of, other_turns


@dataclass(frozen=True)
class Source:
    hub: str  # OWNER/NAME; "": only as a file
    read: Callable[[dict], Found | str | None]  # a row; None if the filter drops it, or why, if that is said
    columns: tuple[str, ...]  # that `read` needs; "a|b": one of them
    filter: str  # in words, for the manifest
    licence: str
    gated: bool
    seen_in: str  # where columns, split, licence and gating were seen
    optional: tuple[str, ...] = ()  # that `read` takes if they are there
    split: str = "train"
    config: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # of datasets.load_dataset
    minus: str = ""  # the known source whose prompts are taken away
    traces: bool = False  # whether it has reasonings and answers
    any_length: bool = False  # whether --max-chars is not for it
    paper: dict[str, int] = field(default_factory=dict)  # prompts that the paper took (section 4)


def found_in(label: str, source: Source, rows: Iterable[dict]) -> list[Found]:
    """What `source.read` finds, in order; UserError if a column is missing or nothing is left."""
    seen = columns_of(rows)
    if any(not set(names.split("|")) & set(seen) for names in source.columns):
        expected = ", ".join(names.replace("|", " or ") for names in source.columns)
        raise UserError(f"{label}: has columns {', '.join(seen)}; expected {expected} ({source.seen_in})")
    found, left = [], Counter[str]()
    for row in tqdm(rows, desc=label, unit="row", delay=2, leave=False):
        one = source.read(row)
        if isinstance(one, str):
            left[one] += 1
        elif one and one.prompt.strip():
            found.append(one)
            for column in (name for names in source.columns for name in names.split("|")):
                left.update(f"turns of {role or 'no role'}" for role in other_turns(row, column))
    if not found:
        raise UserError(f"{label}: nothing is left by its filter: {source.filter}")
    say_left_out(label, left)
    return [one._replace(prompt=one.prompt.strip()) for one in found]


AS_TEXT = {  # of a csv on the hub: "NA" and "007" are text
    "keep_default_na": False,
    "converters": dict.fromkeys(("vanilla", "adversarial", "prompt", "category"), str),
}
CC_BY, UNSEEN = "CC-BY-4.0", "not verified: see its card"
SOURCES = {
    "wildjailbreak": Source(
        "allenai/wildjailbreak",
        readers.wildjailbreak,
        ("vanilla", "adversarial", "data_type"),
        "data_type vanilla_harmful or adversarial_harmful; the adversarial prompt, or the vanilla one where that is empty",
        "ODC-BY",
        gated=True,
        seen_in="licence on its card, columns in public code that calls load_dataset as the card says",
        config="train",
        options={"delimiter": "\t", **AS_TEXT},
        any_length=True,  # the authors' limit of 1000 characters does not reach it
        paper={"sft": 400, "rl pool": 800},
    ),
    "aegis": Source(
        "nvidia/Aegis-AI-Content-Safety-Dataset-2.0",
        readers.aegis,
        ("prompt", "prompt_label", "violated_categories"),
        "prompt_label unsafe, prompt not REDACTED",
        CC_BY,
        gated=False,
        seen_in="its card",
        optional=("id",),
        paper={"sft": 300, "rl pool": 400},
    ),
    "safeedit": Source(
        "zjunlp/SafeEdit",
        readers.safeedit,
        ("adversarial prompt", "unsafety category"),
        "all of train",
        "CC-BY-NC-SA-4.0",
        gated=True,
        seen_in="licence and gating on its card, columns in its authors' EasyEdit",
        optional=("id",),
        paper={"sft": 300},
    ),
    # Not openbmb/UltraFeedback itself: these are its prompts without those of TruthfulQA, an evaluation set,
    # in one plain column, with a test split apart.
    "ultrafeedback": Source(
        "HuggingFaceH4/ultrafeedback_binarized",
        readers.ultrafeedback,
        ("prompt",),
        "all of train_prefs",
        "MIT",
        gated=False,
        seen_in="its card",
        optional=("prompt_id",),
        split="train_prefs",
        paper={"rl pool": 2000},
    ),
    "or-bench": Source(
        "bench-llm/or-bench",
        readers.or_bench,
        ("prompt", "category"),
        "or-bench-80k without the prompts of or-bench-hard-1k",
        CC_BY,
        gated=False,
        seen_in="its card",
        config="or-bench-80k",
        options=AS_TEXT,
        minus="or-bench-hard",
        paper={"rl pool": 2000},
    ),
    "or-bench-hard": Source(
        "bench-llm/or-bench",
        readers.or_bench,
        ("prompt", "category"),
        "all of or-bench-hard-1k",
        CC_BY,
        gated=False,
        seen_in="its card",
        config="or-bench-hard-1k",
        options=AS_TEXT,
    ),
    "wildchat": Source(
        "allenai/WildChat-1M",
        readers.wildchat,
        ("conversation", "language", "toxic"),
        "language English, toxic false, not opened by the assistant; the first turn of the user",
        "ODC-BY",
        gated=False,
        seen_in="its card",
        optional=("conversation_hash",),
        paper={"evaluation": 500},
    ),
    "xstest": Source(
        "walledai/XSTest",
        readers.xstest,
        ("prompt", "type"),
        "safe: ambiguous; unsafe, or contrast_ in the authors' csv: harmful",
        CC_BY,
        gated=True,
        seen_in="licence on its card, columns in HELM, which reads it; or the authors' xstest_v2 csv",
        optional=("label", "id"),
        split="test",
        paper={"evaluation": 250},
    ),
    "strongreject": Source(
        "walledai/StrongREJECT",
        readers.strongreject,
        ("prompt|forbidden_prompt", "category"),
        "all of it; its small set is strongreject_small_dataset.csv of GitHub alexandrasouly/strongreject, by @FILE",
        UNSEEN,
        gated=True,
        seen_in="columns in public code that reads it; those of the csv in its authors' README",
    ),
    "sorry-bench": Source(
        "sorry-bench/sorry-bench-202503",
        readers.sorry_bench,
        ("turns", "category", "prompt_style"),
        "prompt_style base; of the 44 categories, the four domains of the paper's table 3",
        "its own, research only: see its card",
        gated=True,
        seen_in="PyRIT and other public code that reads it",
        optional=("question_id",),
    ),
    "harmbench": Source(
        "walledai/HarmBench",
        readers.harmbench,
        ("prompt|Behavior", "category|SemanticCategory"),
        "without copyright; the hub's standard: 200 behaviours without targets; the authors' csv by @FILE: 300 of 400, 100 of "
        "them with a context, and names for --targets",
        "MIT",
        gated=True,
        seen_in="licence on its card, columns in public code that reads it; or the authors' csv",
        optional=("BehaviorID", "ContextString", "FunctionalCategory"),
        config="standard",
        paper={"evaluation": 400},
    ),
    "star1": Source(
        "UCSC-VLAA/STAR-1",
        readers.star1,
        ("question", "response", "category"),
        "all of it; one trace a prompt",
        UNSEEN,
        gated=False,
        seen_in="columns in public code that reads it",
        optional=("id",),
        traces=True,
    ),
    "rainbow": Source(
        "",
        readers.rainbow,
        ("prompt",),
        "all of it",
        "generated: see the attacker's licence",
        gated=False,
        seen_in="a file with prompt, found by rainbow teaming against your model after SFT",
        optional=("category", "risk", "id"),
        paper={"rl pool": 800},
    ),
}
