"""Sampling completions from a key-value cache: first the idea, `sample_simple`, then the engine, `sample`.

A language model writes one token at a time, and each needs the keys and values of all tokens before it. So
one pass reads the prompt and leaves them in a cache; from then on a step feeds one token a row and adds one
column. GRPO wants several completions of a prompt: it is read once, and its row of the cache is repeated.
That is `sample_simple`, for one prompt. `sample` writes the same tokens for many prompts, faster:

1. **Unequal lengths share a batch.** Rows are aligned on the right, so that all append at the same column:

       prompt 0   a b c d e | x y        columns ->
       prompt 1   . . . f g | z w        "." is padding: masked, and no position is spent on it

   Each row counts positions from its own first token. So it computes what it would compute alone, up to the
   rounding of matrix products of another shape, whoever shares its batch.
2. **Rows come and go.** A row that has ended would cost compute until the longest one ends. When a quarter
   has ended, or no column is left, the cache is repacked: ended rows leave, columns that are now padding in
   all rows are cut, waiting completions move in. Longest prompts go first: neighbours are alike in length,
   and what does not fit into memory fails early. `max_batch_tokens` bounds rows x columns at full length.
3. **Shapes stay between two repacks**, so nothing is allocated or copied: a step writes its column in place.
   All of a step is on the device: tokens, who has ended, the column. Reading them makes the host wait for a
   GPU, so it looks every `LOOK` steps only, and cuts off what a row drew after its end. On a GPU a step
   attends to all columns, the unwritten ones masked: all steps are alike, and the first is recorded (a CUDA
   graph). The others replay it: its kernels, 1,400 in a model of 1.5 B, take the host longer to launch than
   the card to run. On a CPU a step attends to the written columns alone.
4. **Each completion has its own random numbers**, made from its seed: whatever its batch-mates, the budget,
   the order or the number of processes. A lower `max_new_tokens` only cuts it short.

Log-probabilities come from the very logits that are sampled, and logits exist for the last position only: at
a vocabulary of 150 000, those of whole prompts would be larger than the model. The cache is in lib/cache.py.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lib.batches import pad_batch
from lib.cache import attention_mask, pack_rows
from lib.policy import context_of, table_rows

LOOK = 16  # steps on a GPU from one look of the host to the next
PREFILL_TOKENS = 8192  # bounds the activations of one pass over prompts (a longer prompt goes alone)


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]  # with the end-of-sequence token, if one was drawn
    logprobs: list[float]  # log pi(token | all tokens before), one for each token
    finish_reason: str  # "eos" or "length"


@torch.no_grad()
def sample_simple(
    model: PreTrainedModel,
    prompt: Sequence[int],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_ids: Sequence[int],
) -> list[Completion]:
    """One completion of one prompt for each seed; the model is in eval mode. All else as in `sample`.

    It stops when all have ended, and makes no pass whose result nobody uses.
    """
    ### BEGIN SOLUTION sample_simple
    given = ([prompt], seeds, eos_token_ids)
    ids, seed, eos = (torch.tensor(x, dtype=torch.long, device=model.device) for x in given)
    cache, tokens, logprobs = DynamicCache(), list[Tensor](), list[Tensor]()
    ended = torch.zeros_like(seed, dtype=torch.bool)
    # Prefill: logits (1, vocab). Then repeat: (rows, vocab). (`cache=` was past_key_values= in transformers.)
    logits = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(len(seeds))
    logits = logits.expand(len(seeds), -1)
    while len(tokens) < max_new_tokens and not ended.all():
        if tokens:
            logits = model(input_ids=tokens[-1][:, None], cache=cache, use_cache=True).logits[:, -1]
        token, logprob = draw(logits, uniform(seed, len(tokens)), temperature, top_p)  # (rows,) each
        tokens.append(token)  # a row that has ended draws on, as padding: `_completion` cuts that off
        logprobs.append(logprob)
        ended |= torch.isin(token, eos)
    rows = zip(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
    return [_completion(row, values, eos_token_ids) for row, values in rows]
    ### END SOLUTION


def _completion(ids: list[int], logprobs: list[float], eos: Sequence[int]) -> Completion:
    """Cut behind the first end-of-sequence token: what the row drew after it has no meaning."""
    n = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
    if not all(map(math.isfinite, logprobs[:n])):
        raise FloatingPointError("the model's logits are not finite: broken weights or precision")
    return Completion(ids[:n], logprobs[:n], "eos" if ids[n - 1] in eos else "length")


@torch.no_grad()  # not inference_mode, in which autocast would cast trainable weights anew for every token
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
    `top_p` cuts it. `max_batch_tokens` bounds rows x columns of the cache (None: nothing does). `seeds`: a
    63-bit integer for each completion; without them, they are drawn from `generator`. A model in training
    mode is so again afterwards. Raises ValueError for a setting out of range and for a prompt that is empty
    or, with max_new_tokens, exceeds context or budget; FloatingPointError for logits that are not finite.
    """
    budget = sys.maxsize if max_batch_tokens is None else max_batch_tokens
    total = len(prompts) * group_size
    _check(model, prompts, group_size, max_new_tokens, temperature, top_p, budget)
    if seeds is None:
        seeds = draw_seeds(generator, total)
    elif generator is not None or len(seeds) != total:
        raise ValueError(f"{len(seeds)} seeds for {total} completions: give one each, and then no generator")
    choose = partial(draw, temperature=temperature, top_p=top_p)
    batch = _Batch(model, prompts, group_size, max_new_tokens, budget, seeds, eos_token_ids, choose)
    in_training = [module for module in model.modules() if module.training]
    bar = tqdm(total=total, desc="sampling", unit="completion", disable=not progress, delay=2, leave=False)
    try:
        model.eval()
        with bar:
            while batch.refill(bar):
                batch.steps()
    finally:
        for module in in_training:
            module.training = True
    rows = zip(batch.tokens[:, :-1].tolist(), batch.logprobs[:, :-1].tolist(), strict=True)
    return [_completion(ids, logprobs, eos_token_ids) for ids, logprobs in rows]


