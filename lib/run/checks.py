"""TODO."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from lib import UserError
from lib.batches import pad_batch
from lib.cache import layer_types, repeat_row, table_rows
from lib.chat import THINK_CLOSE, THINK_OPEN, decode, encode_prompt, encode_text, parse_completion
from lib.policy import token_logprobs
from lib.sampler import sample


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str | Path) -> None:
    """Raise UserError, with the cause, unless all ways in which the stages use the model agree with plain
    passes.

    A plain pass reads one row, without cache and padding: what the model is by its definition. Architectures
    differ in how they pad, cache, scale and count positions, so each way is tried on two short rows of random
    tokens.
    """
    refused = f"{name}: {type(model).__name__} cannot be used here"
    if strange := sorted({*layer_types(model)} - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"{refused}: it has layers of {', '.join(strange)}, and only key-value attention is known"
        )
    # In standard deviations of the logits. In half precision a batch of another shape is rounded otherwise.
    tolerance = 1e-2 if model.dtype == torch.float32 else 0.3
    rows, device = random_rows(model), model.device
    doing = "a plain pass"

    def compare(cause: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for a, b, one in zip(found, expected, spread, strict=False):
            if not ((a - b).square().mean().sqrt() / one).item() <= tolerance:
                raise UserError(f"{refused}: {cause}")

    try:
        logits = [
            model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float()
            for row in rows
        ]
        if not all(x.isfinite().all() for x in logits):
            raise UserError(f"{name}: its logits are not finite: broken weights or precision")
        spread = [x.std().clamp(min=1e-6) for x in logits]
        plain = [
            x[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:], device=device)[:, None])[:, 0]
            for x, row in zip(logits, rows, strict=True)
        ]

        doing = "reading rows padded on the right"
        found = read_rows(model, rows, "right")
        compare("it treats its logits in a way that lib/policy.py does not know", found[:1], plain)
        compare("what it computes depends on padding on the right", found, plain)
        doing = "reading rows padded on the left"
        compare("what it computes depends on padding on the left", read_rows(model, rows, "left"), plain)

        doing = "sampling from a cache"
        written = sample(model, rows, max_new_tokens=2, temperature=0.0, eos_token_ids=[])
        longer = read_rows(model, [row + c.token_ids for row, c in zip(rows, written, strict=True)], "right")
        drawn = [torch.tensor(c.logprobs, device=device) for c in written]
        compare("with a key-value cache it computes something else", drawn, [x[-2:] for x in longer])

        doing = "reading suffixes behind a shared prefix"
        cache, ids = DynamicCache(), torch.tensor(rows[0], device=device)
        model(input_ids=ids[None, :5], cache=cache, use_cache=True, logits_to_keep=1)
        two = ids[5:8].repeat(2, 1)
        behind = (
            model(input_ids=two, cache=repeat_row(cache, 2), logits_to_keep=2).logits.float().log_softmax(-1)
        )
        if behind.shape[1] != 2:
            raise UserError(f"{refused}: it does not heed logits_to_keep")
        found = behind.gather(2, ids[7:].expand(2, 2)[..., None])[..., 0]
        compare("behind a shared prefix it computes something else", found, [plain[0][6:]] * 2)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture's own: whatever it is, it is no bug of the stage
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{refused}: {doing} fails ({type(error).__name__}: {reason})") from error


def random_rows(model: PreTrainedModel) -> list[list[int]]:
    """Rows of 9 and 4 token ids, none of which has a meaning of its own, as padding or an image has."""
    config = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    meant = [value for key, value in config.items() if key.endswith(("token_id", "token_index"))]
    table = table_rows(model)
    ids = torch.randint(table, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [i for i in ids if i not in meant]
    return [ids[:9], ids[9:13]]


def read_rows(model: PreTrainedModel, rows: list[list[int]], side: str) -> list[Tensor]:
    """Log-probabilities of all tokens of each row but the first."""
    ids, mask = (x.to(model.device) for x in pad_batch(rows, 0, side=side))
    predicted = mask & (mask.cumsum(1) > 1)
    return [
        values[chosen]
        for values, chosen in zip(token_logprobs(model, ids, mask, predicted), predicted, strict=True)
    ]


def check_tokenizer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    reasoning: bool,
    system: str = "",
) -> None:
    """Raise UserError unless model and tokenizer belong together: ids and rows, `prompts` (some of the
    data's) there and back, and the markers of `reasoning`. A padding token without a row, which is never
    learned, gives way to the end of sequence.
    """
    name, table = tokenizer.name_or_path or "the model", table_rows(model)
    if tokenizer.pad_token_id >= table:
        tokenizer.pad_token = tokenizer.eos_token
    added = tokenizer.added_tokens_decoder  # the released Gemma 3 of 1 B has one without a row, for images
    if (last := max(i for i in tokenizer.get_vocab().values() if i not in added)) >= table:
        raise UserError(
            f"{name}: its tokenizer has ids up to {last}, its model {table} rows: they do not belong together"
        )
    check_ids(
        model,
        [encode_prompt(tokenizer, prompt, reasoning=reasoning, system=system) for prompt in prompts],
        name,
    )

    def there_and_back(text: str) -> str:
        return decode(tokenizer, encode_text(tokenizer, text))

    given, read = (
        [Counter(re.findall(r"\w+", text.casefold())) for text in texts]
        for texts in (prompts, map(there_and_back, prompts))
    )
    kept = sum((a & b).total() for a, b in zip(given, read, strict=True))
    if 2 * kept < sum(words.total() for words in given):
        raise UserError(
            f"{name}: its tokenizer loses most words of the prompts: {prompts[0][:40]!r} comes back as "
            f"{there_and_back(prompts[0])[:40]!r}; give it the tokenizer that it was trained with"
        )
    if reasoning and not (
        there_and_back(THINK_OPEN).strip() == "<think>"
        and parse_completion(there_and_back(THINK_CLOSE)).well_formed
    ):
        raise UserError(
            f"{name}: its tokenizer cannot write <think> and </think>: add them to it, or see --no-reasoning"
        )


def check_ids(model: PreTrainedModel, rows: Iterable[Sequence[int]], name: str | Path) -> None:
    """Raise UserError for a token id that the model has no row for."""
    table = table_rows(model)
    if (last := max((max(row, default=0) for row in rows), default=0)) >= table:
        raise UserError(
            f"{name}: a prompt has the token id {last}, the model {table} rows: resize it, or drop the token"
        )
