"""AutoDAN: a genetic search for a prompt that reads like language (Liu et al. 2023; paper, "Evaluation").

GCG's suffixes look like noise. AutoDAN varies whole sentences around a request instead, and lets those multiply
that make the target likely. It needs the target's loss, not its gradient: access "score". The best tenth of the
prompts stay as they are. The others are replaced, by two steps in turn:

    sentences   parents are drawn by softmax(-loss); pairs cross: each child takes some sentences of both
    words       a word's score is the mean of -loss over the prompts that hold it, averaged with its earlier one
                (momentum); in every prompt a few words give way to words of higher score

After both, a few prompts are rewritten as a whole (mutation). `--crossover` is the share of pairs that cross, and
of words that are up for a change; `--mutation` that of rewritten prompts. What differs from the original:

- No thesaurus: a word gives way to a better one of the population, not to a synonym.
- The first prompts are written by the attacker; there they are people's jailbreaks, which we do not copy.
- The steps take turns; in the original code, four on words follow each one on sentences.
- Parents may swap at every sentence; there at five points at most.
- A prompt that is there already is rewritten, too (`to_rewrite`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from lib.attacks.core import Attacker, Attempt, Budget, Cost, Individual, Step, a_try, too_long
from lib.attacks.suffix import check_target
from lib.attacks.victim import Victim
from lib.batches import masked_batch
from lib.policy import token_logprobs
from lib.sampler import draw_seeds

ELITE_SHARE, SWAPS = 0.1, 5  # of the population; of words in a paragraph. Both its own paper's


def autodan(
    victim: Victim,
    behaviours: list[dict],
    budget: Budget,
    generators: list[torch.Generator],
    on_step: Step,
    attacker: Attacker,
) -> list[Attempt]:
    attempts = []
    for behaviour, generator in zip(behaviours, generators, strict=True):
        target, goal, cost = check_target(behaviour), behaviour["prompt"], Cost()
        rng = random.Random(draw_seeds(generator, 1)[0])
        people = attacker.individuals(goal, budget.population, draw_seeds(generator, budget.population))
        cost.written(victim, [" ".join((*p.before, *p.after)) for p in people])  # an empty scene is a failure
        losses = target_losses(victim, [p.text() for p in people], target, budget, cost)
        best = min(range(len(people)), key=losses.__getitem__)
        if losses[best] == math.inf:
            attempts.append(too_long(behaviour, people[best].text(), cost))
            continue
        trace, scores = [a_try(0, people[best].text(), loss=losses[best])], dict[str, float]()
        for generation in range(1, budget.generations + 1):
            order = sorted(range(len(people)), key=losses.__getitem__)
            elite = [people[i] for i in order[: max(1, round(ELITE_SHARE * len(people)))]]
            if generation % 2:
                children = sentence_step(people, losses, len(people) - len(elite), budget.crossover, rng)
            else:
                scores = word_scores(people, losses, scores)
                rest = [people[i] for i in order[len(elite) :]]
                children = [swap_words(person, scores, budget.crossover, rng) for person in rest]
            chosen = to_rewrite(elite, children, budget.mutation, rng)
            people = elite + mutated(children, chosen, goal, victim, attacker, generator, cost)
            losses = target_losses(victim, [p.text() for p in people], target, budget, cost)
            best = min(range(len(people)), key=losses.__getitem__)
            trace.append({**trace[-1], "step": generation})
            if losses[best] < trace[-1]["loss"]:
                trace[-1] = a_try(generation, people[best].text(), loss=losses[best])
            on_step()
        attempts.append(Attempt(behaviour["id"], trace, cost.total()))
    return attempts


@torch.no_grad()
def target_losses(
    victim: Victim, texts: Sequence[str], target: str, budget: Budget, cost: Cost
) -> list[float]:
    """Mean negative log-likelihood of the target behind each text. Out of memory, half as many at a time. A text that is too
    long is as bad as the worst; inf if all are."""
    target_ids = victim.tokenizer.encode(target, add_special_tokens=False)
    encoded = [victim.encode(text) for text in texts]
    short = [victim.fits(ids, len(target_ids)) for ids in encoded]
    rows = [ids + target_ids for ids, fine in zip(encoded, short, strict=True) if fine]
    losses: list[float] = []
    size = max(1, budget.max_batch_tokens // max(map(len, rows), default=1))
    while len(losses) < len(rows):
        part = rows[len(losses) : len(losses) + size]
        masks = [[False] * (len(row) - len(target_ids)) + [True] * len(target_ids) for row in part]
        batch = masked_batch(part, masks, 0, victim.model.device)  # (n, T) each
        try:
            found = -token_logprobs(victim.model, *batch).sum(1) / len(target_ids)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, len(part) // 2)
            continue
        losses += found.tolist()
    cost.queries += len(rows)
    cost.forward_tokens += sum(map(len, rows))
    scored, worst = iter(losses), max(losses, default=math.inf)
    return [next(scored) if fine else worst for fine in short]


def sentence_step(
    people: list[Individual], losses: list[float], count: int, crossover: float, rng: random.Random
) -> list[Individual]:
    """`count` children of parents drawn by softmax(-loss). A pair crosses at that rate; else it stays as it is."""
    weights = [math.exp(min(losses) - loss) for loss in losses]
    parents = rng.choices(people, weights, k=count + count % 2)
    pairs = zip(parents[::2], parents[1::2], strict=True)
    crossing = (crossed(*pair, rng) if rng.random() < crossover else pair for pair in pairs)
    return [child for pair in crossing for child in pair][:count]


def crossed(mother: Individual, father: Individual, rng: random.Random) -> tuple[Individual, Individual]:
    """Multi-point crossover. At each place chance says which child has the mother's sentence; the other has the
    father's. What only the longer of the two has goes to one child as a whole."""

    def dealt(a: tuple, b: tuple) -> tuple[tuple, tuple]:
        shared = min(len(a), len(b))
        pieces = [*zip(zip(a[:shared]), zip(b[:shared]), strict=True), (a[shared:], b[shared:])]
        turned = [piece[::-1] if rng.random() < 0.5 else piece for piece in pieces]
        return sum((x for x, _ in turned), ()), sum((y for _, y in turned), ())

    before, after = dealt(mother.before, father.before), dealt(mother.after, father.after)
    requests = dealt((mother.request,), (father.request,))
    first, second = (Individual(b, r, a) for b, (r,), a in zip(before, requests, after, strict=True))
    return first, second


