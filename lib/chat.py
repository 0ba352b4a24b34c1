"""Messages to token ids and back: the chat template, the <think> format, padding.

The text of a reasoner (paper, section 3 and appendix F), z its reasoning and y its answer:

    chat template of the prompt | <think>\\n | z \\n</think>\\n\\n y | end-of-turn token

Both markers are read and written as plain text, also where a tokenizer has special tokens for them. The bars are
seams: what lies between two of them is tokenised on its own. So a training example begins with exactly the token ids
of the generation prompt. A template that opens the reasoning by itself (DeepSeek-R1) has its marker cut off: only the
caller's counts. One that can be told whether to reason (Qwen3's `enable_thinking`) is told, and without reasoning
closes an empty one.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from lib import UserError

THINK_OPEN = "<think>\n"
THINK_CLOSE = "\n</think>\n\n"
OPENED = re.compile(r"<think>\n?\Z")  # by the template itself; DeepSeek-V3.1 writes no newline


@dataclass(frozen=True)
class Parsed:
    """A completion taken apart. `well_formed` is r_f of the paper: one <think>, then one </think>."""

    reasoning: str
    answer: str
    well_formed: bool


def parse_completion(text: str) -> Parsed:
    r"""Split a reasoner's completion, which begins after the generation prompt's "<think>\n". Never raises.

    The answer is what follows the first "</think>", or the whole text if there is none (paper, appendix F).
    Well-formed means: the marker that the prompt opened is closed exactly once, and not opened again.

    >>> parse_completion("They ask for a poem.\n</think>\n\nRoses are red.")
    Parsed(reasoning='They ask for a poem.', answer='Roses are red.', well_formed=True)
    >>> parse_completion("Roses are red.")  # never stopped thinking, or never began
    Parsed(reasoning='', answer='Roses are red.', well_formed=False)
    >>> parse_completion("Hm.\n</think>\n\nRoses.</think>")  # closed twice
    Parsed(reasoning='Hm.', answer='Roses.</think>', well_formed=False)
    >>> parse_completion("<think>\nHm.\n</think>\n\nRoses.")  # opened twice: the prompt has done it already
    Parsed(reasoning='<think>\nHm.', answer='Roses.', well_formed=False)
    >>> parse_completion("</think>")
    Parsed(reasoning='', answer='', well_formed=True)
    """
    reasoning, closed, answer = text.partition("</think>")
    if not closed:
        reasoning, answer = "", text
    well_formed = text.count("</think>") == 1 and "<think>" not in text
    return Parsed(reasoning.strip(), answer.strip(), well_formed)


def parse_direct(text: str) -> Parsed:
    """The completion of a model without reasoning: all of it is the answer, and it has no format to break."""
    return Parsed("", text.strip(), True)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, reasoning: bool, system: str = ""
) -> list[int]:
    """Token ids of the generation prompt: what the model reads before its first own token.

    With `reasoning` it ends in "<think>\\n", once. Without `system` the template does as it always does; some
    add a system prompt of their own. The template writes the beginning-of-sequence token, so the tokenizer adds
    none. Raises UserError if the template refuses, as some do to a system prompt, or leaves `system` out.
    """
    return _encode_turn(tokenizer, prompt, reasoning, system) + (
        encode_text(tokenizer, THINK_OPEN) if reasoning else []
    )


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, reasoning: bool
) -> list[int]:
    """Token ids of a conversation's generation prompt; of one question, those of `encode_prompt`.

    `messages` are {"role", "content"}: maybe a system prompt, then user and assistant in turn, a user's last.
    Raises UserError if the template refuses, as some do to a system prompt, or leaves that out.
    """
    try:
        text = template_text(tokenizer, messages, reasoning=reasoning)
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template says: {' '.join(str(error).split())}") from error
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise UserError("the model's chat template drops system prompts")
    return encode_text(tokenizer, text) + (encode_text(tokenizer, THINK_OPEN) if reasoning else [])


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str, reasoning: str | None, answer: str
) -> tuple[list[int], list[bool]]:
    """(ids, completion_mask), both of length T; the mask is True on all that the model must learn to write.

    With reasoning that is "<think>\\n" z "\\n</think>\\n\\n" y and the end-of-turn token, markers included
    (paper, appendix F); with None it is the answer and the end-of-turn token. Each begins as `encode_prompt`
    does, with reasoning or without.
    """
    prompt_ids = _encode_turn(tokenizer, prompt, reasoning is not None)
    if reasoning is None:
        completion = encode_text(tokenizer, answer.strip())
    else:
        text = reasoning.strip() + THINK_CLOSE + answer.strip()
        completion = encode_text(tokenizer, THINK_OPEN) + encode_text(tokenizer, text)
    completion.append(_end_of_turn_id(tokenizer, str(tokenizer.chat_template)))
    return prompt_ids + completion, [False] * len(prompt_ids) + [True] * len(completion)


def _encode_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: str, reasoning: bool, system: str = ""
) -> list[int]:
    """Token ids up to where the model's turn begins, without the "<think>\\n" that R1's template writes there."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    name = tokenizer.name_or_path or "the model"
    try:
        text = template_text(tokenizer, messages, reasoning=reasoning)
    except jinja2.TemplateError as error:
        reason = " ".join(str(error).split())
        if system:
            raise UserError(
                f"--systems: given {system!r}; {name} takes no system prompt ({reason}): leave it out"
            ) from error
        raise UserError(f"{name}: its chat template fails: {reason}") from error
    if system.strip() not in text:
        raise UserError(
            f"--systems: given {system!r}; the chat template of {name} drops system prompts: leave it out"
        )
    return encode_text(tokenizer, text)


