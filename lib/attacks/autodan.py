"""AutoDAN: a genetic search for a prompt that reads like language (Liu et al. 2023; paper, "Evaluation").

GCG's suffixes look like noise. AutoDAN varies sentences around a request instead, and lets those multiply
that make the target likely. It needs the target's loss, not its gradient: access "score". The best tenth of
the prompts stay as they are. The others are replaced, by two steps in turn:

    sentences   parents are drawn by softmax(-loss); pairs cross: each child takes some sentences of both
    words       a word's score is the mean of -loss over the prompts that hold it, averaged with its earlier
                score; in every prompt a few words give way to words of higher score

After both, a few prompts are rewritten as a whole. What differs from the original: a word gives way to a
better one of the population, not to a synonym; the attacker writes the first prompts, which there are
people's jailbreaks; there four steps on words follow each one on sentences, and parents swap at five points
at most.
"""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import replace
from itertools import chain

import torch

from lib import UserError
from lib.attacks.core import Attempt, Cost, Individual, a_try, too_long
from lib.attacks.suffix import check_target
from lib.batches import masked_batch
from lib.chat import encode_text
from lib.policy import token_logprobs
from lib.sampler import draw_seeds

ELITE_SHARE, SWAPS = 0.1, 5  # of the population; of words in a paragraph. Both its own paper's
People = list[Individual]


def autodan(victim, behaviours, budget, generators, on_step, attacker) -> list[Attempt]:
    """One search for each behaviour; the trace holds the best prompt so far after each generation."""
    searches = zip(behaviours, generators, strict=True)
    return [_search(victim, b, budget, generator, on_step, attacker) for b, generator in searches]


def _search(victim, behaviour: dict, budget, generator, on_step, attacker) -> Attempt:
    target, goal, cost = check_target(behaviour), behaviour["prompt"], Cost()
    rng = random.Random(draw_seeds(generator, 1)[0])
    written = attacker.individuals(goal, budget.population, draw_seeds(generator, budget.population))
    people = [Individual(*parts) for parts in written]
    cost.written(victim, [" ".join((*p.before, *p.after)) for p in people])  # an empty scene is a failure
    trace, losses, scores = list[dict](), list[float](), dict[str, float]()
    for generation in range(budget.generations + 1):
        if generation:
            ranked = [people[i] for i in sorted(range(len(people)), key=losses.__getitem__)]
            kept = max(1, round(ELITE_SHARE * len(people)))
            elite, rest = ranked[:kept], ranked[kept:]
            if generation % 2:
                children = sentence_step(people, losses, len(rest), budget.crossover, rng)
            else:
                scores = word_scores(people, losses, scores)
                children = [swap_words(person, scores, budget.crossover, rng) for person in rest]
            for i in to_rewrite(elite, children, budget.mutation, rng):
                children[i] = rewritten(children[i], goal, victim, attacker, generator, cost)
            people = elite + children
            on_step()
        losses = target_losses(victim, [p.text() for p in people], target, budget, cost)
        best = min(range(len(people)), key=losses.__getitem__)
        if losses[best] == math.inf:
            return too_long(behaviour, people[best].text(), cost)
        if generation == 0 or losses[best] < trace[-1]["loss"]:
            trace.append(a_try(generation, people[best].text(), loss=losses[best]))
        else:
            trace.append(trace[-1] | {"step": generation})
    return Attempt(behaviour["id"], trace, cost.total())


