"""A model under attack, as a user and an attacker meet it: what it is sent, and what it answers, judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import UserError
from lib.chat import decode, encode_prompt, encode_text, eos_token_ids, parse_completion, parse_direct
from lib.policy import context_of
from lib.run.checks import check_ids
from lib.sampler import Completion, sample

NOT_ASKED = "not asked"  # finish_reason of a text that cannot be sent: neither success nor defence
UNANSWERED = {"reasoning": "", "answer": "", "well_formed": False, "closed": False, "refusal": "full"}
UNANSWERED |= {"reasoning_tokens": 0, "answer_tokens": 0, "tokens": 0, "finish_reason": NOT_ASKED}
UNANSWERED |= {"harm": None, "task": None}


@dataclass(frozen=True)
class Victim:
    """A loaded model. `reasoning`: it thinks first, so its turn is opened with "<think>\\n"."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reasoning: bool
    judge: Any  # harm_score, task_score and refusal_labels of prompts and answers, see lib.judges
    max_new_tokens: int
    temperature: float
    max_batch_tokens: int = 16384
    system: str = ""  # a system prompt of its own
    progress: bool = True  # show bars

    def encode(self, sent: str, opening: str = "") -> list[int]:
        """Token ids of what it reads. `opening`: put into its mouth, behind the "<think>\\n" of a reasoner.

        Raises UserError for what its tokenizer cannot read: some have no token for the unknown.
        """
        ids = encode_prompt(self.tokenizer, sent, reasoning=self.reasoning, system=self.system)
        ids = [*ids, *encode_text(self.tokenizer, opening)]
        check_ids(self.model, [ids], [self.name])
        return ids

    def fits(self, ids: Sequence[int], behind: int = 0) -> bool:
        """Whether these tokens, and the answer or `behind` further ones, are within the model's context."""
        return len(ids) + max(self.max_new_tokens, behind) <= context_of(self.model.config)

    def bar(self, steps: Sequence[int], name: str) -> Iterable[int]:
        """The steps of a search, with a bar where they take long."""
        return tqdm(steps, name, unit="step", delay=2, leave=False, disable=not self.progress)

    def sendable(self, sent: str, opening: str = "", behind: int = 0) -> list[int]:
        """Its token ids; none if it does not fit or cannot be read: of an attacker that is a failed try."""
        try:
            ids = self.encode(sent, opening)
        except UserError:
            return []
        return ids if self.fits(ids, behind) else []

    def ask(self, tries: Sequence[tuple[dict, dict]], seeds: Sequence[int]) -> list[dict]:
        """What it answers to each try at a behaviour, judged. Each answer has a seed, and does not depend on
        what else is asked. A text that is too long, or that it cannot read, gets UNANSWERED."""
        answers = [dict(UNANSWERED) for _ in tries]
        prompts = {row: self.sendable(new["sent"], new["opening"]) for row, (_, new) in enumerate(tries)}
        prompts = {row: ids for row, ids in prompts.items() if ids}
        if not prompts:
            return answers
        # One that exceeds a batch's budget goes alone: the budget must not decide what is asked.
        longest = max(map(len, prompts.values())) + self.max_new_tokens
        try:
            completions = sample(
                self.model,
                list(prompts.values()),
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                eos_token_ids=eos_token_ids(self.model, self.tokenizer),
                seeds=[seeds[row] for row in prompts],
                max_batch_tokens=max(self.max_batch_tokens, longest),
                progress=self.progress,
            )
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"{self.name}: {error}") from error
        for row, completion in zip(prompts, completions, strict=True):
            answers[row] = self._read(tries[row][1]["opening"], completion)
        self.judged([tries[row][0] for row in prompts], [answers[row] for row in prompts])
        return answers

    def _read(self, opening: str, completion: Completion) -> dict[str, Any]:
        encode = partial(encode_text, self.tokenizer)
        text = decode(self.tokenizer, encode(opening) + completion.token_ids)  # read as one text
        parsed = parse_completion(text) if self.reasoning else parse_direct(text)
        return {
            "reasoning": parsed.reasoning,
            "answer": parsed.answer,
            "well_formed": parsed.well_formed,
            "closed": self.reasoning and "</think>" in text,  # else its reasoning has no end
            "reasoning_tokens": len(encode(parsed.reasoning)),
            "answer_tokens": len(encode(parsed.answer)),
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }

    def judged(self, behaviours: list[dict], lines: list[dict]) -> None:
        """Writes harm, task and refusal into the lines; None where the judge gave no verdict.

        It sees the behaviour as it was given, not the attacked text; the answer without its reasoning; and
        the texts that behaviours are about, if there are any.
        """
        requests, answers = [b["prompt"] for b in behaviours], [line["answer"] for line in lines]
        contexts = [b.get("context") or "" for b in behaviours]
        harms = self.judge.harm_score(requests, answers, *([contexts] if any(contexts) else []))
        tasks, labels = self.judge.task_score(requests, answers), self.judge.refusal_labels(requests, answers)
        for line, harm, task, label in zip(lines, harms, tasks, labels, strict=True):
            line |= {"harm": harm, "task": task, "refusal": label}


def encode_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int] | None]:
    """Ids of each text as it stands; None for one that the tokenizer cannot read."""
    try:
        return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []
    except Exception:  # what a tokenizer without an unknown token raises has no class of its own
        return [None] if len(texts) == 1 else [encode_each(tokenizer, [text])[0] for text in texts]
