"""Before the first step: is a model read as it writes, and is the tokenizer its own?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib import UserError
from lib.batches import masked_batch
from lib.cache import layer_types
from lib.chat import THINK_CLOSE, THINK_OPEN, decode, encode_text
from lib.policy import table_rows, token_logprobs
from lib.sampler import sample


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str | Path) -> None:
    """Raise UserError, with the cause, unless training gives tokens the log-probabilities of the sampler.

    Architectures differ in how they pad, cache, scale and count positions. The sampler pads on the left and
    reads from a cache; training pads on the right, and computes once what rows share. Where one of them does
    what the architecture is not made for, they differ.
    """
    checkpointing = " with --gradient-checkpointing" if model.is_activation_checkpointing else ""
    refused = f"{name}: {type(model).__name__} cannot be used here{checkpointing}"
    if strange := sorted({*layer_types(model)} - {"full_attention", "sliding_attention"}):
        raise UserError(f"{refused}: it has layers of {', '.join(strange)}, not of key-value attention alone")
    try:
        prompts = random_prompts(model)
        written = sample(model, prompts, max_new_tokens=3, temperature=0.0, eos_token_ids=[])
        rows = [prompt + x.token_ids for prompt, x in zip(prompts, written, strict=True)]
        masks = [[False] * (len(row) - 3) + [True] * 3 for row in rows]
        ids, attention_mask, mask = masked_batch(rows, masks, 0, model.device)
        found = token_logprobs(model, ids, attention_mask, mask)[mask]
        expected = found.new_tensor([logprob for x in written for logprob in x.logprobs])
        logits = model(input_ids=ids[:1], use_cache=False, logits_to_keep=2).logits
        if logits.shape[1] != 2:
            raise ValueError("it does not heed logits_to_keep")
        gap = (found - expected).square().mean().sqrt() / logits.float().std().clamp(min=1e-6)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture's own: whatever it is, it is no bug of the stage
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{refused}: it fails ({type(error).__name__}: {reason})") from error
    # In half precision a batch of another shape is rounded otherwise.
    if not gap.item() <= (1e-2 if model.dtype == torch.float32 else 0.3):  # not a number fails this, too
        raise UserError(f"{refused}: its log-probabilities in training are not those of the sampler")


def random_prompts(model: PreTrainedModel) -> list[list[int]]:
    """Token ids, none of which has a meaning of its own, as padding has. The last two begin alike."""
    config = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    meant = [value for key, value in config.items() if key.endswith(("token_id", "token_index"))]
    ids = torch.randint(table_rows(model), (64,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [i for i in ids if i not in meant]
    return [ids[:9], ids[9:13], ids[9:13] + ids[:9]]


def check_tokenizer(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], *, reasoning: bool
) -> None:
    """Raise UserError unless model and tokenizer belong together: each id has a row, most words of `prompts`
    (some of the data's) come back, and so do the markers of `reasoning`. A padding token without a row, which
    is never learned, gives way to the end of sequence.
    """
    name, table = tokenizer.name_or_path or "the model", table_rows(model)
    if tokenizer.pad_token_id >= table:
        tokenizer.pad_token = tokenizer.eos_token
    added = tokenizer.added_tokens_decoder  # the released Gemma 3 of 1 B has one without a row, for images
    ids = [i for i in tokenizer.get_vocab().values() if i not in added]
    if (last := max([*ids, tokenizer.pad_token_id])) >= table:
        known = f"its tokenizer has ids up to {last}, its model {table} rows"
        raise UserError(f"{name}: {known}: they do not belong together")
    back = [decode(tokenizer, encode_text(tokenizer, prompt)) for prompt in prompts]
    words, kept = _words(prompts), _words(back)
    if 2 * len(words - kept) > len(words):
        found = f"its tokenizer loses most words of the prompts: {prompts[0][:40]!r} becomes {back[0][:40]!r}"
        raise UserError(f"{name}: {found}; give it the tokenizer that it was trained with")
    if reasoning:
        markers = decode(tokenizer, encode_text(tokenizer, THINK_OPEN) + encode_text(tokenizer, THINK_CLOSE))
        if "".join(markers.split()) != "<think></think>":
            raise UserError(f"{name}: its tokenizer cannot write <think> and </think>: see --no-reasoning")


def _words(texts: Sequence[str]) -> set[str]:
    """In one spelling: some tokenizers compose accents."""
    return set(re.findall(r"\w+", unicodedata.normalize("NFC", " ".join(texts).casefold())))


def check_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Raise UserError, with the row's name, for a token id that the model has no embedding for."""
    table = table_rows(model)
    for name, row in zip(names, rows, strict=True):
        if (last := max(row, default=0)) >= table:
            raise UserError(f"{name}: has the token id {last}, the model {table} rows: drop it, or resize")
