"""AutoDAN: a genetic search for a prompt that reads like language (Liu et al. 2023; paper, "Evaluation").

GCG's suffixes look like noise. AutoDAN varies whole sentences around a request instead, and lets those multiply that make
the target likely. It needs the target's loss, not its gradient: access "score". Its hierarchy:

    sentences   parents are drawn by fitness; children take each sentence from one of them, and some are rephrased
    words       every word has a score, the mean fitness of the prompts that hold it, averaged with its earlier score
                (momentum); children swap some words for ones of higher score

Here the words to swap in come from the population itself (the original: a thesaurus), and the first prompts are written by
the attacker (the original: people's jailbreaks, which we do not copy).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from lib.attacks.core import Attacker, Attempt, Budget, Cost, Individual, Step, a_try
from lib.attacks.suffix import check_target
from lib.policy import token_logprobs
from lib.training import masked_batch
from lib.victim import Victim, draw_seeds

ELITE_SHARE, CROSSOVER, REPHRASE, WORD_SWAP = 0.1, 0.5, 0.2, 0.05  # AutoDAN: elites 0.1, crossover 0.5, mutation 0.01


def autodan(
    victim: Victim, behaviours: list[dict], budget: Budget, generators: list[torch.Generator], on_step: Step, attacker: Attacker
) -> list[Attempt]:
    attempts = []
    for behaviour, generator in zip(behaviours, generators, strict=True):
        target, goal, cost = check_target(behaviour), behaviour["prompt"], Cost()
        rng = random.Random(draw_seeds(generator, 1)[0])
        people = attacker.individuals(goal, budget.population, draw_seeds(generator, budget.population))
        cost.written(victim, [" ".join((*p.before, *p.after)) for p in people])  # an empty scene is a failure
        losses = target_losses(victim, [p.text() for p in people], target, budget, cost)
        best = min(range(len(people)), key=losses.__getitem__)
        trace, scores = [a_try(0, people[best].text(), loss=losses[best])], dict[str, float]()
        for generation in range(1, budget.generations + 1):
            scores = word_scores(people, losses, scores)
            people = next_generation(people, losses, scores, rng)
            people = rephrase(people, goal, victim, attacker, generator, rng, cost)
            losses = target_losses(victim, [p.text() for p in people], target, budget, cost)
            best = min(range(len(people)), key=losses.__getitem__)
            trace.append({**trace[-1], "step": generation})
            if losses[best] < trace[-1]["loss"]:
                trace[-1] = a_try(generation, people[best].text(), loss=losses[best])
            on_step()
        attempts.append(Attempt(behaviour["id"], trace, cost.total()))
    return attempts


@torch.no_grad()
def target_losses(victim: Victim, texts: Sequence[str], target: str, budget: Budget, cost: Cost) -> list[float]:
    """Mean negative log-likelihood of the target behind each text. Out of memory, half as many at a time."""
    target_ids = victim.tokenizer.encode(target, add_special_tokens=False)
    rows = [victim.encode(text) + target_ids for text in texts]
    losses: list[float] = []
    size = max(1, budget.max_batch_tokens // max(map(len, rows)))
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
    return losses


def next_generation(
    people: list[Individual], losses: list[float], scores: dict[str, float], rng: random.Random
) -> list[Individual]:
    """The fittest stay as they are; the rest are children of parents drawn by softmax(-loss / spread)."""
    order = sorted(range(len(people)), key=losses.__getitem__)
    elite = [people[i] for i in order[: max(1, round(ELITE_SHARE * len(people)))]]
    spread = statistics.pstdev(losses) or 1.0  # losses that differ little must still make a difference
    weights = [math.exp((min(losses) - loss) / spread) for loss in losses]
    children: list[Individual] = []
    while len(children) < len(people) - len(elite):
        mother, father = rng.choices(people, weights, k=2)
        children.append(swap_words(crossed(mother, father, rng), scores, rng))
    return elite + children


def crossed(mother: Individual, father: Individual, rng: random.Random) -> Individual:
    """Each sentence from one of the two; sentences that only one of them has come along with half the chance."""

    def mixed(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
        longer = a if len(a) > len(b) else b
        shared = [rng.choice(pair) for pair in zip(a, b, strict=False)]
        return (*shared, *[s for s in longer[len(shared) :] if rng.random() < CROSSOVER])

    request = rng.choice((mother.request, father.request))
    return Individual(mixed(mother.before, father.before), request, mixed(mother.after, father.after))


def word_scores(people: list[Individual], losses: list[float], old: dict[str, float]) -> dict[str, float]:
    """Word -> mean of -loss over the prompts that hold it, averaged with its old score."""
    held: dict[str, list[float]] = {}
    for person, loss in zip(people, losses, strict=True):
        for word in dict.fromkeys(" ".join((*person.before, *person.after)).split()):  # in order: a set's differs from run to run
            held.setdefault(word, []).append(-loss)
    new = {word: sum(values) / len(values) for word, values in held.items()}
    return {**old, **{word: (old[word] + value) / 2 if word in old else value for word, value in new.items()}}


def swap_words(person: Individual, scores: dict[str, float], rng: random.Random) -> Individual:
    """A few words around the request give way to words of higher score."""

    highest = max(scores.values(), default=-math.inf)

    def swapped(word: str) -> str:
        own = scores.get(word, -math.inf)
        if own >= highest or rng.random() >= WORD_SWAP:
            return word
        return rng.choice([other for other, score in scores.items() if score > own])

    def around(sentences: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(" ".join(map(swapped, sentence.split())) for sentence in sentences)

    return replace(person, before=around(person.before), after=around(person.after))


def rephrase(
    people: list[Individual], goal: str, victim: Victim, attacker: Attacker, generator, rng: random.Random, cost: Cost
) -> list[Individual]:
    """Mutation: in some children, one part is said otherwise by the attacker: a sentence, or the request if it is one that
    does so. In all that are there already: else the fittest would soon be the whole population."""
    kept, people = max(1, round(ELITE_SHARE * len(people))), list(people)
    parts = [[*p.before, *p.after] + ([] if attacker.keeps_request else [p.request]) for p in people]
    chosen = [i for i in range(kept, len(people)) if parts[i] and (rng.random() < REPHRASE or people[i] in people[:i])]
    places = [rng.randrange(len(parts[i])) for i in chosen]
    requests = [place == len(people[i].before) + len(people[i].after) for i, place in zip(chosen, places, strict=True)]
    seeds = draw_seeds(generator, len(chosen))
    texts = attacker.vary(
        [parts[i][place] for i, place in zip(chosen, places, strict=True)], [goal] * len(chosen), requests, seeds
    )
    cost.written(victim, texts)
    for i, place, text in zip(chosen, places, texts, strict=True):
        if text:
            before, after = len(people[i].before), len(people[i].before) + len(people[i].after)
            parts[i][place] = text
            request = text if place == after else people[i].request
            people[i] = Individual(tuple(parts[i][:before]), request, tuple(parts[i][before:after]))
    return people