def _check(model, prompts, group_size, max_new_tokens, temperature, top_p, budget) -> None:
    if min(group_size, max_new_tokens) < 1 or not temperature >= 0 or not 0 < top_p <= 1:
        counts = f"group_size {group_size}, max_new_tokens {max_new_tokens}"
        raise ValueError(f"{counts}, temperature {temperature} or top_p {top_p} is out of range")
    most, table = min(context_of(model.config), budget), table_rows(model)
    for i, prompt in enumerate(prompts):
        if not prompt or max(prompt) >= table:
            raise ValueError(f"prompt {i} has no tokens, or one beyond the {table} rows of the model's table")
        if len(prompt) + max_new_tokens > most:
            sizes = f"{len(prompt)} tokens + max_new_tokens {max_new_tokens}"
            raise ValueError(f"prompt {i}: {sizes} exceed context or max_batch_tokens: {most} fit")


class _Batch:
    """All completions by number: what each has drawn, which ones wait, and the `rows` that decode now."""

    def __init__(self, model, prompts, group_size, limit, budget, seeds, eos_token_ids, choose) -> None:
        self.model, self.prompts, self.group_size = model, prompts, group_size
        self.limit, self.budget, self.eos, self.choose = limit, budget, self._long(eos_token_ids), choose
        self.seeds = self._long(seeds)  # (completions,), as are the next three
        self.lengths = self._long([len(prompt) for prompt in prompts]).repeat_interleave(group_size)
        self.drawn = torch.zeros_like(self.seeds)  # number of tokens so far
        self.ended = torch.zeros_like(self.seeds, dtype=torch.bool)
        # One column more than the limit: a row that has ended draws on, into the one place behind its end.
        self.tokens = torch.zeros(len(seeds), limit + 1, dtype=torch.long, device=model.device)
        self.logprobs = torch.zeros(len(seeds), limit + 1, device=model.device)
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.waiting = [i * group_size + member for i in longest_first for member in range(group_size)]
        self.rows, self.rows_ended = self._long([]), 0  # (rows,) numbers of completions
        self.columns = self.capacity = 0  # of the cache: filled (`column`, on the host), and allocated
        self.fixed_shapes = model.device.type != "cpu"
        self.graph: Any = None  # a recorded step, torch.cuda.CUDAGraph

    def _long(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.model.device)

    def steps(self) -> None:
        """The steps from one look of the host to the next: all of one shape, on the device alone."""
        count, window = (LOOK, self.capacity) if self.fixed_shapes else (1, self.columns + 1)
        for layer in self.cache.layers:
            layer.max_cache_len = window  # so many columns are attended to
        mask = self.mask[..., :window]
        for _ in range(min(count, self.capacity - self.columns)):
            if self.graph:
                self.graph.replay()
            else:
                self.step(mask)  # the first one runs as it is, and sets up what libraries need
                if self.fixed_shapes and self.columns + 1 < self.capacity:
                    self.graph = self.record(mask)
            self.columns += 1
        self.rows_ended = int(self.ended[self.rows].sum())  # waits for the device

    def step(self, mask: Tensor) -> None:
        """Each row's newest token is fed, the next one drawn. A row that has ended feeds its last again."""
        rows, newest = self.rows, self.drawn[self.rows] - 1  # (rows,)
        ids, positions = self.tokens[rows, newest], self.lengths[rows] + newest
        mask.index_fill_(-1, self.column, True)
        self._draw(rows, self._logits(ids[:, None], positions[:, None], mask, self.cache))
        self.column += 1  # in place: all layers hold this very tensor

    def record(self, mask: Tensor) -> torch.cuda.CUDAGraph | None:
        """A step's kernels, not run. None if it waits for the device, as where experts are chosen."""
        device = self.model.device
        if device.type != "cuda" or getattr(self.model, "steps_wait", False):
            return None
        graph = torch.cuda.CUDAGraph()
        present, aside = torch.cuda.current_stream(device), _stream_aside(device)
        try:
            # `present` around it: a recording that fails leaves its own behind
            with torch.cuda.stream(present), torch.cuda.graph(graph, stream=aside):
                self.step(mask)
            return graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            tqdm.write(f"note: this model's steps cannot be recorded, so sampling is slower: {error}"[:200])
            self.model.steps_wait = True  # tried once: memory of a failed one is not freed
            return None

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """ids, positions (rows, T) -> logits (rows, vocab) after the last of them. Extends the cache."""
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "cache": cache}
        return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _draw(self, rows: Tensor, logits: Tensor) -> None:
        """The next token of each row, from logits (rows, vocab)."""
        place, ended = self.drawn[rows], self.ended[rows]  # (rows,) each
        token, logprob = self.choose(logits, uniform(self.seeds[rows], place))
        self.tokens[rows, place], self.logprobs[rows, place] = token, logprob
        self.drawn[rows] = place + (~ended).long()  # a row that had ended before this draw does not count it
        self.ended[rows] = ended | (token[:, None] == self.eos).any(1) | (place + 1 >= self.limit)

    def refill(self, bar: tqdm) -> bool:
        """If a quarter of the rows has ended, or the cache is full, repack it. False once all is done."""
        # `while`, since a row that moves in may end with its first token. At first there is no row: 0 >= 0.
        while 4 * self.rows_ended >= len(self.rows) or self.columns == self.capacity:
            bar.update(self.rows_ended)
            stay = (~self.ended[self.rows]).nonzero()[:, 0]
            parts = [(self.cache, self.columns, stay)] if len(stay) else []
            self.cache: Any = None  # if nobody stays, its memory is free for those who come
            self.graph = None
            self.rows = self.rows[stay]
            if self.waiting:
                parts += self._admit()
            if len(self.rows) == 0:
                return False
            self._repack(parts)
        return True

    def _admit(self) -> list[tuple[Cache, int, Tensor]]:
        """Waiting completions become rows, as many as the budget has room for: what they add to the cache.

        Each part is the cache of some prompts, its columns, and indices (r,): each completion's place among
        these prompts. The prompt of a group that does not fit at once is read again for the rest of it.
        """
        group = self.group_size
        longest = max([len(self.prompts[self.waiting[0] // group]), *self.lengths[self.rows].tolist()])
        room = self.budget // (longest + self.limit) - len(self.rows)  # >= 0: longest prompts came first
        taken, self.waiting = self.waiting[:room], self.waiting[room:]
        count = Counter(i // group for i in taken)  # completions of each prompt, in that order
        unread, parts, logits = list(count), [], []
        while unread:
            n = max(1, min(PREFILL_TOKENS, self.budget) // len(self.prompts[unread[0]]))
            numbers, unread = unread[:n], unread[n:]
            cache, last = self._prefill([self.prompts[i] for i in numbers])
            index = self._long([place for place, i in enumerate(numbers) for _ in range(count[i])])
            parts.append((cache, cache.get_seq_length(), index))
            logits.append(last[index])
        if taken:
            self._draw(self._long(taken), torch.cat(logits))
            self.rows = torch.cat([self.rows, self._long(taken)])
        return parts

    def _prefill(self, prompts: list[Sequence[int]]) -> tuple[Cache, Tensor]:
        """Read prompts in one pass: their cache, and the logits (n, vocab) of the token behind each."""
        ids, real = (x.to(self.model.device) for x in pad_batch(prompts, 0, side="left"))  # (n, width) each
        mask = None if real.all() else attention_mask(self.model, real, real.shape[1])
        cache = DynamicCache()
        return cache, self._logits(ids, (real.cumsum(1) - 1).clamp(min=0), mask, cache)

    def _repack(self, parts: list[tuple[Cache, int, Tensor]]) -> None:
        """A cache of the rows' own size, from the rows that stayed and those that came."""
        used = self.lengths[self.rows] + self.drawn[self.rows] - 1  # (rows,) the newest is not cached yet
        self.column, most = used.max(), int(self.lengths[self.rows].max()) + self.limit
        self.columns = int(self.column)  # the same, on the host
        self.capacity = min(most, (self.columns + max(64, self.columns // 4) + 7) // 8 * 8)  # a quarter more
        self.cache = pack_rows(parts, self.column, self.capacity)
        place = torch.arange(self.capacity, device=used.device)
        seen = (place >= (self.column - used)[:, None]) & (place < self.column)
        self.mask = attention_mask(self.model, seen, 1)
        self.rows_ended = int(self.ended[self.rows].sum())


@lru_cache
def _stream_aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one to record in on each: libraries keep memory for every stream


def uniform(seeds: Tensor, steps: Tensor | int) -> Tensor:
    """Random numbers in [0, 1), (rows,) float64: number `step` of splitmix64 started at `seed` (rows,) int64.

    A hash, so no table of numbers is needed. int64 products wrap around as unsigned ones do; a logical right
    shift is the arithmetic one with the copies of the sign masked off. The upper 53 bits are kept, all of
    float64: with float32's 23, u would be 0 once in 8 million draws, and token 0 drawn however unlikely.
    """
    # The factors are 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB, signed.
    z = seeds + torch.as_tensor(steps + 1) * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & (2**33 - 1))
    return _float64((z >> 11) & (2**53 - 1)) * 2.0**-53


def _float64(x: Tensor) -> Tensor:
    """On the same device, but for mps, which has no float64: there on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def draw(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """logits (rows, vocab), u (rows,) float64 in [0, 1) -> tokens int64, their logprobs fp32, (rows,) each.

    Inverse CDF: the first token whose cumulative probability exceeds u; one of probability 0 never is. With
    top_p the same over tokens in order of probability, u scaled to the mass of the fewest that reach it.
    Sums are float64: in float32 they err by more than rare tokens weigh, and in blocks of a GPU not monotone.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        return token[:, 0], logits.log_softmax(-1).gather(1, token)[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)  # (rows, vocab)
    last = logits.shape[1] - 1  # the clamps act on NaN (the caller's to report) and where top_p rounds to 1
    probabilities = _float64(logprobs).exp()
    u = _float64(u).to(probabilities.device)  # wherever the caller drew it
    if top_p == 1:
        cdf = probabilities.cumsum_(-1)  # (rows, vocab)
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_(max=last)  # (rows, 1)
    else:
        ordered, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        cdf = ordered.cumsum_(-1)
        final = torch.searchsorted(cdf, torch.full_like(cdf[:, :1], top_p)).clamp_(max=last)  # last one kept
        rank = torch.searchsorted(cdf, u[:, None] * cdf.gather(1, final), right=True).clamp_(max=last)
        token = order.gather(1, rank)
    token = token.to(logits.device)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def draw_seeds(generator: torch.Generator | None, count: int) -> list[int]:
    return torch.randint(2**63 - 1, (count,), generator=generator).tolist()
