"""GCG, a white-box attack by gradients, and the random control that it has to beat (paper, "Evaluation").

GCG (greedy coordinate gradient, Zou et al. 2023) looks for a *suffix*: a few tokens behind the prompt that make a
*target* ("Sure, here is how to ...") the likely beginning of what the model writes.

    chat template, prompt | suffix | end of turn, model's turn | target
    `prefix`, read once   | varies | `rest`                    | loss: mean negative log-likelihood

One step of `search`:

1. `gradient`: with the suffix as one-hot rows, the loss's gradient says to first order how much each token of
   the vocabulary would lower the loss at each position, (suffix, vocab).
2. `propose`: `width` different swaps of one token each, at random among the `top_k` best of each position.
3. `losses`: the true loss of each candidate. Move to the best one, even if it is worse than where we are: the
   search must get out of local minima. (With a buffer, move to the best of the best so far instead.)

A model is attacked through text, so a candidate counts as the tokens of its *re-encoded text*. One that comes
back as other tokens is dropped and counted; else an attack may report a suffix that nobody can type.

Where the target stands is what the attack knows about a reasoner, `TARGETS`:

    gcg          right after "<think>\\n", where the reasoning should begin: the paper's choice. Non-adaptive.
    gcg_close    behind an empty reasoning: the model is to stop thinking at once, and answer
    gcg_forged   behind a benign reasoning that the attacker makes up
    gcg_twin     behind the model's own compliant reasoning, which it wrote for a harmless request

For a model without reasoning all four are the same, so it is attacked by `gcg` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib import UserError
from lib.attacks.core import Attempt, Budget, Cost, Step, a_try, attach, too_long
from lib.attacks.suffix import Slot, allowed_tokens, around_suffix, check_target, survivors
from lib.attacks.victim import Victim
from lib.chat import THINK_CLOSE
from lib.sampler import draw_seeds

RANDOM_TRIES = 256  # tokens drawn for a position of a random suffix, until one survives the round trip
TWIN_SAMPLES = 8  # reasonings that are sampled for `gcg_twin`, to find a compliant one

# ---- targets -----------------------------------------------------------------------------------------------


def plain_target(
    victim: Victim, behaviour: dict, budget: Budget, generator: torch.Generator, cost: Cost
) -> str:
    return check_target(behaviour)


def close_target(
    victim: Victim, behaviour: dict, budget: Budget, generator: torch.Generator, cost: Cost
) -> str:
    return THINK_CLOSE + check_target(behaviour)


def forged_target(
    victim: Victim, behaviour: dict, budget: Budget, generator: torch.Generator, cost: Cost
) -> str:
    return budget.forged + THINK_CLOSE + check_target(behaviour)


def twin_target(
    victim: Victim, behaviour: dict, budget: Budget, generator: torch.Generator, cost: Cost
) -> str:
    """The first compliant one of a few reasonings about the behaviour's "twin"; the forged one if there is none."""
    seeds = draw_seeds(generator, TWIN_SAMPLES)
    twin = {**behaviour, "prompt": behaviour["twin"], "context": ""}
    answers = victim.ask(
        [twin] * TWIN_SAMPLES, [behaviour["twin"]] * TWIN_SAMPLES, [""] * TWIN_SAMPLES, seeds
    )
    for answer in answers:
        cost.asked(victim, behaviour["twin"], "", answer)
    own = [a["reasoning"] for a in answers if a["well_formed"] and a["refusal"] == "none" and a["reasoning"]]
    return (own[0] if own else budget.forged) + THINK_CLOSE + check_target(behaviour)


TARGETS: dict[str, Callable[[Victim, dict, Budget, torch.Generator, Cost], str]] = {
    "gcg": plain_target,
    "gcg_close": close_target,
    "gcg_forged": forged_target,
    "gcg_twin": twin_target,
}

# ---- the search --------------------------------------------------------------------------------------------