@torch.no_grad()
def target_losses(victim, texts: list[str], target: str, budget, cost: Cost) -> list[float]:
    """Mean negative log-likelihood of the target behind each text. A text that is too long, or cannot be
    read, is as bad as the worst; inf if all are."""
    target_ids = encode_text(victim.tokenizer, target)
    asked = {}  # index of a text -> its token ids and the target's
    for i, text in enumerate(texts):
        with contextlib.suppress(UserError):  # an attacker may write what the victim's tokenizer cannot read
            if victim.fits(ids := victim.encode(text), len(target_ids)):
                asked[i] = ids + target_ids
    rows, losses = list(asked.values()), list[float]()
    size = max(1, budget.max_batch_tokens // max(map(len, rows), default=1))
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        masks = [[False] * (len(row) - len(target_ids)) + [True] * len(target_ids) for row in part]
        batch = masked_batch(part, masks, 0, victim.model.device)  # (n, T) each
        losses += (-token_logprobs(victim.model, *batch).sum(1) / len(target_ids)).tolist()
    cost.queries += len(rows)
    cost.forward_tokens += sum(map(len, rows))
    found, worst = dict(zip(asked, losses, strict=True)), max(losses, default=math.inf)
    return [found.get(i, worst) for i in range(len(texts))]


def sentence_step(people: People, losses: list[float], count: int, rate: float, rng: random.Random) -> People:
    """`count` children of parents drawn by softmax(-loss). A pair crosses at that rate, or stays as it is."""
    weights = [math.exp(min(losses) - loss) for loss in losses]
    parents, children = rng.choices(people, weights, k=count + count % 2), People()
    for pair in zip(parents[::2], parents[1::2], strict=True):
        children += crossed(*pair, rng) if rng.random() < rate else pair
    return children[:count]


def crossed(mother: Individual, father: Individual, rng: random.Random) -> People:
    """Multi-point crossover. At each place chance says which child has the mother's sentence; the other has
    the father's. What only the longer of the two has goes to one child as a whole."""

    def shared_out(hers: tuple[str, ...], his: tuple[str, ...]) -> list[tuple[str, ...]]:
        common = min(len(hers), len(his))
        places = [[(a,), (b,)] for a, b in zip(hers, his, strict=False)] + [[hers[common:], his[common:]]]
        for place in places:
            if rng.random() < 0.5:
                place.reverse()
        return [tuple(chain(*side)) for side in zip(*places, strict=True)]

    before, after = shared_out(mother.before, father.before), shared_out(mother.after, father.after)
    requests = shared_out((mother.request,), (father.request,))
    return [Individual(before[k], requests[k][0], after[k]) for k in (0, 1)]


def word_scores(people: People, losses: list[float], old: dict[str, float]) -> dict[str, float]:
    """Word -> mean of -loss over the prompts that hold it, averaged with its old score."""
    held: dict[str, list[float]] = {}
    for person, loss in zip(people, losses, strict=True):
        words = " ".join((*person.before, *person.after)).split()
        for word in dict.fromkeys(words):  # in order: a set's differs from run to run
            held.setdefault(word, []).append(-loss)
    new = {word: sum(values) / len(values) for word, values in held.items()}
    return old | {word: (old.get(word, value) + value) / 2 for word, value in new.items()}


def swap_words(person: Individual, scores: dict[str, float], rate: float, rng: random.Random) -> Individual:
    """Words give way to better ones, drawn by how much better; at most SWAPS before and SWAPS behind."""

    def paragraph(sentences: tuple[str, ...]) -> tuple[str, ...]:
        split, room = [sentence.split() for sentence in sentences], SWAPS
        for words in split:
            for i, word in enumerate(words):
                if not room or rng.random() >= rate:
                    continue
                gains = {other: score - scores[word] for other, score in scores.items()}
                if better := {other: gain for other, gain in gains.items() if gain > 0}:
                    words[i] = rng.choices(list(better), list(better.values()))[0]
                    room -= 1
        return tuple(map(" ".join, split))

    return replace(person, before=paragraph(person.before), after=paragraph(person.after))


def to_rewrite(elite: People, children: People, rate: float, rng: random.Random) -> list[int]:
    """Which children to rewrite: some at random, and all that are there already. The original has no such
    guard, and 256 prompts. Of 24, copies of the fittest would soon fill the places."""
    kept, chosen = set(elite), []
    for i, child in enumerate(children):
        if rng.random() < rate or child in kept:
            chosen.append(i)
        kept.add(child)
    return chosen


def rewritten(person: Individual, goal: str, victim, attacker, generator, cost: Cost) -> Individual:
    """It is said otherwise: each sentence, and the request if the attacker is one that does so."""
    old, place = [*person.before, person.request, *person.after], len(person.before)
    new = attacker.vary(old, place, goal, draw_seeds(generator, len(old)))
    cost.written(victim, [text for text in new if text != person.request])
    new = [text or part for text, part in zip(new, old, strict=True)]  # what it could not say stays
    return Individual(tuple(new[:place]), new[place], tuple(new[place + 1 :]))
