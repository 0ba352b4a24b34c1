"""A suffix behind a prompt, as text and as tokens: what an attack by gradients or by scores needs of a model.

chat template, prompt | suffix | end of turn, model's turn | target
`prefix`, read once   | varies | `rest`                    | `target`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache

from lib import UserError
from lib.attacks.core import Budget, Cost, attach
from lib.attacks.victim import Victim
from lib.cache import repeat_row
from lib.policy import table_rows

VOCABULARY_PART = 8192  # rows of the table that a gradient looks at at a time: all of them may be a gigabyte
CPU_TOKENS = (
    2048  # a batch of candidates that stays in a CPU's caches: a tenth less time on the sandbox's models
)


def target_of(behaviour: dict) -> str:
    """The behaviour's target; "" if there is none."""
    return (behaviour.get("target") or "").strip()


def check_target(behaviour: dict) -> str:
    """The behaviour's target; UserError if there is none."""
    if not (target := target_of(behaviour)):
        raise UserError(f"behaviour {behaviour['id']}: attacks need a target; add one, or set --behaviours 0")
    return target


def around_suffix(
    tokenizer, encode: Callable[[str], list[int]], behaviour: dict, budget: Budget
) -> tuple[list, list, list]:
    """Token ids before, of and behind the initial suffix. `encode`: of a whole prompt, through the chat template.

    Needs no model: chapter 4 calls it for all behaviours before it attacks the first. UserError if the suffix is
    not `gcg_suffix_tokens` known tokens.
    """
    plain = encode(behaviour["prompt"].strip())
    full = encode(attach(behaviour["prompt"], budget.initial_suffix()))
    before, after = shared_ends(plain, full)
    suffix = full[before : len(full) - after]
    whole = before + after == len(plain) and len(suffix) == budget.gcg_suffix_tokens
    if not whole or tokenizer.unk_token_id in suffix:
        raise UserError(
            f"--gcg-init: given {budget.gcg_init}; {budget.gcg_suffix_tokens} of it make {len(full) - len(plain)} tokens "
            f"behind the prompt of {behaviour['id']}; allowed a word that is one token, and a known one"
        )
    return full[:before], suffix, full[len(full) - after :]


def allowed_tokens(tokenizer, banned: Iterable[int] = ()) -> list[bool]:
    """Of each token whether it may stand in a suffix: printable ASCII, not special or added, as <think> may be."""
    banned = {*banned, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i not in banned and w.isascii() and w.isprintable() and w != " " for i, w in enumerate(words)]


def survivors(tokenizer, prompt: str, candidates: Tensor) -> tuple[list[int], list[str]]:
    """Rows of candidates (N, S) whose text, behind the prompt, comes back as the same ids; and texts of all N."""

    def encode(text: str) -> list[int]:
        try:
            return tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # what a tokenizer without an unknown token raises has no class of its own
            return []

    decoded = tokenizer.batch_decode(candidates.tolist(), clean_up_tokenization_spaces=False)
    texts = [text.strip() for text in decoded]
    alone = encode(prompt)
    sent = [attach(prompt, text) for text in texts]
    try:
        again = tokenizer(sent, add_special_tokens=False)["input_ids"]
    except Exception:
        again = [encode(text) for text in sent]
    return [i for i, ids in enumerate(candidates.tolist()) if again[i] == alone + ids], texts


