"""A suffix behind a prompt, as text and as tokens: what an attack by gradients or by scores needs of a model.

chat template, prompt | suffix | end of turn, model's turn | target
`prefix`, read once   | varies | `rest`                    | `target`
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lib.attacks.core import Budget, Cost, attach
from lib.settings import UserError
from lib.victim import Victim

CPU_TOKENS = 2048  # a batch of candidates that stays in a CPU's caches: a tenth less time on the sandbox's models


def target_of(behaviour: dict) -> str:
    """The behaviour's target; "" if there is none."""
    return (behaviour.get("target") or "").strip()


def check_target(behaviour: dict) -> str:
    """The behaviour's target; UserError if there is none."""
    if not (target := target_of(behaviour)):
        raise UserError(f"behaviour {behaviour['id']}: attacks need a target; add one, or set --behaviours 0")
    return target


class Slot:
    """One behaviour: the token ids around its suffix, and the key-value cache of all that stands before it.

    A forward pass is fed suffix, rest and target only; the cached prefix is shared. All candidates of a
    behaviour have equal length, so nothing is padded, and the result is that of a plain forward pass.
    """

    def __init__(self, victim: Victim, behaviour: dict, target: str, budget: Budget, cost: Cost | None = None) -> None:
        self.victim, self.model, self.tokenizer, self.budget = victim, victim.model, victim.tokenizer, budget
        self.id, self.prompt, self.cost = behaviour["id"], behaviour["prompt"].strip(), cost or Cost()
        self.secret = check_target(behaviour)
        on_cpu = self.model.device.type == "cpu"
        self.batch_tokens = min(budget.max_batch_tokens, CPU_TOKENS) if on_cpu else budget.max_batch_tokens
        table = self.model.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        self.table = table  # (vocab, width)
        target_ids = self.tokenizer.encode(target, add_special_tokens=False)
        if not target_ids:
            raise UserError(f"behaviour {self.id}: its target {target!r} has no tokens; write another")
        plain = self._encode("")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        length, answer = len(plain) + budget.gcg_suffix_tokens, max(len(target_ids), victim.max_new_tokens)
        if length + answer > context:  # now, and not when the suffix is sent, hours later
            raise UserError(
                f"--gcg-suffix-tokens: given {budget.gcg_suffix_tokens}; behaviour {self.id} and its suffix have {length} "
                f"tokens, an answer up to {answer}, and the context of {victim.name} holds {context}: lower it, or "
                "--max-new-tokens and --answer-tokens"
            )
        full = self._encode(budget.initial_suffix())
        before, after = shared_ends(plain, full)
        if before + after != len(plain) or len(full) - len(plain) != budget.gcg_suffix_tokens:
            raise UserError(
                f"--gcg-init: given {budget.gcg_init}; {budget.gcg_suffix_tokens} of it make "
                f"{len(full) - len(plain)} tokens behind a prompt; allowed a word that is one token"
            )
        self.prefix, self.rest = full[:before], full[len(full) - after :]
        self.start = torch.tensor(full[before : len(full) - after])  # (S,) int64
        self.target = torch.tensor(target_ids, device=self.model.device)
        self.tail = torch.tensor(self.rest + target_ids[:-1], device=self.model.device)  # the last is only predicted
        self.layers = self._read_prefix()

    def _encode(self, suffix: str) -> list[int]:
        return self.victim.encode(attach(self.prompt, suffix))

    @torch.no_grad()
    def _read_prefix(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, kv_heads, prefix, head_dim)."""
        ids = torch.tensor([self.prefix], device=self.model.device)
        cache = DynamicCache()
        self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        self._count(1, len(self.prefix))
        layers: list[Any] = cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def _logits(self, rows: int, **inputs: Tensor) -> Tensor:
        """Logits that predict the target, (rows, target, vocab) fp32; no others are computed.

        Each pass gets a cache of its own, made of views: nothing is copied until the model appends to it.
        """
        layers: list = []
        for keys, values in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
            layers.append(layer)
        cache = Cache(layers=layers)
        return self.model(cache=cache, logits_to_keep=len(self.target), **inputs).logits.float()

    def _count(self, rows: int, tokens: int) -> None:
        self.cost.queries += rows
        self.cost.forward_tokens += rows * tokens

    @torch.no_grad()
    def losses(self, suffixes: Tensor) -> Tensor:
        """suffixes (N, S) int64 -> mean negative log-likelihood of the target, (N,) fp32, on the CPU.

        Out of memory, it tries half as many at a time, says so, and stays with that.
        """
        length = suffixes.shape[1] + len(self.tail)
        losses, done = [torch.empty(0)], 0
        while done < len(suffixes):
            rows = max(1, self.batch_tokens // (len(self.prefix) + length))
            part = suffixes[done : done + rows].to(self.model.device)
            try:
                losses.append(self._losses(part))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.batch_tokens = len(part) // 2 * (len(self.prefix) + length)
                tqdm.write(f"out of memory with {len(part)} candidates at a time: from now on {len(part) // 2}")
                continue
            done += len(part)
        self._count(len(suffixes), length)
        return torch.cat(losses)

    def _losses(self, suffixes: Tensor) -> Tensor:
        ids = torch.cat([suffixes, self.tail.expand(len(suffixes), -1)], dim=1)  # (n, length)
        logits = self._logits(len(suffixes), input_ids=ids)  # (n, target, vocab)
        target = self.target.expand(len(suffixes), -1)
        return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1).cpu()

    def gradient(self, suffix: Tensor) -> Tensor:
        """suffix (S,) int64 -> d loss / d one-hot, (S, vocab) fp32, on the CPU (negative: an improvement)."""
        one_hot = F.one_hot(suffix.to(self.table.device), self.table.shape[0]).to(self.table.dtype)
        one_hot.requires_grad_()
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", 1.0)  # Gemma 3 has one
        embeds = torch.cat([one_hot @ self.table, self.table[self.tail]])[None] * scale  # (1, length, width)
        loss = F.cross_entropy(self._logits(1, inputs_embeds=embeds)[0], self.target)
        self._count(1, embeds.shape[1])
        self.cost.backward_tokens += embeds.shape[1]
        return torch.autograd.grad(loss, one_hot)[0].float().cpu()

    def allowed(self) -> Tensor:
        """(vocab,) bool: tokens of printable ASCII, none special or added, as <think> may be."""
        size = self.table.shape[0]  # may exceed the tokenizer's, for padding
        banned = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        if self.budget.gcg_ban_target:
            banned |= set(self.tokenizer.encode(self.secret, add_special_tokens=False))  # not a reasoning before it
        words = self.tokenizer.batch_decode([[i] for i in range(min(size, len(self.tokenizer)))])
        fine = [i not in banned and w.isascii() and w.isprintable() and w != " " for i, w in enumerate(words)]
        return torch.tensor(fine + [False] * (size - len(fine)))

    def surviving(self, candidates: Tensor) -> tuple[Tensor, list[str]]:
        """Of (N, S) candidates those whose text, behind the prompt, has the same ids: (M, S), and texts."""
        decoded = self.tokenizer.batch_decode(candidates.tolist(), clean_up_tokenization_spaces=False)
        texts = [text.strip() for text in decoded]
        alone = self.tokenizer.encode(self.prompt, add_special_tokens=False)
        again = self.tokenizer([attach(self.prompt, text) for text in texts], add_special_tokens=False)["input_ids"]
        kept = [i for i, ids in enumerate(candidates.tolist()) if again[i] == alone + ids]
        self.cost.did_not_survive += len(candidates) - len(kept)
        return candidates[kept], [texts[i] for i in kept]

    def is_exact(self, text: str, suffix: Tensor) -> bool:
        """Whether the text, through the chat template, gives the very ids that were scored."""
        return self._encode(text) == [*self.prefix, *suffix.tolist(), *self.rest]


def shared_ends(a: list[int], b: list[int]) -> tuple[int, int]:
    """How many items two lists share at the beginning, and at the end of what is left."""
    room = min(len(a), len(b))
    before = next((i for i in range(room) if a[i] != b[i]), room)
    room -= before
    return before, next((i for i in range(room) if a[-1 - i] != b[-1 - i]), room)
