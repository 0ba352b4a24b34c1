"""A prompt and the answer to it, as a judge's own chat template writes them, in token ids.

The template is the model's, never a copy of ours, so it is followed to the letter; it writes the beginning-of-sequence token
itself, so the tokenizer adds none. Only one thing differs from the usual tokenizer(text): what an answer *spells* is never a
special token. Else a policy could learn to write "<|im_end|>" and go on in the judge's name. Plain words are another matter:
an answer may say "<END CONVERSATION>" or "Safety: Safe", and the template offers the model nothing to tell those from its own.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from lib import UserError
from lib.chat import render
from lib.judges import Score
from lib.judges.language_model import LanguageModel, encodable, expected_value

STYLES = (  # of a message's content; a template that expects the other drops the text, or fails
    lambda text: text,
    lambda text: [{"type": "text", "text": text}],  # Llama-Guard-3-1B's
)


class Exchange:
    """Fills the chat template of `judge` with one user message and the answer of the assistant.

    `says`: a piece of the template's text, by which it is known. `options` are variables of the template. Raises UserError if
    the template does not show prompt and answer, or does not say that piece.
    """

    def __init__(self, judge: LanguageModel, *, says: str = "", **options: Any) -> None:
        self.tokenizer, self.options = judge.tokenizer, options
        self.special = judge.special
        for self.style in STYLES:
            try:
                text = self.text("QUESTION", "REPLY")
            except (TemplateError, TypeError):
                continue
            if all(part in text for part in ("QUESTION", "REPLY", says)):
                return
        raise UserError(
            f"--judge: {judge.name}: its chat template is not the one that this judge is asked by"
        )

    def text(self, prompt: str, answer: str) -> str:
        roles = {"user": encodable(prompt), "assistant": encodable(answer)}
        messages: list[Any] = [
            {"role": role, "content": self.style(content)} for role, content in roles.items()
        ]
        return render(self.tokenizer, messages, **self.options)

    def ids(self, prompt: str, answer: str) -> list[int]:
        if not any(token in part for token in self.special for part in (prompt, answer)):
            return self.plain(self.text(prompt, answer))
        # A character that occurs in neither stands for each special token that they spell; those left are the template's.
        mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in prompt and c not in answer)
        for number, token in enumerate(self.special):
            prompt, answer = (part.replace(token, f"{mark}{number}{mark}") for part in (prompt, answer))
        pieces = re.split("(" + "|".join(map(re.escape, self.special)) + ")", self.text(prompt, answer))
        ids: list[int] = []
        for i, piece in enumerate(pieces):  # plain text and special tokens, in turns
            spelled = re.sub(f"{mark}(\\d+){mark}", lambda match: self.special[int(match[1])], piece)
            ids += self.plain(spelled, split_special_tokens=True) if i % 2 == 0 else self.plain(piece)
        return ids

    def plain(self, text: str, **options: Any) -> list[int]:
        """Token ids of the text, with nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False, **options)["input_ids"])


def open_guard(
    name: str, device: str, *, kind: str, architecture: str, says: str
) -> tuple[LanguageModel, Exchange]:
    """A guard, which is a chat model whose template asks the question. UserError if `name` is none of this `kind`."""
    judge = LanguageModel(name, chat=True, device=device)
    if judge.config.model_type != architecture:
        raise UserError(
            f"--judge: {judge.name}: architecture {judge.config.model_type}; {kind} is {architecture}"
        )
    return judge, Exchange(judge, says=says)


def weighed(judge: LanguageModel, exchange: Exchange, opening: str, harms: dict[str, float]) -> Score:
    """harm_score: the mean of `harms`, label -> harm, under the probabilities of the labels when the reply begins so."""
    begun, labels = exchange.plain(opening), [exchange.plain(label) for label in harms]

    def harm_score(prompts: list[str], answers: list[str]) -> list[float | None]:
        read = [exchange.ids(prompt, answer) + begun for prompt, answer in zip(prompts, answers, strict=True)]
        return [expected_value(p, list(harms.values())) for p in judge.label_probabilities(read, labels)]

    return harm_score
