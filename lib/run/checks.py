"""Before the first step: does a model compute what it is defined to, and is the tokenizer its own?"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cache_utils import DynamicCache

from lib import UserError
from lib.batches import pad_batch
from lib.cache import layer_types, repeat_row
from lib.chat import THINK_CLOSE, THINK_OPEN, decode, encode_prompt, encode_text
from lib.policy import table_rows, token_logprobs
from lib.sampler import sample

Found = list[tuple[list[int], Tensor]]  # rows, and of each the log-probabilities of its last tokens


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str | Path) -> None:
    """Raise UserError, with the cause, unless all ways in which the stages use it agree with plain passes.

    A plain pass reads one row, without cache and padding. Architectures differ in how they pad, cache, scale
    and count positions, so each way is tried on two short random rows.
    """
    with_ = " with --gradient-checkpointing" if model.is_activation_checkpointing else ""
    refused, how = f"{name}: {type(model).__name__} cannot be used here{with_}", "in a plain pass"
    if strange := sorted({*layer_types(model)} - {"full_attention", "sliding_attention"}):
        raise UserError(f"{refused}: it has layers of {', '.join(strange)}, not of key-value attention alone")
    # In standard deviations of the logits. In half precision a batch of another shape is rounded otherwise.
    tolerance = 1e-2 if model.dtype == torch.float32 else 0.3
    try:
        for row in random_rows(model):
            if not _plain_logits(model, row).isfinite().all():
                raise UserError(f"{name}: its logits are not finite: broken weights or precision")
        for how, use in USES.items():
            for row, found in use(model, random_rows(model)):
                logits, ids = _plain_logits(model, row), torch.tensor(row, device=model.device)
                expected = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[-len(found) :, 0]
                gap = (found.to(expected) - expected).square().mean().sqrt() / logits.std().clamp(min=1e-6)
                if not gap.item() <= tolerance:  # not a number fails this, too
                    raise UserError(f"{refused}: {how} it computes something else than in a plain pass")
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture's own: whatever it is, it is no bug of the stage
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{refused}: {how} it fails ({type(error).__name__}: {reason})") from error


def _plain_logits(model: PreTrainedModel, row: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0].float()


def _read(model: PreTrainedModel, rows: list[list[int]]) -> Found:
    """As training reads them, all tokens but the first; the last row begins as another one."""
    rows = [*rows, rows[1] + rows[0]]
    ids, mask = (x.to(model.device) for x in pad_batch(rows, 0, side="right"))
    predicted = mask & (mask.cumsum(1) > 1)
    logprobs = token_logprobs(model, ids, mask, predicted)
    return [(row, x[where]) for row, x, where in zip(rows, logprobs, predicted, strict=True)]


def _sampled(model: PreTrainedModel, rows: list[list[int]]) -> Found:
    written = sample(model, rows, max_new_tokens=2, temperature=0.0, eos_token_ids=[])
    return [(row + c.token_ids, torch.tensor(c.logprobs)) for row, c in zip(rows, written, strict=True)]


def _behind_prefix(model: PreTrainedModel, rows: list[list[int]]) -> Found:
    """As attacks read many suffixes behind one prompt."""
    cache, ids = DynamicCache(), torch.tensor(rows[0], device=model.device)
    model(input_ids=ids[None, :5], cache=cache, use_cache=True, logits_to_keep=1)
    suffixes = {"input_ids": ids[5:8].repeat(2, 1), "cache": repeat_row(cache, 2)}
    logits = model(**suffixes, logits_to_keep=2).logits.float()  # (2, 2, vocab)
    if logits.shape[1] != 2:
        raise ValueError("it does not heed logits_to_keep")
    return [(rows[0], x.gather(1, ids[7:, None])[:, 0]) for x in logits.log_softmax(-1)]


USES = {  # how a stage uses a model
    "read by lib/policy.py": _read,
    "from a key-value cache": _sampled,
    "behind a shared prefix": _behind_prefix,
}


def random_rows(model: PreTrainedModel) -> list[list[int]]:
    """Rows of 9 and 4 token ids, none of which has a meaning of its own, as padding or an image has."""
    config = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    meant = [value for key, value in config.items() if key.endswith(("token_id", "token_index"))]
    ids = torch.randint(table_rows(model), (64,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [i for i in ids if i not in meant]
    return [ids[:9], ids[9:13]]


def check_tokenizer(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], *, reasoning: bool, system: str = ""
) -> None:
    """Raise UserError unless model and tokenizer belong together: each id has a row, `prompts` (some of the
    data's) come back as they were, and so do the markers of `reasoning`. A padding token without a row, which
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
    rows = [encode_prompt(tokenizer, prompt, reasoning=reasoning, system=system) for prompt in prompts]
    check_ids(model, rows, [f"{name}: {prompt[:40]!r}" for prompt in prompts])

    back = [decode(tokenizer, encode_text(tokenizer, prompt)) for prompt in prompts]
    pairs = [(_words(prompt), _words(text)) for prompt, text in zip(prompts, back, strict=True)]
    lost, words = sum((a - b).total() for a, b in pairs), sum(a.total() for a, _ in pairs)
    if 2 * lost > words:
        found = f"its tokenizer loses most words of the prompts: {prompts[0][:40]!r} becomes {back[0][:40]!r}"
        raise UserError(f"{name}: {found}; give it the tokenizer that it was trained with")
    if 10 * lost > words:
        print(f"warning: {name}: its tokenizer loses {lost} of the first {words} words of the prompts")
    if reasoning:
        markers = decode(tokenizer, encode_text(tokenizer, THINK_OPEN) + encode_text(tokenizer, THINK_CLOSE))
        if "".join(markers.split()) != "<think></think>":
            raise UserError(f"{name}: its tokenizer cannot write <think> and </think>: see --no-reasoning")


def _words(text: str) -> Counter[str]:
    """In one spelling: some tokenizers compose accents."""
    return Counter(re.findall(r"\w+", unicodedata.normalize("NFC", text.casefold())))


def check_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Raise UserError, with the row's name, for a token id that the model has no embedding for."""
    table = table_rows(model)
    for name, row in zip(names, rows, strict=True):
        if (last := max(row, default=0)) >= table:
            raise UserError(f"{name}: has the token id {last}, the model {table} rows: drop it, or resize")
