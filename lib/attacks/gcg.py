"""GCG's variants, and the random control that they have to beat. They are given chapter 4's `search`.

Where the target stands is what the attack knows about a reasoner:

    gcg            right after "<think>\\n", where the reasoning should begin: the paper's choice
    gcg_close      behind an empty reasoning: the model is to stop thinking at once, and answer
    gcg_forged     behind a benign reasoning that the attacker makes up
    gcg_twin       behind the model's own compliant reasoning, which it wrote for a harmless request
    gcg_universal  as gcg, but one suffix for several requests, tried on all (GCG's own paper begins with one
                   request, and adds the next when the suffix works on those so far; here all are in at once)
    random_suffix  as gcg, without a search: as many tokens, drawn from those that GCG may use

For a model without reasoning the first four are the same, so of these it meets `gcg` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lib import UserError
from lib.attacks.core import Attempt, Budget, Victim, a_try, ask_all, attach, encode_each, not_tried
from lib.cache import repeat_row
from lib.chat import THINK_CLOSE, encode_text
from lib.policy import table_rows

VOCABULARY_PART = 8192  # rows of the table that a gradient looks at at a time: all may be a gigabyte
CPU_TOKENS = 2048  # a batch of candidates that stays in a CPU's caches: a tenth less time in the sandbox
RANDOM_TRIES = 256  # tokens drawn for a position of a random suffix, until one survives the round trip
TWIN_SAMPLES = 8  # reasonings that are sampled for `gcg_twin`, to find a compliant one


def gcg(variant: str, victim, attempts, budget, search) -> None:
    """A suffix for each behaviour; of gcg_universal one, searched for the first few and tried on all: does it
    carry over? What is found goes behind the prompts. Where no slot fits, nothing is asked."""
    groups = [attempts] if variant == "gcg_universal" else [[attempt] for attempt in attempts]
    for group in groups:
        first = group[: budget.universal_behaviours]
        slots = [Slot(victim, attempt, aim(variant, victim, attempt, budget), budget) for attempt in first]
        if variant == "random_suffix":
            draw_suffix(slots[0], group[0].generator)
            budget = replace(budget, gcg_steps=0)  # then the search reports the loss at its start
        slots = [slot for slot in slots if slot.fits]
        found = search(slots, budget, group[0].generator) if slots else []
        for attempt in group:
            if not found:
                attempt.trace.append(not_tried(attach(attempt.prompt, budget.initial_suffix())))
            for best in found:
                sent = attach(attempt.prompt, best["suffix"])
                attempt.trace.append(a_try(best["step"], sent, loss=best["loss"]))


def aim(variant: str, victim: Victim, attempt: Attempt, budget: Budget) -> str:
    """The target, with the reasoning that the variant puts before it."""
    before = {"gcg_close": THINK_CLOSE, "gcg_forged": budget.forged + THINK_CLOSE}
    if variant == "gcg_twin":
        before["gcg_twin"] = (own_reasoning(victim, attempt) or budget.forged) + THINK_CLOSE
    return before.get(variant, "") + attempt.behaviour["target"]


def own_reasoning(victim: Victim, attempt: Attempt) -> str:
    """The first compliant one of a few reasonings about the behaviour's "twin"; "" if there is none."""
    behaviour = {**attempt.behaviour, "prompt": attempt.behaviour["twin"], "context": ""}
    twin = replace(attempt, behaviour=behaviour, trace=[])  # at the cost of the attempt
    ask_all(victim, [(twin, a_try(k, twin.prompt)) for k in range(TWIN_SAMPLES)])
    answers = [asked["completion"] for asked in twin.trace]
    own = (a["reasoning"] for a in answers if a["well_formed"] and a["refusal"] == "none" and a["reasoning"])
    return next(own, "")


def draw_suffix(slot: Slot, generator: torch.Generator) -> None:
    """Let the slot start from a random suffix that survives the round trip. UserError if there is none."""
    tokens, suffixes, texts = slot.allowed().nonzero()[:, 0], torch.empty(1, 0, dtype=torch.long), [""]
    tries = RANDOM_TRIES if len(tokens) > 1 else 0  # of one token nothing can be searched
    for _ in range(len(slot.start)):
        drawn = tokens[torch.randint(max(1, len(tokens)), (tries, 1), generator=generator)]
        suffixes, texts = surviving([slot], torch.cat([suffixes[:1].expand(tries, -1), drawn], dim=1))
        if not texts:
            none = f"of {len(tokens)} tokens that may stand in a suffix none survives decoding and encoding"
            raise UserError(f"--attacks: {slot.victim.name}: {none}: leave random_suffix and gcg out")
    slot.start, slot.start_text = suffixes[0], texts[0]


# ---- a suffix behind a prompt, as text and as tokens -------------------------------------------------------
# A model is attacked through text, so a candidate counts as the tokens of its *re-encoded text*. One that
# comes back as other tokens is dropped and counted; else an attack may report a suffix that nobody can type.


class Slot:
    """The place of a suffix in one request: the token ids around it, the key-value cache of those before.

        chat template, prompt | suffix | end of turn, model's turn | target
        `prefix`, read once   | varies | `rest`                    | `target`

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
        plain, count = victim.encode(self.prompt.strip()), budget.gcg_suffix_tokens
        full = victim.encode(attach(self.prompt, self.start_text))
        begin = next((i for i, (a, b) in enumerate(zip(plain, full, strict=False)) if a != b), len(plain))
        self.prefix, start, self.rest = full[:begin], full[begin : begin + count], full[begin + count :]
        if self.prefix + self.rest != plain or len(start) != count or self.tokenizer.unk_token_id in start:
            made = f"{count} of it make {len(full) - len(plain)} tokens behind {self.prompt[:40]!r}"
            allowed = f"({victim.name}); allowed a word that is one known token"
            raise UserError(f"gcg_init: given {budget.gcg_init}; {made} {allowed}")
        device, target_ids = self.model.device, encode_text(self.tokenizer, target)
        self.start = torch.tensor(start)  # (S,) int64
        self.target = torch.tensor(target_ids, device=device)  # (T,)
        self.tail = torch.tensor(self.rest + target_ids[:-1], device=device)  # the last is only predicted
        self.fits = victim.fits(full, len(target_ids))
        most = min(budget.max_batch_tokens, CPU_TOKENS) if device.type == "cpu" else budget.max_batch_tokens
        self.at_once = max(1, most // (len(self.prefix) + count + len(self.tail)))

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
