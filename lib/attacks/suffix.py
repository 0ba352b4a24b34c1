"""A suffix behind a prompt, as text and as tokens: what GCG needs of a model and its tokenizer.

chat template, prompt | suffix | end of turn, model's turn | target
`prefix`, read once   | varies | `rest`                    | `target`

A model is attacked through text, so a candidate counts as the tokens of its *re-encoded text*. One that comes
back as other tokens is dropped and counted; else an attack may report a suffix that nobody can type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lib import UserError
from lib.attacks.core import Attempt, Budget, attach
from lib.attacks.victim import Victim, encode_each
from lib.cache import repeat_row
from lib.chat import encode_text
from lib.policy import table_rows

VOCABULARY_PART = 8192  # rows of the table that a gradient looks at at a time: all may be a gigabyte
CPU_TOKENS = 2048  # a batch of candidates that stays in a CPU's caches: a tenth less time in the sandbox


class Slot:
    """The place of a suffix in one request: the token ids around it, the key-value cache of those before.

    `fits`: it can be sent with a suffix, answered, and scored on the target. Only then may it be read, at
    most `at_once` suffixes in a batch.

    A forward pass is fed suffix, rest and target only; the cached prefix is shared. All candidates of a
    behaviour have equal length, so nothing is padded, and the result is that of a plain forward pass.
    """

    def __init__(self, victim: Victim, attempt: Attempt, target: str, budget: Budget) -> None:
        self.victim, self.model, self.tokenizer = victim, victim.model, victim.tokenizer
        self.prompt, self.cost, self.start_text = attempt.prompt, attempt.cost, budget.initial_suffix()
        # Draw the answer out of the model, do not hand it in; a reasoning before it may be handed in.
        self.banned = attempt.behaviour["target"] if budget.gcg_ban_target else ""
        device, target_ids = self.model.device, encode_text(self.tokenizer, target)
        self.prefix, start, self.rest = around_suffix(victim, attempt.behaviour, budget)
        self.start = torch.tensor(start)  # (S,) int64
        self.target = torch.tensor(target_ids, device=device)  # (T,)
        self.tail = torch.tensor(self.rest + target_ids[:-1], device=device)  # the last is only predicted
        self.fits = victim.fits([*self.prefix, *start, *self.rest], len(target_ids))
        most = min(budget.max_batch_tokens, CPU_TOKENS) if device.type == "cpu" else budget.max_batch_tokens
        self.at_once = max(1, most // (len(self.prefix) + len(start) + len(self.tail)))

    @cached_property
    @torch.no_grad()
    def cache(self) -> DynamicCache:
        """Of the prefix, which is read when it is first needed."""
        cache, ids = DynamicCache(), torch.tensor([self.prefix], device=self.model.device)
        self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        self._count(ids)
        return cache

    def logits(self, suffixes: Tensor) -> Tensor:
        """suffixes (N, S) int64 -> the logits that predict the target behind each, (N, T, vocab) fp32."""
        tail = self.tail.expand(len(suffixes), -1)
        ids = torch.cat([suffixes.to(tail.device), tail], dim=1)  # (N, S + rest + T - 1)
        cache = repeat_row(self.cache, len(ids))
        logits = self.model(input_ids=ids, cache=cache, logits_to_keep=len(self.target)).logits.float()
        self._count(ids)
        return logits

    def _count(self, ids: Tensor) -> None:
        self.cost["queries"] += len(ids)
        self.cost["forward_tokens"] += ids.numel()

    @contextlib.contextmanager
    def watched_embeddings(self) -> Iterator[list[Tensor]]:
        """Within it the embeddings that the model looks up, (1, length, width), are listed, as leaves.

        Not by inputs_embeds: some models scale what they look up, in it (Gemma 3) or behind it (CTRL).
        """
        seen: list[Tensor] = []

        def keep(_: torch.nn.Module, inputs: tuple, embeds: Tensor) -> Tensor:
            seen.append(embeds.detach().requires_grad_())
            self.cost["backward_tokens"] += embeds.shape[1]
            return seen[0].clone()  # CTRL scales in place

        _ = self.cache  # the prefix is read before anybody listens
        hook = self.model.get_input_embeddings().register_forward_hook(keep)
        try:
            yield seen
        finally:
            hook.remove()

    @torch.no_grad()
    def by_token(self, slope: Tensor) -> Tensor:
        """slope (S, width) -> its product with the embedding of every token, (S, vocab) fp32, on the CPU."""
        tokens = torch.arange(table_rows(self.model), device=slope.device).split(VOCABULARY_PART)
        products = [slope @ self.model.get_input_embeddings()(part).T for part in tokens]
        return torch.cat(products, dim=1).float().cpu()

    def allowed(self) -> Tensor:
        """(vocab,) bool: printable ASCII, neither special nor added, as <think> may be, nor banned."""
        banned = {*encode_text(self.tokenizer, self.banned)}
        banned |= {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        words = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        fine = [i not in banned and w.isascii() and w.isprintable() and w != " " for i, w in enumerate(words)]
        size = table_rows(self.model)  # the table may exceed the tokenizer's, for padding
        return torch.tensor((fine + [False] * size)[:size])


def surviving(slots: Sequence[Slot], candidates: Tensor) -> tuple[Tensor, list[str]]:
    """Candidates (N, S) whose text, behind every slot's prompt, comes back as the same ids: (M, S), texts."""
    for slot in slots:
        decoded = slot.tokenizer.batch_decode(candidates.tolist(), clean_up_tokenization_spaces=False)
        texts, prompt = [text.strip() for text in decoded], slot.prompt.strip()
        alone, *again = encode_each(slot.tokenizer, [prompt, *(attach(prompt, text) for text in texts)])
        kept = [i for i, ids in enumerate(candidates.tolist()) if again[i] == [*(alone or []), *ids]]
        slot.cost["did_not_survive"] += len(candidates) - len(kept)
        candidates, texts = candidates[kept], [texts[i] for i in kept]
    return candidates, texts


def first_exact(slots: Sequence[Slot], suffixes: Tensor, texts: Sequence[str], losses: Tensor) -> int | None:
    """The row of the least loss whose text, through all chat templates, gives the ids that were scored."""
    for i in losses.argsort().tolist():  # the first one almost always does
        sent = [slot.victim.encode(attach(slot.prompt, texts[i])) for slot in slots]
        if sent == [[*slot.prefix, *suffixes[i].tolist(), *slot.rest] for slot in slots]:
            return i
        slots[0].cost["did_not_survive"] += 1
    return None


def around_suffix(victim: Victim, behaviour: dict, budget: Budget) -> tuple[list[int], list[int], list[int]]:
    """Token ids before, of and behind the initial suffix. UserError unless that is as many known tokens."""
    plain, count = victim.encode(behaviour["prompt"].strip()), budget.gcg_suffix_tokens
    full = victim.encode(attach(behaviour["prompt"], budget.initial_suffix()))
    begin = next((i for i, (a, b) in enumerate(zip(plain, full, strict=False)) if a != b), len(plain))
    prefix, suffix, rest = full[:begin], full[begin : begin + count], full[begin + count :]
    if prefix + rest != plain or len(suffix) != count or victim.tokenizer.unk_token_id in suffix:
        raise UserError(
            f"gcg_init: given {budget.gcg_init}; {count} of it make {len(full) - len(plain)} tokens behind "
            f"the prompt of {behaviour['id']} ({victim.name}); allowed a word that is one known token"
        )
    return prefix, suffix, rest
