"""One answer as it is written: token by token, in whole characters, its reasoning told from its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from lib import UserError
from lib.chat import THINK_OPEN, decode
from lib.sampler import draw, uniform

Part = tuple[bool, str]  # whether it is reasoning, and the text


@torch.inference_mode()
def stream(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos_token_ids: Sequence[int],
) -> Iterator[int]:
    """Token ids as they are drawn, the end-of-sequence token too: those of `lib.sampler.sample(seeds=[seed])`.

    Raises UserError for logits that are not finite.
    """
    cache, ids = DynamicCache(), torch.tensor([list(prompt)], device=model.device)  # (1, T), then (1, 1)
    for step in range(max_new_tokens):
        logits = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: broken weights or precision")
        u = uniform(torch.tensor([seed]), torch.tensor([step]))
        token, _ = draw(logits, u, temperature, top_p=1.0)  # (1,)
        yield int(token)
        if int(token) in eos_token_ids:
            return
        ids = token[:, None]


def texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come; together the text of all. A character of several tokens comes when it is whole.

    What a token adds depends on those before it (a space, the rest of a character): so two texts are compared, of
    the last piece alone and with what came since.
    """
    known: list[int] = []
    last = 0  # known[:last] is the last piece that was given, known[last:] came since
    for i in ids:
        known.append(i)
        before, now = decode(tokenizer, known[:last]), decode(tokenizer, known)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            known, last = known[last:], len(known) - last
    if rest := decode(tokenizer, known)[len(decode(tokenizer, known[:last])) :]:
        yield rest


def parts(pieces: Iterable[str], *, reasoning: bool) -> Iterator[Part]:
    r"""Pieces of a completion, told apart: reasoning, with its markers, and answer.

    >>> list(parts(["They a", "sk . </th", "ink", "> no ", "."], reasoning=True))
    [(True, '<think>\n'), (True, 'They a'), (True, 'sk .'), (True, '\n</think>\n\n'), (False, 'no '), (False, '.')]
    """
    thinking, begun, held = reasoning, False, ""
    if thinking:
        yield True, THINK_OPEN
    for piece in pieces:
        held += piece
        if thinking:
            thought, closed, rest = held.partition("</think>")
            if not closed:  # blanks, and what may become the marker, wait
                tail = next(n for n in range(8, -1, -1) if thought.endswith("</think>"[:n]))
                thought = thought[: len(thought) - tail]
            if thought := thought.rstrip():
                yield True, thought
            if not closed:
                held = held[len(thought) :]
                continue
            yield True, "\n</think>\n\n"
            thinking, held = False, rest
        if not begun:
            held = held.lstrip()
        if held:
            yield False, held
            begun, held = True, ""
    if held.strip():
        yield thinking, held.rstrip()
