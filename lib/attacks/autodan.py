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

import math
import random
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch

from lib.attacks.core import Attempt, Budget, Victim, a_try, not_tried
from lib.batches import masked_batch
from lib.chat import encode_text
from lib.policy import token_logprobs
from lib.sampler import draw_seeds

ELITE_SHARE, SWAPS = 0.1, 5  # of the population; of words in a paragraph. Both its own paper's


@dataclass(frozen=True)
class Individual:
    """A prompt of the population. The request is kept whole; the sentences around it may change."""

    before: tuple[str, ...]
    request: str
    after: tuple[str, ...]

    def text(self) -> str:
        return " ".join(part for part in (*self.before, self.request, *self.after) if part)


People = list[Individual]


def autodan(victim: Victim, attempts: list[Attempt], budget: Budget, attacker) -> None:
    """One search for each behaviour; the trace holds the best prompt so far after each generation."""
    for attempt in attempts:
        rng = random.Random(draw_seeds(attempt.generator, 1)[0])
        seeds = draw_seeds(attempt.generator, budget.population)
        people = [Individual(*parts) for parts in attacker.individuals(attempt.prompt, len(seeds), seeds)]
        attempt.written(victim, [" ".join((*p.before, *p.after)) for p in people])  # none: a failure
        losses, scores = list[float](), dict[str, float]()
        for generation in victim.bar(range(budget.generations + 1), "generations"):
            if generation:
                ranked = [people[i] for i in sorted(range(len(people)), key=losses.__getitem__)]
                elite = ranked[: max(1, round(ELITE_SHARE * len(people)))]
                rest = ranked[len(elite) :]
                if generation % 2:
                    children = sentence_step(people, losses, len(rest), budget.crossover, rng)
                else:
                    scores = word_scores(people, losses, scores)
                    children = [swap_words(person, scores, budget.crossover, rng) for person in rest]
                # Rewritten are some at random, and all that are there already. The original has no such
                # guard, and 256 prompts. Of 24, copies of the fittest would soon fill the places.
                seen, again = set(elite), list[int]()
                for k, child in enumerate(children):
                    if rng.random() < budget.mutation or child in seen:
                        again.append(k)
                    seen.add(child)
                anew = rewritten([children[k] for k in again], victim, attempt, attacker)
                for k, person in zip(again, anew, strict=True):
                    children[k] = person
                people = [*elite, *children]
            losses = target_losses(victim, attempt, [p.text() for p in people], budget)
            best = min(range(len(people)), key=losses.__getitem__)
            if losses[best] == math.inf:  # nothing can be sent, so nothing can be searched
                attempt.trace.append(not_tried(people[best].text()))
                break
            better = not attempt.trace or losses[best] < attempt.trace[-1]["loss"]
            new = a_try(generation, people[best].text(), loss=losses[best])
            attempt.trace.append(new if better else attempt.trace[-1] | {"step": generation})


@torch.no_grad()
def target_losses(victim: Victim, attempt: Attempt, texts: list[str], budget: Budget) -> list[float]:
    """Mean negative log-likelihood of the target behind each text. A text that is too long, or cannot be
    read, is a hair worse than the worst; inf if all are."""
    target = encode_text(victim.tokenizer, attempt.behaviour["target"])
    read = [victim.sendable(text, behind=len(target)) for text in texts]  # token ids, or none
    rows, losses = [ids + target for ids in read if ids], list[float]()
    size = max(1, budget.max_batch_tokens // max(map(len, rows), default=1))
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        masks = [[False] * (len(row) - len(target)) + [True] * len(target) for row in part]
        batch = masked_batch(part, masks, 0, victim.model.device)  # (n, T) each
        losses += (-token_logprobs(victim.model, *batch).sum(1) / len(target)).tolist()
    attempt.cost["queries"] += len(rows)
    attempt.cost["forward_tokens"] += sum(map(len, rows))
    worst, found = math.nextafter(max(losses, default=math.inf), math.inf), iter(losses)
    return [next(found) if ids else worst for ids in read]


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


def rewritten(people: People, victim: Victim, attempt: Attempt, attacker) -> People:
    """They are said otherwise: each sentence, and the request if the attacker is one that does so.

    All of a generation at once: a chat model writes many texts in the time of one.
    """
    old, places = list[str](), list[int]()
    for p in people:
        places.append(len(old) + len(p.before))
        old += [*p.before, p.request, *p.after]
    new = attacker.vary(old, places, attempt.prompt, draw_seeds(attempt.generator, len(old)))
    attempt.written(victim, [x for k, x in enumerate(new) if k not in places or x != old[k]])
    said = iter([text or part for text, part in zip(new, old, strict=True)])  # what it could not say stays
    return [
        Individual(tuple(islice(said, len(p.before))), next(said), tuple(islice(said, len(p.after))))
        for p in people
    ]