class Slot:
    """One behaviour: the token ids around its suffix, and the key-value cache of all that stands before it.

    A forward pass is fed suffix, rest and target only; the cached prefix is shared. All candidates of a
    behaviour have equal length, so nothing is padded, and the result is that of a plain forward pass.
    """

    def __init__(
        self, victim: Victim, behaviour: dict, target: str, budget: Budget, cost: Cost | None = None
    ) -> None:
        self.victim, self.model, self.tokenizer, self.budget = victim, victim.model, victim.tokenizer, budget
        self.id, self.prompt, self.cost = behaviour["id"], behaviour["prompt"].strip(), cost or Cost()
        self.secret = check_target(behaviour)
        on_cpu = self.model.device.type == "cpu"
        self.batch_tokens = min(budget.max_batch_tokens, CPU_TOKENS) if on_cpu else budget.max_batch_tokens
        self.vocabulary = table_rows(self.model)
        target_ids = self.tokenizer.encode(target, add_special_tokens=False)
        if not target_ids:
            raise UserError(f"behaviour {self.id}: its target {target!r} has no tokens; write another")
        self.prefix, start, self.rest = around_suffix(self.tokenizer, victim.encode, behaviour, budget)
        self.start = torch.tensor(start)  # (S,) int64
        self.target = torch.tensor(target_ids, device=self.model.device)
        self.tail = torch.tensor(
            self.rest + target_ids[:-1], device=self.model.device
        )  # the last is only predicted
        self.cache = self._read_prefix()

    @torch.no_grad()
    def _read_prefix(self) -> Cache:
        """Keys and values of the prefix, of one row."""
        ids = torch.tensor([self.prefix], device=self.model.device)
        cache = DynamicCache()
        self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        self._count(1, len(self.prefix))
        return cache

    def _logits(self, ids: Tensor) -> Tensor:
        """ids (rows, length), what follows the prefix -> logits that predict the target, (rows, target, vocab) fp32."""
        cache = repeat_row(self.cache, len(ids))
        return self.model(input_ids=ids, cache=cache, logits_to_keep=len(self.target)).logits.float()

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
                tqdm.write(
                    f"out of memory with {len(part)} candidates at a time: from now on {len(part) // 2}"
                )
                continue
            done += len(part)
        self._count(len(suffixes), length)
        return torch.cat(losses)

    def _losses(self, suffixes: Tensor) -> Tensor:
        ids = torch.cat([suffixes, self.tail.expand(len(suffixes), -1)], dim=1)  # (n, length)
        logits = self._logits(ids)  # (n, target, vocab)
        target = self.target.expand(len(suffixes), -1)
        return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1).cpu()

    def gradient(self, suffix: Tensor) -> Tensor:
        """suffix (S,) int64 -> d loss / d one-hot, (S, vocab) fp32, on the CPU (negative: an improvement)."""
        ids = torch.cat([suffix.to(self.model.device), self.tail])[None]  # (1, length)
        module, seen = self.model.get_input_embeddings(), list[Tensor]()

        def keep(_: torch.nn.Module, inputs: tuple, embeds: Tensor) -> Tensor:
            seen.append(embeds.detach().requires_grad_())
            return seen[0].clone()  # CTRL scales in place

        # Not by inputs_embeds: some models scale what they look up themselves, in the module (Gemma 3) or behind it (CTRL).
        hook = module.register_forward_hook(keep)
        try:
            loss = F.cross_entropy(self._logits(ids)[0], self.target)
        finally:
            hook.remove()
        self._count(1, ids.shape[1])
        self.cost.backward_tokens += ids.shape[1]
        slope = torch.autograd.grad(loss, seen[0])[0][0, : len(suffix)]  # (S, width)
        with torch.no_grad():  # the embedding is linear in the one-hot vector
            tokens = torch.arange(self.vocabulary, device=ids.device).split(VOCABULARY_PART)
            return torch.cat([slope @ module(part).T for part in tokens], dim=1).float().cpu()

    def allowed(self) -> Tensor:
        """(vocab,) bool: `allowed_tokens`, without the target's if so wished."""
        size, banned = self.vocabulary, []  # the table may exceed the tokenizer's, for padding
        if self.budget.gcg_ban_target:
            banned = self.tokenizer.encode(self.secret, add_special_tokens=False)  # not a reasoning before it
        fine = allowed_tokens(self.tokenizer, banned)[:size]
        return torch.tensor(fine + [False] * (size - len(fine)))

    def surviving(self, candidates: Tensor) -> tuple[Tensor, list[str]]:
        """Of (N, S) candidates those whose text, behind the prompt, has the same ids: (M, S), and texts."""
        kept, texts = survivors(self.tokenizer, self.prompt, candidates)
        self.cost.did_not_survive += len(candidates) - len(kept)
        return candidates[kept], [texts[i] for i in kept]

    def is_exact(self, text: str, suffix: Tensor) -> bool:
        """Whether the text, through the chat template, gives the very ids that were scored."""
        return self.victim.encode(attach(self.prompt, text)) == [*self.prefix, *suffix.tolist(), *self.rest]


def shared_ends(a: list[int], b: list[int]) -> tuple[int, int]:
    """How many items two lists share at the beginning, and at the end of what is left."""
    room = min(len(a), len(b))
    before = next((i for i in range(room) if a[i] != b[i]), room)
    room -= before
    return before, next((i for i in range(room) if a[-1 - i] != b[-1 - i]), room)
