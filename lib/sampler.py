"""Sampling many completions at once, from a key-value cache.

A language model writes one token at a time, and each needs the keys and values of all tokens before it. Three
ideas make this fast, a fourth makes it reproducible:

1. **Prefill once, then decode.** One forward pass reads a prompt and leaves its keys and values in the cache;
   from then on a step feeds one token a row and adds one column. GRPO wants `group_size` answers to a prompt:
   the prompt is read once, and its row of the cache is repeated.
2. **Unequal lengths share a batch.** Rows are aligned on the right, so that all append at the same column:

       prompt 0   a b c d e | x y        columns ->
       prompt 1   . . . f g | z w        "." is padding: masked, and no position is spent on it

   Each row counts positions from its own first token. So it computes what it would compute alone, up to the
   rounding of matrix products of another shape, whoever shares its batch.
3. **Rows come and go.** A row that has ended would cost compute until the longest one ends. When a quarter
   has ended, the cache is repacked: they leave, columns that are now padding in every row are cut, and
   waiting prompts move in. Longest prompts go first: neighbours are alike in length, and what does not fit
   into memory fails at once, not after an hour. `max_batch_tokens` bounds rows x columns with every row
   counted at the full length that it may reach, so it holds to the last step.
4. **Each completion has its own random stream**, made from its seed. So it depends on its prompt and seed
   alone: not on batch-mates, budget, order or number of processes.

Log-probabilities come from the very logits that are sampled, and logits exist for the last position only: at
a vocabulary of 150 000, those of whole prompts would be larger than the model. The cache itself is in
lib/cache.py, the draws are in lib/draw.py.
"""

from __future__ import annotations

import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lib.cache import attention_mask, context_of, copy_last_row, pack_rows, table_rows
from lib.draw import draw, uniform

PREFILL_TOKENS = 8192  # bounds the activations of one pass over prompts (a longer prompt goes alone)


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]  # with the end-of-sequence token, if one was drawn
    logprobs: list[float]  # log pi(token | all tokens before), one for each token
    finish_reason: str  # "eos" or "length"


