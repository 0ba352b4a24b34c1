"""Reasoning traces that a model writes itself: for stage 1, when there is no better model to learn from.

A chat model thinks about a prompt, and then answers with that thought in its <think> block: in two steps,
because a small chat model hardly ever closes a block that it is asked to open. Nor does it ever refuse, and
what is never tried RL cannot find to pay: so in half of the traces the end of the thought and the beginning
of the answer are given. Each text is sampled with a seed of its own, however the work is divided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lib.chat import decode, encode_example, encode_prompt
from lib.run.files import append_jsonl, resume_log
from lib.run.hub import check_tokenizer, dtype_to_infer, load_policy, load_tokenizer
from lib.run.writing import write

REFLECT = (
    'Someone sends an assistant this message:\n\n"{}"\n\nIn two or three sentences: what do they want, could '
    "it hurt anyone, and should the assistant help or refuse?"
)
FREE, REFUSES = ("", ""), ("I should refuse.", "I'm sorry, but I can't")  # ends a thought, begins an answer
PROMPTS_AT_ONCE = 16  # between two savings of the progress


def write_all(records: list[dict], count: int, settings, use: str) -> list[list[list[str]]]:
    """`count` pairs [reasoning, answer] for each record; OUT keeps finished ones for a resumed run."""
    name, device = settings.trace_model, settings.device
    tokenizer, model = load_tokenizer(name), load_policy(name, device=device, dtype=dtype_to_infer(device))
    check_tokenizer(model, tokenizer, [], reasoning=True)
    progress = Path(settings.out) / f"{use.replace(' ', '_')}.partial.jsonl"
    traces = {line["id"]: line["traces"] for line in resume_log(progress)}
    missing = [record for record in records if record["id"] not in traces]
    with tqdm(total=len(records), initial=len(traces), desc=use, unit="prompt") as bar:
        for start in range(0, len(missing), PROMPTS_AT_ONCE):
            block = missing[start : start + PROMPTS_AT_ONCE]
            each = [(record, k) for record in block for k in range(count)]
            given = [REFUSES if refuses(record, k, use) else FREE for record, k in each]
            seeds = [seed_of(settings.seed, record["id"], k) for record, k in each]
            prompts = [record["prompt"] for record, _ in each]
            written = write_pairs(model, tokenizer, prompts, given, seeds, settings)
            for i, record in enumerate(block):
                traces[record["id"]] = written[i * count : (i + 1) * count]
                append_jsonl(progress, {"id": record["id"], "traces": traces[record["id"]]})
            bar.update(len(block))
    return [traces[record["id"]] for record in records]


def refuses(record: dict, k: int, use: str) -> bool:
    """Whether the k-th trace is made to: every second one of a harmful prompt; all of them where SFT, in the
    comparison, has nothing but its traces (as in the sandbox, see lib/sandbox/traces.py)."""
    return record["kind"] == "harmful" and (use == "rl traces" or (seed_of(record["id"]) + k) % 2 == 1)


def seed_of(*parts: object) -> int:
    """60 bits that depend on all parts."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:15], 16)


def write_pairs(model, tokenizer, prompts, given, seeds: Sequence[int], settings) -> list[list[str]]:
    """[reasoning, answer] for each prompt, with what is given; either may come out empty."""
    questions = [encode_prompt(tokenizer, REFLECT.format(p), reasoning=False) for p in prompts]
    thoughts = complete(model, tokenizer, questions, seeds, settings)
    begun = [(t and f"{t} {end}".strip(), opening) for t, (end, opening) in zip(thoughts, given, strict=True)]
    rows = [(prompt, *pair) for prompt, pair in zip(prompts, begun, strict=True)]
    openings = [encode_example(tokenizer, *row)[0][:-1] for row in rows]  # no end of the turn
    answers = complete(model, tokenizer, openings, [seed + 1 for seed in seeds], settings)
    return [[z, y and f"{opening} {y}".strip()] for (z, opening), y in zip(begun, answers, strict=True)]


def complete(model, tokenizer, prompts: list[list[int]], seeds: Sequence[int], settings) -> list[str]:
    """What the model writes behind each prompt, as whole sentences; "" where its context is too small."""
    name, limit = f"--trace-model: {settings.trace_model}", settings.trace_max_new_tokens
    how = {"temperature": settings.trace_temperature, "seeds": seeds}
    written = write(name, model, tokenizer, prompts, limit, settings.max_batch_tokens, **how)
    if short := written.count(None):
        tqdm.write(f"{name}: {short} of {len(written)} prompts exceed its context: no trace")
    parts = [(decode(tokenizer, c.token_ids), c.finish_reason == "eos") if c else ("", True) for c in written]
    return [whole_sentences(*part) for part in parts]


def whole_sentences(text: str, ended: bool) -> str:
    """The text without think markers and, where the budget cut it off, without the sentence that was cut.

    >>> whole_sentences("They want a cake. That is harm", ended=False)
    'They want a cake.'
    """
    text = text.replace("<think>", "").replace("</think>", "").strip()
    return text if ended else text[: max(text.rfind(mark) for mark in ".!?\n") + 1].strip()
