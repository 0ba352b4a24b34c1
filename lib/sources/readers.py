"""A function for each known source: from its row to the prompt in it; or None for a row that we do not want, or, where that
should be said, why not.

Columns and filters are named beside the source's place and licence in `known.SOURCES`.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from lib.sources.tables import first_text

COPYRIGHT = "copyright behaviours (hashes of the text decide these, no judge)"


class Found(NamedTuple):
    """What a row of a source holds for us."""

    kind: str  # harmful, harmless or ambiguous
    prompt: str
    category: str = ""
    id: str = ""  # the source's own name of the prompt
    reasoning: str = ""
    answer: str = ""
    context: str = ""  # that the prompt is about, apart from it


def wildjailbreak(row: dict) -> Found | None:
    """A plain request has no adversarial form, and stands for itself; an adversarial one has both, and takes the place."""
    if row.get("data_type") not in ("vanilla_harmful", "adversarial_harmful"):
        return None
    return Found("harmful", first_text(row, "adversarial,vanilla"))


def aegis(row: dict) -> Found | None:
    """A prompt from the Suicide Detection data set is not given: it says REDACTED, and an id tells where to find it."""
    prompt = first_text(row, "prompt")
    if row.get("prompt_label") != "unsafe" or prompt.strip() == "REDACTED":
        return None
    return Found("harmful", prompt, first_text(row, "violated_categories"), first_text(row, "id"))


def safeedit(row: dict) -> Found:
    """The question inside an attack prompt; the plain question would stand in the column "question"."""
    return Found(
        "harmful",
        first_text(row, "adversarial prompt"),
        first_text(row, "unsafety category"),
        first_text(row, "id"),
    )


def ultrafeedback(row: dict) -> Found:
    return Found("harmless", first_text(row, "prompt"), id=first_text(row, "prompt_id"))


def or_bench(row: dict) -> Found:
    return Found("ambiguous", first_text(row, "prompt"), first_text(row, "category"))


def wildchat(row: dict) -> Found | None:
    """Where the assistant speaks first, the user's turn is an answer, and no prompt."""
    answers = first_text(row, "conversation.0.role") == "assistant"
    if row.get("language") != "English" or first_text(row, "toxic") not in ("false", "False") or answers:
        return None
    return Found("harmless", first_text(row, "conversation"), id=first_text(row, "conversation_hash"))


def xstest(row: dict) -> Found:
    """An unsafe contrast says so in `label` (on the hub) and in its type, contrast_... (in the authors' file)."""
    kind = first_text(row, "type")
    unsafe = row.get("label") == "unsafe" or kind.startswith("contrast_")
    return Found("harmful" if unsafe else "ambiguous", first_text(row, "prompt"), kind, first_text(row, "id"))


def strongreject(row: dict) -> Found:
    return Found("harmful", first_text(row, "prompt,forbidden_prompt"), first_text(row, "category"))


def sorry_bench(row: dict) -> Found | None:
    if row.get("prompt_style") != "base":
        return None
    category = first_text(row, "category")
    if category.isdecimal():  # 1 to 44
        ends = {
            5: "hate speech",
            24: "crimes or torts",
            39: "potentially inappropriate topics",
            44: "unqualified advice",
        }
        category = next((name for end, name in ends.items() if int(category) <= end), category)
    return Found("harmful", first_text(row, "turns.0"), category, first_text(row, "question_id"))


def harmbench(row: dict) -> Found | str:
    if first_text(row, "FunctionalCategory") == "copyright":
        return COPYRIGHT
    category, context = first_text(row, "category,SemanticCategory"), first_text(row, "ContextString")
    return Found(
        "harmful",
        first_text(row, "prompt,Behavior"),
        category,
        first_text(row, "BehaviorID"),
        context=context,
    )


def star1(row: dict) -> Found:
    """One DeepSeek-R1 response, `<think> reasoning </think> answer`. One that is not so has no reasoning here."""
    reasoning, marker, answer = first_text(row, "response").partition("</think>")
    reasoning = reasoning.replace("<think>", "", 1).strip() if marker else ""
    category = first_text(row, "category,category.0")
    return Found(
        "harmful", first_text(row, "question"), category, first_text(row, "id"), reasoning, answer.strip()
    )


def rainbow(row: dict) -> Found:
    return Found(
        "harmful", first_text(row, "prompt"), first_text(row, "category,risk"), first_text(row, "id")
    )


def say_left_out(source: str, left: Counter[str]) -> None:
    """One line on what of a source is not read, if anything."""
    if left:
        print(f"{source}: left out {', '.join(f'{count} {what}' for what, count in left.items())}")