def word_scores(people: list[Individual], losses: list[float], old: dict[str, float]) -> dict[str, float]:
    """Word -> mean of -loss over the prompts that hold it, averaged with its old score."""
    held: dict[str, list[float]] = {}
    for person, loss in zip(people, losses, strict=True):
        for word in dict.fromkeys(
            " ".join((*person.before, *person.after)).split()
        ):  # in order: a set's differs from run to run
            held.setdefault(word, []).append(-loss)
    new = {word: sum(values) / len(values) for word, values in held.items()}
    return {**old, **{word: (old[word] + value) / 2 if word in old else value for word, value in new.items()}}


def swap_words(person: Individual, scores: dict[str, float], rate: float, rng: random.Random) -> Individual:
    """Words give way to better ones, drawn by how much better; at most SWAPS before the request, SWAPS behind."""
    lowest = min(scores.values(), default=0.0)

    def paragraph(sentences: tuple[str, ...]) -> tuple[str, ...]:
        written, room = [], SWAPS
        for sentence in sentences:
            words = sentence.split()
            for i, word in enumerate(words):
                if room and rng.random() < rate:
                    own = scores.get(word, lowest)
                    better = {other: score - own for other, score in scores.items() if score > own}
                    if better:
                        words[i] = rng.choices(list(better), list(better.values()))[0]
                        room -= 1
            written.append(" ".join(words))
        return tuple(written)

    return replace(person, before=paragraph(person.before), after=paragraph(person.after))


def to_rewrite(
    elite: list[Individual], children: list[Individual], rate: float, rng: random.Random
) -> list[int]:
    """Which children to rewrite: some at random, and all that are there already.

    The original has no such guard, and 256 prompts. Of 24, copies of the fittest would soon fill the places, and
    at its rate of 0.01 hardly anything new would come in.
    """
    kept, chosen = set(elite), []
    for i, child in enumerate(children):
        if rng.random() < rate or child in kept:
            chosen.append(i)
        kept.add(child)
    return chosen


def mutated(
    children: list[Individual],
    chosen: list[int],
    goal: str,
    victim: Victim,
    attacker: Attacker,
    generator,
    cost: Cost,
) -> list[Individual]:
    """The chosen ones are said otherwise: each sentence, and the request if the attacker is one that does so."""
    children, keeps = list(children), attacker.keeps_request
    parts = [
        (*children[i].before, *([] if keeps else [children[i].request]), *children[i].after) for i in chosen
    ]
    flat = [
        (part, not keeps and k == len(children[i].before))
        for i, own in zip(chosen, parts, strict=True)
        for k, part in enumerate(own)
    ]
    seeds = draw_seeds(generator, len(flat))
    texts = attacker.vary(
        [part for part, _ in flat], [goal] * len(flat), [is_request for _, is_request in flat], seeds
    )
    cost.written(victim, texts)
    said = iter(
        [text or part for text, (part, _) in zip(texts, flat, strict=True)]
    )  # what it could not say stays
    for i in chosen:
        child = children[i]
        before = tuple(next(said) for _ in child.before)
        request = child.request if keeps else next(said)
        children[i] = Individual(before, request, tuple(next(said) for _ in child.after))
    return children