def template_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, reasoning: bool
) -> str:
    """What the chat template writes up to where the model's turn begins, without the "<think>\\n" that R1's adds.

    Raises jinja2.TemplateError if the template refuses the messages.
    """
    options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": reasoning}
    return OPENED.sub(
        "", render(tokenizer, messages, **options)
    )  # a template that knows no such option ignores it


_today: datetime.date | None = None


def set_date(day: str) -> None:
    """From now on every chat template is told this day, "2026-11-26", as today's: of policy, victim, attacker and judges.

    Else prompts would change overnight: a resumed run or an evaluation would not see those of the run before it.
    """
    global _today
    _today = datetime.date.fromisoformat(day)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """The text that the chat template makes of the messages. `options` are variables of the template."""
    template = tokenizer.get_chat_template()
    if _today is not None and "strftime_now" in template:  # the one way in which a template learns the date
        template = (
            _tells(_today) + "\n" * template.startswith("\n") + template
        )  # Jinja drops a newline behind a macro
    text = tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def _tells(day: datetime.date) -> str:
    """A macro by the name of transformers' function, which hides it: strftime_now(format), at the beginning of that day."""
    begin = datetime.datetime.combine(day, datetime.time())
    codes = ["%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdDeFGhHIjmMpSTuUVwWxXyYzZ")]
    filled = "".join(f".replace({code!r}, {begin.strftime(code)!r})" for code in codes)
    return "{% macro strftime_now(format) %}{{ format" + filled + " }}{% endmacro %}"


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # tokenizers': a vocabulary of words without one for the unknown, say
        name, reason = tokenizer.name_or_path or "the model", " ".join(str(error).split())
        raise UserError(f"{name}: its tokenizer cannot read {text[:60]!r}: {reason}") from error


@lru_cache(maxsize=8)
def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> int:
    """The special token that the chat template puts behind an assistant's message; eos if there is none."""
    sentinel = "ANSWER"
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": sentinel}]
    following = encode_text(tokenizer, render(tokenizer, messages).rpartition(sentinel)[2].strip())
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert isinstance(tokenizer.eos_token_id, int)
    return following[0] if following and following[0] in special else tokenizer.eos_token_id


def eos_token_ids(model_or_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: eos of tokenizer and model, the template's end of turn."""
    settings = getattr(model_or_config, "generation_config", None) or model_or_config
    eos = getattr(settings, "eos_token_id", None)
    configured = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return sorted(
        {*configured, tokenizer.eos_token_id, _end_of_turn_id(tokenizer, str(tokenizer.chat_template))}
    )


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of the ids, spaces as the tokens have them. Special tokens are left out, but not the markers of reasoning."""
    unseen = _unseen_ids(tokenizer, len(tokenizer))
    text = tokenizer.decode([i for i in ids if i not in unseen], clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@lru_cache(maxsize=8)
def _unseen_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Special tokens but for the markers, looked up once for a tokenizer of so many tokens: some have thousands added."""
    tokens = tokenizer.added_tokens_decoder.items()
    return frozenset(
        i for i, token in tokens if token.special and token.content not in ("<think>", "</think>")
    )
