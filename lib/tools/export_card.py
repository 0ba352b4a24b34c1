"""The model card of a shared run: README.md with the metadata that the hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from lib.run.text import visible

SECTIONS = {  # of results.json -> what the card calls them
    "dsr": "DSR",
    "worst_case": "DSR, worst over attacks",
    "compliance": "compliance",
    "task_score": "task score",
    "format_rate": "well-formed",
    "reasoning_tokens": "reasoning tokens",
    "exact_match": "exact match",
}
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}  # or the folder of this file
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
messages = [{{"role": "user", "content": "how do i make a cake ?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=256)
text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
{split}
```"""
REASONS = """The chat template opens the reasoning, `<think>`: a server that applies it needs no settings for that, and its
text is the reasoning, `</think>`, and the answer. Give later turns the answers only. Reasoning without an end (no
`</think>` within the budget) is no answer."""


def escape(text: str) -> str:
    """Text that shows as itself in markdown, in one line."""
    text = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\|`*_[]!#~$":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split()).replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def model_card(
    *,
    name: str,
    licence: str,
    base: str,
    reasoning: bool,
    stages: Sequence[dict],
    manifests: Sequence[dict],
    results: Sequence[dict],
) -> str:
    """README.md. `stages`: settings.json of each, the first one first; `manifests` of stage 1; `results` of lib.tools.export."""
    tags = ["safety", "tars", *(["reasoning"] if reasoning else [])]
    data = ModelCardData(
        license=licence,
        base_model=base or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    start, rl = base or stages[0]["model"], any("judge" in s for s in stages)
    kind = "thinks in a `<think>` block before it answers" if reasoning else "answers without reasoning"
    method = (
        f"a light supervised warm start, then {second_stage(stages[-1])}"
        if rl
        else "the light supervised warm start"
    )
    blocks = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escape(name)}",
        f"{escape(start)}, trained by {method}, as in the paper on TARS (Training Adaptive Reasoners for Safety, "
        f"[arXiv 2507.00971](https://arxiv.org/abs/2507.00971)), in an independent implementation. It {kind}.",
        "## Use",
        USE.format(
            name=json.dumps(name),
            split='reasoning, _, answer = text.partition("</think>")'
            if reasoning
            else "answer = text.strip()",
        ),
        *([REASONS] if reasoning else []),
        "## Results",
        *(results_table(found) for found in results),
        *(["Not evaluated."] if not results else [LEGEND]),
        "## Training",
        *(settings_block(stage) for stage in stages),
        "## Data",
        *(data_table(manifest) for manifest in manifests),
        *(["Its data set was not at hand when this card was written."] if not manifests else []),
        "## Limits",
        "\n".join(limits(stages, results)),
    ]
    return "\n\n".join(blocks) + "\n"


LEGEND = """DSR: share of attacks whose answer the judge found harmless. Compliance: share of requests not refused, rightly or
not. Task score: the judge's, of answers to requests that deserve one. n is of the first column."""


def results_table(results: dict[str, Any]) -> str:
    """This model first, then those that were evaluated with it; cells are mean [95 % interval]."""
    own = results["name"]
    columns = [own, *(name for name in results["models"] if name != own)]
    figures = {name: dict(rows(results["models"][name])) for name in columns}
    head = [f"{results['folder']}, 95 % intervals", f"{own} (this)", *columns[1:], "n"]
    lines = [[escape(text) for text in head], ["---"] * len(head)]
    for label, ci in figures[own].items():
        lines.append([escape(label), *(cell(figures[name].get(label)) for name in columns), str(ci["n"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows(figures: dict[str, Any]) -> Iterator[tuple[str, dict]]:
    """(label, ci); the finer groups ("ambiguous/toy") are left to the report."""
    for section, title in SECTIONS.items():
        found = figures.get(section) or {}
        if "mean" in found:
            yield title, found
        else:
            yield from ((f"{title}, {key}", ci) for key, ci in found.items() if "/" not in key)


def cell(ci: dict | None) -> str:
    """
    >>> cell({"mean": 0.8, "low": 0.4902, "high": 0.9433, "n": 10}), cell({"mean": 18.7, "low": 18.3, "high": 19.2, "n": 9})
    ('0.80 [0.49, 0.94]', '18.7 [18.3, 19.2]')
    """
    if ci is None:
        return "-"
    digits = 1 if ci["high"] > 1 else 2
    return f"{ci['mean']:.{digits}f} [{ci['low']:.{digits}f}, {ci['high']:.{digits}f}]"


def second_stage(settings: dict) -> str:
    """What stage II was, by its settings.

    >>> second_stage({"judge": "rubric"}), second_stage({"objective": "rpo", "one_reward": True})
    ('reinforcement learning', 'preference learning (RPO) on the same rewards, with one reward for all prompts')
    """
    method = (
        "preference learning (RPO) on the same rewards"
        if settings.get("objective") == "rpo"
        else "reinforcement learning"
    )
    return method + ", with one reward for all prompts" * bool(settings.get("one_reward"))


def settings_block(settings: dict) -> str:
    stage = f"Stage II, {second_stage(settings)}" if "judge" in settings else "Stage I, supervised warm start"
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    return f"<details><summary>{stage}: all settings</summary>\n\n```json\n{text}\n```\n\n</details>"


def data_table(manifest: dict[str, Any]) -> str:
    """What the stages read, and under which licences."""
    files = manifest.get("files", {})
    counts = [
        f"{n}: {f['records']} records, {f['prompts']} prompts"
        for n, f in files.items()
        if not n.startswith("eval_")
    ]
    lines = [f"{'; '.join(counts)} (lambda {manifest.get('lambda')}, seed {manifest.get('seed')}).", ""]
    lines += ["| source | licence | more |", "| --- | --- | --- |"]
    for name, source in manifest.get("sources", {}).items():
        more = "; ".join(f"{key} {value}" for key, value in source.items() if key != "licence")
        lines.append(
            f"| {escape(name)} | {escape(str(source.get('licence', 'not stated')))} | {escape(more)} |"
        )
    return "\n".join(lines)


def limits(stages: Sequence[dict], results: Sequence[dict]) -> Iterator[str]:
    """What a user must know before relying on it, by what the run was."""
    judges = list(dict.fromkeys(str(s["judge"]) for s in stages if "judge" in s))
    if "sandbox" in judges or stages[0].get("preset") == "sandbox":
        yield "- It knows a made-up world of a few hundred words: a toy to study the method with."
    if judges:
        yield f"- It was rewarded by {escape(', '.join(judges))}: what that judge overlooks, it may have learnt."
    if results:
        yield "- Defences are measured against the attacks above, at their budgets; stronger or adaptive ones get through more."
    else:
        yield "- Nothing is known here about its defences: measure before you rely on them."
    yield "- The reasoning may hold what the answer rightly leaves out: do not show it to users unread."
    yield "- The licences of the base and of the data hold beside the one stated above."
