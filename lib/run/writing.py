"""What a model writes behind prompts, for those who want its words and train on none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib import UserError
from lib.chat import eos_token_ids
from lib.policy import context_of
from lib.sampler import Completion, sample


def write(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    limit: int,
    budget: int,
    **how: Any,
) -> list[Completion | None]:
    """Its turn of at most `limit` tokens behind each prompt, a list of token ids; None where there are none,
    or its context is too small. `how`, with a seed for each prompt or none: as of `sample`.

    budget: rows x tokens of a batch. A prompt that exceeds it goes alone: the budget must not decide what is
    written. UserError, which begins with `name`, for a broken model.
    """
    fitting = [i for i, ids in enumerate(prompts) if 0 < len(ids) <= context_of(model.config) - limit]
    longest = max((len(prompts[i]) for i in fitting), default=0) + limit
    how["max_batch_tokens"] = max(budget, longest)
    if "eos_token_ids" not in how:  # of a chat model, its template's
        how["eos_token_ids"] = eos_token_ids(model, tokenizer)
    if "seeds" in how:
        how["seeds"] = [how["seeds"][i] for i in fitting]
    try:
        completions = sample(model, [prompts[i] for i in fitting], max_new_tokens=limit, **how)
    except (ValueError, FloatingPointError) as error:
        raise UserError(f"{name}: {error}") from error
    written = dict(zip(fitting, completions, strict=True))
    return [written.get(i) for i in range(len(prompts))]