def search(slots: Sequence[Slot], budget: Budget, generator: torch.Generator, on_step: Step) -> list[dict]:
    """One suffix for all slots: [{"step", "loss": mean over slots, "suffix"}, ...], entry k the best up to step k.

    It goes by the loss alone and makes all its steps: what the suffixes achieve is for chapter 4 to ask.
    """
    suffix, allowed = slots[0].start, torch.stack([s.allowed() for s in slots]).all(0)
    best = mean_losses(slots, suffix[None]).item()
    trace: list[dict] = [{"step": 0, "loss": best, "suffix": budget.initial_suffix()}]
    buffer = [(best, suffix)]
    for step in range(1, budget.gcg_steps + 1):
        gradients = [slot.gradient(suffix) for slot in slots]
        mean = torch.stack([g / g.norm(dim=1, keepdim=True).clamp(min=1e-12) for g in gradients]).mean(0)
        candidates = propose(mean if len(slots) > 1 else gradients[0], suffix, allowed, budget, generator)
        kept, texts = surviving(slots, candidates)
        losses = mean_losses(slots, kept)
        trace.append({**trace[-1], "step": step})
        for i in losses.argsort().tolist():
            if not all(slot.is_exact(texts[i], kept[i]) for slot in slots):  # the first one almost always is
                slots[0].cost.did_not_survive += 1
                continue
            suffix, loss = kept[i], losses[i].item()
            if loss < best:
                best, trace[-1] = loss, {"step": step, "loss": loss, "suffix": texts[i]}
            if budget.gcg_buffer:
                buffer = sorted([*buffer, (loss, suffix)], key=lambda pair: pair[0])[: budget.gcg_buffer]
                suffix = buffer[0][1]
            break
        on_step()
    return trace


