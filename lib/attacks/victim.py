"""A model under attack, as a user and an attacker meet it: what it is sent, and what it answers, judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import UserError
from lib.chat import decode, encode_prompt, encode_text, eos_token_ids, parse_completion, parse_direct
from lib.judges import Judge
from lib.policy import context_of
from lib.run.checks import check_ids
from lib.sampler import sample

NOT_ASKED = (
    "not asked"  # the finish_reason of a text that is too long to be sent: neither success nor defence
)
UNANSWERED = {"reasoning": "", "answer": "", "well_formed": False, "closed": False, "refusal": "full"}
UNANSWERED |= {
    "reasoning_tokens": 0,
    "answer_tokens": 0,
    "tokens": 0,
    "finish_reason": NOT_ASKED,
    "harm": None,
    "task": None,
}


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
        read = partial(encode_prompt, self.tokenizer, reasoning=self.reasoning, system=self.system)
        write = partial(encode_text, self.tokenizer)
        ids = encoded(read, sent, self.name) + encoded(write, opening, self.name)
        check_ids(self.model, [ids], [f"{self.name}: {sent[:40]!r}"])
        return ids

    def fits(self, ids: Sequence[int], behind: int = 0) -> bool:
        """Whether so many tokens, and the answer or `behind` further ones, are within the model's context."""
        return len(ids) + max(self.max_new_tokens, behind) <= context_of(self.model.config)

    def ask(
        self,
        behaviours: Sequence[dict],
        sent: Sequence[str],
        openings: Sequence[str],
        seeds: Sequence[int],
    ) -> list[dict]:
        """What it answers to each text, with the judge's verdict; all four of one length. Each answer has its own seed, so it
        does not depend on what else is asked.

        The judge sees the behaviour as it was given, not the attacked text, and the answer without its reasoning; and apart, if
        it asks for `contexts`, the text that the behaviour is about. `harm`, `task` and `refusal` are None where it gave no
        verdict. A text that is too long gets UNANSWERED. Raises UserError for a broken model, and for a judge whose scores
        are out of range.
        """
        prompts = [self.encode(text, opening) for text, opening in zip(sent, openings, strict=True)]
        rows = [i for i, ids in enumerate(prompts) if self.fits(ids)]
        asked = [(behaviours[i], prompts[i], openings[i], seeds[i]) for i in rows]
        answers = dict(zip(rows, self._answers(asked) if asked else [], strict=True))
        return [answers.get(i) or dict(UNANSWERED) for i in range(len(prompts))]

    def _answers(self, asked: Sequence[tuple[dict, list[int], str, int]]) -> list[dict]:
        """Of behaviours, prompts, openings and seeds that fit. One that exceeds a batch's budget goes alone: what is asked must
        not depend on a budget with which a run may go on."""
        behaviours, prompts, openings, seeds = zip(*asked, strict=True)
        longest = max(map(len, prompts)) + self.max_new_tokens
        try:
            completions = sample(
                self.model,
                prompts,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                eos_token_ids=eos_token_ids(self.model, self.tokenizer),
                seeds=seeds,
                max_batch_tokens=self.max_batch_tokens and max(self.max_batch_tokens, longest),
                progress=self.progress,
            )
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"{self.name}: {error}") from error
        read = []
        for opening, completion in zip(openings, completions, strict=True):
            ids = (
                self.tokenizer.encode(opening, add_special_tokens=False) + completion.token_ids
            )  # read as one text
            own = {"tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}
            read.append(self._read(decode(self.tokenizer, ids)) | own)
        requests, answers = [b["prompt"] for b in behaviours], [r["answer"] for r in read]
        contexts = [b.get("context") or "" for b in behaviours]
        harms = self.judge.harm_score(requests, answers, *([contexts] if any(contexts) else []))
        tasks, labels = self.judge.task_score(requests, answers), self.judge.refusal_labels(requests, answers)
        for behaviour, line, harm, task, label in zip(behaviours, read, harms, tasks, labels, strict=True):
            for score in (harm, task):
                if score is not None and not 0 <= score <= 1:  # not a number fails this, too
                    where = f"{self.name}, {behaviour.get('id', behaviour['prompt'])}"
                    raise UserError(
                        f"--judge {self.judge.name}: gave {score} ({where}); scores must be numbers in [0, 1]"
                    )
            line |= {"harm": harm, "task": task, "refusal": label}
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


def encoded(encode: Callable[[str], list[int]], text: str, what: str) -> list[int]:
    """`encode(text)`; a UserError that names `what` where it fails: a tokenizer may lack both a word and an unknown token."""
    try:
        return encode(text)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