@torch.no_grad()  # and not inference_mode, in which autocast would cast trainable weights anew for every token
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_ids: Sequence[int],
    generator: torch.Generator | None = None,
    max_batch_tokens: int | None = None,
    seeds: Sequence[int] | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Draw `group_size` completions for each prompt, a list of token ids; the result is prompt-major.

    Temperature 0 is greedy. logprobs are of the distribution at the given temperature (greedy: at 1), before
    `top_p` cuts it. `max_batch_tokens` bounds rows x cache columns (None: none). `seeds`: one 63-bit integer
    for each completion; without them, they are drawn from `generator`. A model in training mode is so again
    afterwards. Raises ValueError for a setting out of range and for a prompt that is empty or, with
    max_new_tokens, exceeds the context or the budget; FloatingPointError for logits that are not finite.
    """
    _check(model, prompts, group_size, max_new_tokens, temperature, top_p, max_batch_tokens)
    total = len(prompts) * group_size
    if seeds is None:
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (total,), generator=generator, device=device).tolist()
    elif generator is not None or len(seeds) != total:
        raise ValueError(f"{len(seeds)} seeds for {total} completions: give one each, and then no generator")
    if not prompts:
        return []
    batch = _Batch(model, prompts, group_size, max_new_tokens, max_batch_tokens, seeds)
    batch.temperature, batch.top_p, batch.eos = temperature, top_p, batch.long(list(eos_token_ids))
    in_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with tqdm(
            total=total, desc="sampling", unit="completion", disable=not progress, delay=2, leave=False
        ) as bar:
            while batch.refill(bar):
                batch.step()
    finally:
        for module in in_training:
            module.training = True
    return batch.completions()


def _check(model, prompts, group_size, max_new_tokens, temperature, top_p, max_batch_tokens) -> None:
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError(f"group_size {group_size} and max_new_tokens {max_new_tokens} must be at least 1")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1]")
    context, table = context_of(model.config), table_rows(model)
    for i, prompt in enumerate(prompts):
        sizes = f"prompt {i}: {len(prompt)} tokens + max_new_tokens {max_new_tokens}"
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} has no tokens")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(f"{sizes} exceed the model's context, {context} tokens")
        if max(prompt) >= table:
            raise ValueError(f"prompt {i} has the token id {max(prompt)}, the model's table has {table} rows")
        if max_batch_tokens is not None and len(prompt) + max_new_tokens > max_batch_tokens:
            raise ValueError(f"{sizes} exceed max_batch_tokens {max_batch_tokens}, even as the only row")


@dataclass
class _Rows:
    """The completions in the batch: tensors (rows,) int64, `ended` bool."""

    completion: Tensor  # index in the result
    seed: Tensor
    prompt_length: Tensor
    drawn: Tensor  # number of tokens so far
    token: Tensor  # the newest; not in the cache yet
    ended: Tensor

    def __len__(self) -> int:
        return len(self.token)

    def select(self, index: Tensor) -> _Rows:
        return _Rows(*(column[index] for column in vars(self).values()))

    def join(self, other: _Rows) -> _Rows:
        return _Rows(*map(torch.cat, zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class _Prefilled:
    """Prompts that were read: their numbers (n), cache, and logits (n, vocab) of the first token to come."""

    prompts: list[int]
    cache: Cache
    logits: Tensor


class _Batch:
    """The rows that decode together, their cache, the completions that wait, and everything drawn so far."""

    temperature: float
    top_p: float
    eos: Tensor  # (number of end-of-sequence tokens,)

    def __init__(self, model, prompts, group_size, max_new_tokens, max_batch_tokens, seeds) -> None:
        self.model, self.prompts, self.group_size, self.limit = model, prompts, group_size, max_new_tokens
        self.budget = sys.maxsize if max_batch_tokens is None else max_batch_tokens
        self.seeds, self.lengths = self.long(seeds), self.long([len(prompt) for prompt in prompts])
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.waiting = [i * group_size + member for i in longest_first for member in range(group_size)]
        self.split: _Prefilled | None = None  # the prompt of which a part of the group still waits
        # One column more than needed: a row that has ended draws on until it leaves, and writes there.
        self.tokens = torch.zeros(len(seeds), max_new_tokens + 1, dtype=torch.long, device=model.device)
        self.logprobs = torch.zeros(len(seeds), max_new_tokens + 1, device=model.device)
        self.rows, self.ended, self.cache, self.capacity = self._new_rows([]), 0, Cache(layers=[]), 0
        self.mask: Tensor | None = None  # for all `capacity` columns

    def long(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.model.device)

    def _new_rows(self, completions: list[int]) -> _Rows:
        index, none = self.long(completions), self.long([0] * len(completions))
        length = self.lengths[index // self.group_size]
        return _Rows(index, self.seeds[index], length, drawn=none, token=none, ended=none.bool())

    def refill(self, bar: tqdm) -> bool:
        """Repack if a quarter of the rows has ended or the cache is full. False once all is done."""
        while 4 * self.ended >= len(self.rows) or self.cache.get_seq_length() == self.capacity:
            bar.update(self.ended)
            self._repack()
            if len(self.rows) == 0:
                return False
        return True

    def step(self) -> None:
        """Each row's newest token goes through the model and into the cache, and the next one is drawn."""
        rows, columns = self.rows, self.cache.get_seq_length() + 1
        positions = (rows.prompt_length + rows.drawn - 1)[:, None]  # (rows, 1)
        mask = None if self.mask is None else self.mask[..., :columns]
        self._append(rows, self._next_logits(rows.token[:, None], positions, mask, self.cache))
        self.ended = int(rows.ended.sum())  # the one moment in a step that waits for the device

    def _next_logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """ids, positions (rows, T) -> logits (rows, vocab) after the last of them. Extends the cache."""
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _append(self, rows: _Rows, logits: Tensor) -> None:
        u = uniform(rows.seed, rows.drawn)  # (rows,)
        rows.token, logprob = draw(logits, u, self.temperature, self.top_p)
        slot = rows.drawn.clamp(max=self.limit)
        self.tokens[rows.completion, slot] = rows.token
        self.logprobs[rows.completion, slot] = logprob
        rows.drawn = rows.drawn + 1
        rows.ended = rows.ended | torch.isin(rows.token, self.eos) | (rows.drawn >= self.limit)

    def _repack(self) -> None:
        """Rows that have ended leave, waiting completions move in, the cache is copied to its new size."""
        stay = (~self.rows.ended).nonzero()[:, 0]
        kept = self.rows.select(stay)
        taken, arrivals = self._admit(kept)
        new = self._new_rows(taken)
        if arrivals:
            self._append(new, torch.cat([prefilled.logits[index] for prefilled, index in arrivals]))
        self.rows = kept.join(new)
        self.ended = int(self.rows.ended.sum())
        if len(self.rows) == 0:
            return
        parts = [(self.cache, stay)] if len(kept) else []
        parts += [(prefilled.cache, index) for prefilled, index in arrivals]
        used = self.rows.prompt_length + self.rows.drawn - 1  # (rows,) columns that a row fills
        columns, most = int(used.max()), int(self.rows.prompt_length.max()) + self.limit
        self.capacity = min(most, columns + max(64, columns // 4))
        self.cache = pack_rows(parts, columns, self.capacity)
        self.mask = attention_mask(self.model, columns - used, 1, self.capacity)

    def _admit(self, kept: _Rows) -> tuple[list[int], list[tuple[_Prefilled, Tensor]]]:
        """The waiting completions that the budget has room for, and their prompts, prefilled: each with row
        indices (r,) that repeat a prompt once for each of those completions."""
        if not self.waiting:
            return [], []
        longest = max([len(self.prompts[self.waiting[0] // self.group_size]), *kept.prompt_length.tolist()])
        room = self.budget // (longest + self.limit) - len(kept)
        taken, self.waiting = self.waiting[:room], self.waiting[room:]
        if not taken:
            return [], []
        count = Counter(i // self.group_size for i in taken)  # completions of each prompt, in that order
        unread, arrivals = list(count), []
        if self.split is not None:
            arrivals, unread = [self.split], unread[1:]
        while unread:
            n = max(1, min(PREFILL_TOKENS, self.budget) // len(self.prompts[unread[0]]))
            arrivals.append(self._prefill(unread[:n]))
            unread = unread[n:]
        end, self.split = arrivals[-1], None
        if self.waiting and self.waiting[0] // self.group_size == end.prompts[-1]:
            self.split = _Prefilled(end.prompts[-1:], copy_last_row(end.cache), end.logits[-1:])
        repeats = [[i for i, prompt in enumerate(x.prompts) for _ in range(count[prompt])] for x in arrivals]
        return taken, [(x, self.long(index)) for x, index in zip(arrivals, repeats, strict=True)]

    def _prefill(self, prompts: list[int]) -> _Prefilled:
        """Read prompts, of which the first is the longest, in one pass."""
        longest = len(self.prompts[prompts[0]])
        ids = self.long([[0] * (longest - len(self.prompts[i])) + list(self.prompts[i]) for i in prompts])
        padding = longest - self.lengths[self.long(prompts)]  # (n,)
        positions = torch.arange(longest, device=ids.device) - padding[:, None]  # (n, longest)
        mask, cache = attention_mask(self.model, padding, longest, longest), DynamicCache()
        return _Prefilled(prompts, cache, self._next_logits(ids, positions.clamp(min=0), mask, cache))

    def completions(self) -> list[Completion]:
        tokens, logprobs = self.tokens[:, : self.limit].cpu(), self.logprobs.cpu()
        is_eos = torch.isin(tokens, self.eos.cpu())  # what a row drew after its first eos is cut off here
        has_eos = is_eos.any(1)
        lengths = torch.where(has_eos, is_eos.int().argmax(1) + 1, self.limit)
        result = []
        for ids, values, n, eos in zip(tokens, logprobs, lengths.tolist(), has_eos.tolist(), strict=True):
            if not values[:n].isfinite().all():
                raise FloatingPointError("the model's logits are not finite: broken weights or precision")
            result.append(Completion(ids[:n].tolist(), values[:n].tolist(), "eos" if eos else "length"))
        return result


def random_numbers(seed: int, label: str) -> torch.Generator:
    """A generator of its own for everything that has a name: the same for all models, so that they are paired."""
    return torch.Generator().manual_seed(zlib.crc32(label.encode()) * 2**20 + seed)


def draw_seeds(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**63 - 1, (count,), generator=generator).tolist()