def propose(
    gradient: Tensor, suffix: Tensor, allowed: Tensor, budget: Budget, generator: torch.Generator
) -> Tensor:
    """gradient (S, vocab), suffix (S,), allowed (vocab,) -> N <= width different single swaps, (N, S)."""
    promise = (-gradient).masked_fill(~allowed, -torch.inf)
    promise[torch.arange(len(suffix)), suffix] = -torch.inf  # a swap must change something
    top_k = min(budget.gcg_top_k, int(allowed.sum()) - 1)
    tokens = promise.topk(top_k, dim=1).indices.flatten()  # (S * top_k,), position by position
    chosen = torch.randperm(len(tokens), generator=generator)[: budget.gcg_width]
    candidates = suffix.repeat(len(chosen), 1)
    candidates[torch.arange(len(chosen)), chosen // top_k] = tokens[chosen]
    return candidates


def surviving(slots: Sequence[Slot], candidates: Tensor) -> tuple[Tensor, list[str]]:
    """Candidates (N, S) that survive the round trip behind every slot's prompt, (M, S), with their texts."""
    texts: list[str] = []
    for slot in slots:
        candidates, texts = slot.surviving(candidates)
    return candidates, texts


def mean_losses(slots: Sequence[Slot], suffixes: Tensor) -> Tensor:
    """suffixes (N, S) -> (N,) fp32."""
    return torch.stack([slot.losses(suffixes) for slot in slots]).mean(0)


# ---- attacks -----------------------------------------------------------------------------------------------


def gcg(target: str) -> Callable[..., list[Attempt]]:
    """The attack with one of TARGETS. Access: white-box."""

    def attack(
        victim: Victim,
        behaviours: list[dict],
        budget: Budget,
        generators: list[torch.Generator],
        on_step: Step,
    ) -> list[Attempt]:
        attempts = []
        for behaviour, generator in zip(behaviours, generators, strict=True):
            cost = Cost()
            aim = TARGETS[target](victim, behaviour, budget, generator, cost)
            if not fits(victim, behaviour, aim, budget):
                attempts.append(too_long(behaviour, behaviour["prompt"], cost))
                continue
            trace = search([Slot(victim, behaviour, aim, budget, cost)], budget, generator, on_step)
            attempts.append(Attempt(behaviour["id"], _tries(behaviour, trace), cost.total()))
        return attempts

    return attack


def universal_gcg(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: list[torch.Generator], on_step: Step
) -> list[Attempt]:
    """One suffix, searched for the first few behaviours and tried on all: does it carry over? Access: white-box."""
    known = [b for b in behaviours[: budget.universal_behaviours] if fits(victim, b, check_target(b), budget)]
    if not known:
        return [too_long(b, b["prompt"], Cost()) for b in behaviours]
    slots = {b["id"]: Slot(victim, b, check_target(b), budget) for b in known}
    trace = search(list(slots.values()), budget, generators[0], on_step)
    costs = {name: slot.cost.total() for name, slot in slots.items()}
    free = dict.fromkeys(Cost().total(), 0.0)  # a behaviour that it was not searched for costs nothing more
    return [Attempt(b["id"], _tries(b, trace), costs.get(b["id"], free)) for b in behaviours]


def random_suffix(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: list[torch.Generator], on_step: Step
) -> list[Attempt]:
    """The control: as many tokens, drawn from those that GCG may use, surviving the round trip."""
    attempts = []
    for behaviour, generator in zip(behaviours, generators, strict=True):
        on_step()
        if not fits(victim, behaviour, check_target(behaviour), budget):
            attempts.append(too_long(behaviour, behaviour["prompt"], Cost()))
            continue
        slot = Slot(victim, behaviour, check_target(behaviour), budget)
        suffix, text, lost = draw_suffix(victim.tokenizer, behaviour, slot.allowed(), budget, generator)
        slot.cost.did_not_survive += lost
        loss = slot.losses(suffix[None]).item()
        attempts.append(
            Attempt(
                behaviour["id"], [a_try(0, attach(behaviour["prompt"], text), loss=loss)], slot.cost.total()
            )
        )
    return attempts


def check_suffixes(
    tokenizer, encode: Callable[[str], list[int]], behaviours: list[dict], budget: Budget, room: int
) -> None:
    """UserError where no suffix can be searched for: looks at texts alone, so needs no model. `room`: tokens of a
    prompt that can be sent."""
    lengths = [sum(map(len, around_suffix(tokenizer, encode, behaviour, budget))) for behaviour in behaviours]
    if min(lengths) > room:
        raise UserError(
            f"--gcg-suffix-tokens: given {budget.gcg_suffix_tokens}; with it the shortest request to attack has "
            f"{min(lengths)} tokens, {tokenizer.name_or_path} can be sent {room} beside its answer: lower it"
        )
    allowed = torch.tensor(allowed_tokens(tokenizer))
    draw_suffix(tokenizer, behaviours[0], allowed, budget, torch.Generator().manual_seed(0))


def draw_suffix(
    tokenizer, behaviour: dict, allowed: Tensor, budget: Budget, generator
) -> tuple[Tensor, str, int]:
    """A random suffix that survives the round trip: ids (S,), text, how many draws did not. UserError without one."""
    tokens, suffix, text, lost = allowed.nonzero()[:, 0], torch.empty(0, dtype=torch.long), "", 0
    tries = RANDOM_TRIES if len(tokens) > 1 else 0  # of one token nothing can be searched
    for _ in range(budget.gcg_suffix_tokens):
        drawn = tokens[torch.randint(max(1, len(tokens)), (tries, 1), generator=generator)]
        candidates = torch.cat([suffix.expand(len(drawn), -1), drawn], dim=1)
        kept, texts = survivors(tokenizer, behaviour["prompt"].strip(), candidates)
        lost += len(candidates) - len(kept)
        if not kept:
            raise UserError(
                f"--attacks: {behaviour['id']}: {len(tokens)} tokens of {tokenizer.name_or_path} are printable ASCII, "
                "and no suffix of them survives decoding and encoding: leave random_suffix and gcg out"
            )
        suffix, text = candidates[kept[0]], texts[kept[0]]
    return suffix, text, lost


def fits(victim: Victim, behaviour: dict, target: str, budget: Budget) -> bool:
    """Whether the victim can be sent the behaviour with a suffix, and be scored on the target behind it."""
    sent = victim.encode(attach(behaviour["prompt"], budget.initial_suffix()))
    return victim.fits(sent, len(victim.tokenizer.encode(target, add_special_tokens=False)))


def _tries(behaviour: dict, trace: list[dict]) -> list[dict]:
    return [a_try(t["step"], attach(behaviour["prompt"], t["suffix"]), loss=t["loss"]) for t in trace]
