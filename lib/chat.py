"""Messages to token ids and back: the chat template and the <think> format.

The text of a reasoner (paper, section 3 and appendix F), z its reasoning and y its answer:

    chat template of the prompt | <think>\\n | z \\n</think>\\n\\n y | end-of-turn token

The bars are seams: what lies between two of them is tokenised on its own. So a training example begins with
exactly the token ids of the generation prompt. Both markers are plain text here, whether a tokenizer cuts
them up or not. Where a template writes `<think>` itself (DeepSeek-R1), that is cut off, and ours added
as everywhere. Some templates are told whether to reason (Qwen3's `enable_thinking`): told not to, they write
an empty `<think>` block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib import UserError

THINK_OPEN = "<think>\n"
THINK_CLOSE = "\n</think>\n\n"
OPENED = re.compile(r"<think>\n?\Z")  # by the template itself; DeepSeek-V3.1 writes no newline
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # how a template asks for the date


@dataclass(frozen=True)
class Parsed:
    """A completion taken apart. `well_formed`, the paper's r_f: one <think> (the prompt's), one </think>."""

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
    ### BEGIN SOLUTION format
    reasoning, closed, answer = text.partition("</think>")
    if not closed:
        reasoning, answer = "", text
    well_formed = text.count("</think>") == 1 and "<think>" not in text
    return Parsed(reasoning.strip(), answer.strip(), well_formed)
    ### END SOLUTION


def parse_direct(text: str) -> Parsed:
    """The completion of a model without reasoning: all of it is the answer, and it has no format to break."""
    return Parsed("", text.strip(), True)


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, reasoning: bool, system: str = "") -> list[int]:
    """Token ids of one question's generation prompt, maybe behind a system prompt: see `encode_chat`.

    Without `system` the template does as it always does; some add a system prompt of their own.
    """
    before = [{"role": "system", "content": system}] if system else []
    return encode_chat(tokenizer, [*before, {"role": "user", "content": prompt}], reasoning=reasoning)


def encode_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], *, reasoning: bool) -> list[int]:
    """Token ids of a conversation's generation prompt: what the model reads before its first own token.

    `messages` are {"role", "content"}: maybe a system prompt, then user and assistant in turn, a user's last.
    With `reasoning` the ids end in "<think>\\n", once. The template writes the beginning-of-sequence token,
    the tokenizer adds none. Raises UserError if the template refuses, as some do to a system prompt, or
    leaves a system prompt out.
    """
    ids = _encode_turn(tokenizer, messages, reasoning)
    return ids + encode_text(tokenizer, THINK_OPEN) if reasoning else ids


def encode_example(
    tokenizer: Tokenizer, prompt: str, reasoning: str | None, answer: str
) -> tuple[list[int], list[bool]]:
    """(ids, completion_mask), both of length T; the mask is True on all that the model must learn to write.

    With reasoning that is "<think>\\n" z "\\n</think>\\n\\n" y and the end-of-turn token, markers included
    (paper, appendix F; at sampling the prompt has "<think>\\n" already, but others may run the model without
    this library). With None it is y and the end-of-turn token. No spaces stand at the edges of z and y.
    """
    ### BEGIN SOLUTION learned_tokens
    ids = _encode_turn(tokenizer, [{"role": "user", "content": prompt}], reasoning is not None)
    if reasoning is None:
        completion = encode_text(tokenizer, answer.strip())
    else:
        text = reasoning.strip() + THINK_CLOSE + answer.strip()
        completion = encode_text(tokenizer, THINK_OPEN) + encode_text(tokenizer, text)
    completion.append(_end_of_turn_id(tokenizer, str(tokenizer.chat_template)))
    return ids + completion, [False] * len(ids) + [True] * len(completion)
    ### END SOLUTION


def _encode_turn(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], reasoning: bool) -> list[int]:
    """Token ids up to where the model's turn begins, without a "<think>\\n" that the template writes."""
    text = render(tokenizer, messages, add_generation_prompt=True, enable_thinking=reasoning)  # or ignored
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        name = tokenizer.name_or_path or "the model"
        raise UserError(f"{name}: its chat template drops system prompts: leave it out")
    return encode_text(tokenizer, OPENED.sub("", text))


_today: date | None = None


def set_date(day: str) -> None:
    """Tell every chat template, of policy, victim, attacker and judges, that today is `day`, "2026-11-26".

    Else prompts would change overnight, and a resumed run or an evaluation would not see those before it.
    """
    global _today
    _today = date.fromisoformat(day)


def render(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """The text that the chat template makes of the messages, `options` its variables; or UserError."""
    template, today = tokenizer.get_chat_template(), _today
    if today is not None:
        template = TODAY.sub(lambda call: repr(today.strftime(call[2])), template)
    try:
        text = tokenizer.apply_chat_template([*messages], chat_template=template, tokenize=False, **options)
    except jinja2.TemplateError as error:
        name, reason = tokenizer.name_or_path or "the model", " ".join(str(error).split())
        raise UserError(f"{name}: its chat template fails: {reason}") from error
    assert isinstance(text, str)
    return text


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of the text as it stands. UserError if the tokenizer cannot read it."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # tokenizers': a vocabulary of words without one for the unknown, say
        name, reason = tokenizer.name_or_path or "the model", " ".join(str(error).split())
        raise UserError(f"{name}: its tokenizer cannot read {text[:60]!r}: {reason}") from error


@lru_cache(maxsize=8)  # by tokenizer and template, since a tokenizer may be given another template
def _end_of_turn_id(tokenizer: Tokenizer, chat_template: str) -> int:
    """The special token that the chat template puts behind an assistant's message; eos if there is none."""
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    following = encode_text(tokenizer, render(tokenizer, messages).rpartition("ANSWER")[2].strip())
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert isinstance(tokenizer.eos_token_id, int)
    return following[0] if following and following[0] in special else tokenizer.eos_token_id


def eos_token_ids(model_or_config: Any, tokenizer: Tokenizer) -> list[int]:
    """Every token that ends a completion: eos of tokenizer and model, the template's end of turn."""
    settings = getattr(model_or_config, "generation_config", None) or model_or_config
    eos = getattr(settings, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, _end_of_turn_id(tokenizer, str(tokenizer.chat_template))}
    return sorted((ends | set(eos if isinstance(eos, list) else [eos])) - {None})


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of the ids, spaces as the tokens have them; of special tokens only <think> and </think>."""
    unseen = _unseen_ids(tokenizer, len(tokenizer))
    text = tokenizer.decode([i for i in ids if i not in unseen], clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@lru_cache(maxsize=8)
def _unseen_ids(tokenizer: Tokenizer, size: int) -> frozenset[int]:
    """Special tokens but for the markers, looked up once for a tokenizer of `size` tokens."""
    tokens, markers = tokenizer.added_tokens_decoder.items(), ("<think>", "</think>")
    return frozenset(i for i, token in tokens if token.special and token.content not in markers)
