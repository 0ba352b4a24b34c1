"""A model under attack, as a user and an attacker meet it: what it is sent, and what it answers, judged."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.chat import decode, encode_prompt, eos_token_ids, parse_completion, parse_direct
from lib.policy import check_ids
from lib.rewards import Judge, refusal_label
from lib.sampler import sample
from lib.settings import UserError


@dataclass(frozen=True)
class Victim:
    """A loaded model. `reasoning`: it thinks first, so its turn is opened with "<think>\\n"."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reasoning: bool
    judge: Judge
    max_new_tokens: int
    temperature: float
    max_batch_tokens: int | None = None
    system: str = ""  # a system prompt of its own
    progress: bool = True  # show a bar where an answer takes long

    def encode(self, sent: str, opening: str = "") -> list[int]:
        """Token ids of what it reads. `opening`: words put into its mouth, behind the "<think>\\n" of a reasoner."""
        ids = encode_prompt(self.tokenizer, sent, reasoning=self.reasoning, system=self.system)
        ids += self.tokenizer.encode(opening, add_special_tokens=False)
        check_ids(self.model, [ids], self.name)
        return ids

    def ask(
        self,
        behaviours: Sequence[dict],
        sent: Sequence[str],
        openings: Sequence[str],
        seeds: Sequence[int],
        *,
        greedy: bool = False,
    ) -> list[dict]:
        """What it answers to each text, with the judge's verdict; all four of one length. Each answer has its own seed, so it
        does not depend on what else is asked.

        The judge sees the behaviour as it was given, not the attacked text, and the answer without its reasoning. `harm` and
        `task` are None where the judge gave no verdict. Raises UserError for a text that is too long, and for a broken model.
        """
        prompts = [self.encode(text, opening) for text, opening in zip(sent, openings, strict=True)]
        try:
            completions = sample(
                self.model,
                prompts,
                max_new_tokens=self.max_new_tokens,
                temperature=0.0 if greedy else self.temperature,
                eos_token_ids=eos_token_ids(self.model, self.tokenizer),
                seeds=seeds,
                max_batch_tokens=self.max_batch_tokens,
                progress=self.progress,
            )
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"{self.name}: {error}") from error
        read = []
        for opening, completion in zip(openings, completions, strict=True):
            ids = self.tokenizer.encode(opening, add_special_tokens=False) + completion.token_ids  # read as one text
            own = {"tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}
            read.append(self._read(decode(self.tokenizer, ids)) | own)
        asked, answers = [b["prompt"] for b in behaviours], [r["answer"] for r in read]
        harms, tasks = self.judge.harm_score(asked, answers), self.judge.task_score(asked, answers)
        for line, harm, task in zip(read, harms, tasks, strict=True):
            for score in (harm, task):
                if score is not None and not 0 <= score <= 1:  # not a number fails this, too
                    raise UserError(f"--judge {self.judge.name}: gave {score} ({self.name}); scores must be numbers in [0, 1]")
            line |= {"harm": harm, "task": task, "refusal": refusal_label(line["answer"])}
        return read

    def _read(self, text: str) -> dict[str, Any]:
        parsed = parse_completion(text) if self.reasoning else parse_direct(text)
        return {
            "reasoning": parsed.reasoning,
            "answer": parsed.answer,
            "well_formed": parsed.well_formed,
            "closed": self.reasoning and "</think>" in text,  # else its reasoning has no end
            "reasoning_tokens": len(self.tokenizer.encode(parsed.reasoning, add_special_tokens=False)),
            "answer_tokens": len(self.tokenizer.encode(parsed.answer, add_special_tokens=False)),
        }


def random_numbers(seed: int, label: str) -> torch.Generator:
    """A generator of its own for everything that has a name: the same for all models, so that they are paired."""
    return torch.Generator().manual_seed(zlib.crc32(label.encode()) * 2**20 + seed)


def draw_seeds(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**63 - 1, (count,), generator=generator).tolist()
