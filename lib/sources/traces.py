"""Reasoning traces that a model writes itself: for stage 1, when there is no better model to learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import UserError
from lib.chat import decode, encode_example, encode_prompt, eos_token_ids
from lib.policy import context_of
from lib.run.checks import check_tokenizer
from lib.run.files import append_jsonl, resume_log
from lib.run.hub import dtype_to_infer, load_policy, load_tokenizer
from lib.sampler import sample

REFLECT = (
    'Someone sends an assistant this message:\n\n"{}"\n\nIn two or three sentences: what do they want, could '
    "it hurt anyone, and should the assistant help or refuse?"
)
PROMPTS_AT_ONCE = 16  # between two savings of the progress


class TraceWriter:
    """A chat model that thinks about a prompt, and then answers with that thought in its <think> block.

    It does so in two steps, because a small chat model hardly ever closes a block that it is asked to open.
    Each text is sampled with a seed of its own, so what is written does not depend on how the work is
    divided.
    """

    def __init__(
        self, name: str, *, device: str, temperature: float, max_new_tokens: int, max_batch_tokens: int
    ) -> None:
        self.name, self.tokenizer = name, load_tokenizer(name)
        self.model = load_policy(name, device=device, dtype=dtype_to_infer(device))
        check_tokenizer(self.model, self.tokenizer, [], reasoning=True)
        self.sampling: dict[str, Any] = dict(
            temperature=temperature, max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens
        )

    def write(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str]]:
        """(reasoning, answer) for each prompt; either may come out empty."""
        questions = [
            encode_prompt(self.tokenizer, REFLECT.format(prompt), reasoning=False) for prompt in prompts
        ]
        reasonings = self._sample(questions, seeds)
        openings = [
            encode_example(self.tokenizer, prompt, reasoning, "")[0][:-1]  # all but the end of the turn
            for prompt, reasoning in zip(prompts, reasonings, strict=True)
        ]
        answers = self._sample(openings, [seed + 1 for seed in seeds])
        return list(zip(reasonings, answers, strict=True))

    def check(self, records: Sequence[dict]) -> None:
        """UserError, by its id, for the first record whose prompt leaves no room for the longest reasoning and answer."""
        longest, limit = self.sampling["max_new_tokens"], self.sampling["max_batch_tokens"]
        context = context_of(self.model.config)
        for record in records:
            question = encode_prompt(self.tokenizer, REFLECT.format(record["prompt"]), reasoning=False)
            opening = encode_example(self.tokenizer, record["prompt"], "", "")[0]
            if (tokens := max(len(question), len(opening) + longest) + longest) > min(context, limit):
                raise UserError(
                    f"--trace-model: {record['id']}: its prompt with a reasoning and an answer takes up to {tokens} tokens; the "
                    f"context of {self.name} is {context}, --trace-max-batch-tokens {limit}: lower --trace-max-new-tokens or "
                    "--max-chars"
                )

    def _sample(self, prompts: list[list[int]], seeds: Sequence[int]) -> list[str]:
        eos = eos_token_ids(self.model, self.tokenizer)
        try:
            completions = sample(self.model, prompts, eos_token_ids=eos, seeds=seeds, **self.sampling)
        except (
            ValueError,
            FloatingPointError,
        ) as error:  # a prompt too long for the model, or a broken model
            raise UserError(f"--trace-model: {self.name}: {error}") from error
        texts = [(decode(self.tokenizer, c.token_ids), c.finish_reason == "eos") for c in completions]
        return [whole_sentences(text, ended) for text, ended in texts]


def write_all(
    writer: TraceWriter, records: list[dict], count: int, seed: int, progress: Path
) -> list[list[tuple[str, str]]]:
    """`count` traces for each record's prompt. What is finished stays in `progress`, for a resumed run."""
    traces = {line["id"]: line["traces"] for line in resume_log(progress)}
    missing = [record for record in records if record["id"] not in traces]
    writer.check(missing)  # before the first one is asked
    with tqdm(total=len(records), initial=len(traces), desc="traces", unit="prompt") as bar:
        for start in range(0, len(missing), PROMPTS_AT_ONCE):
            block = missing[start : start + PROMPTS_AT_ONCE]
            prompts = [record["prompt"] for record in block for _ in range(count)]
            seeds = [seed_of(seed, record["id"], k) for record in block for k in range(count)]
            written = writer.write(prompts, seeds)
            for i, record in enumerate(block):
                traces[record["id"]] = written[i * count : (i + 1) * count]
                append_jsonl(progress, {"id": record["id"], "traces": traces[record["id"]]})
            bar.update(len(block))
    return [[(z, y) for z, y in traces[record["id"]]] for record in records]


def seed_of(*parts: object) -> int:
    """60 bits that depend on all parts."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:15], 16)


def whole_sentences(text: str, ended: bool) -> str:
    """The text without think markers and, where the budget cut it off, without the sentence that was cut.

    >>> whole_sentences("They want a cake. That is harm", ended=False)
    'They want a cake.'
    """
    text = text.replace("<think>", "").replace("</think>", "").strip()
    return text if ended else text[: max(text.rfind(mark) for mark in ".!?\n") + 1].strip()
