"""Exercise `gcg_propose`: 04_attack_eval.py, propose."""

import importlib

import torch
from grading import ensure, near

stage = importlib.import_module("04_attack_eval")
SUFFIX, WORDS = torch.tensor([4, 9, 4]), 12
ALLOWED = torch.arange(WORDS) % 5 != 0  # neither 0, 5 nor 10
SLOPES = torch.sin(torch.arange(3.0 * WORDS) * 2.3).view(3, WORDS)
SLOPES[0, 4] = SLOPES[1, 9] = SLOPES[2, 4] = -5.0  # what stands there already would be best
SLOPES[:, 5] = -3.0  # a word that is not allowed comes next


def proposed(width=1000, top_k=3, slopes=SLOPES, allowed=ALLOWED, seed=0):
    budget = stage.Budget(gcg_width=width, gcg_top_k=top_k)
    generator = torch.Generator().manual_seed(seed)
    found = stage.propose(slopes, SUFFIX, allowed, budget, generator)
    ensure(found.ndim == 2 and found.shape[1] == 3, "the result has not the shape (N, S)")
    return found


def swaps(found):
    """(position, token) of each candidate."""
    changed = found != SUFFIX
    ensure((changed.sum(1) > 0).all(), "a candidate is the suffix itself: a swap must change something")
    ensure((changed.sum(1) == 1).all(), "a candidate changes more than one token")
    return [(int(row.nonzero()[0, 0]), int(ids[row][0])) for ids, row in zip(found, changed, strict=True)]


def test_one_swap_of_an_allowed_token():
    found = swaps(proposed())
    ensure(all(bool(ALLOWED[token]) for _, token in found), "a token is proposed that is not allowed")


def test_the_promising_ones():
    found, top = swaps(proposed()), 0
    for position in range(3):
        tokens = {token for place, token in found if place == position}
        slopes = SLOPES[position].clone()
        slopes[~ALLOWED] = torch.nan
        slopes[SUFFIX[position]] = torch.nan
        ensure(len(tokens) == 3, "not gcg_top_k tokens are proposed for each position, where all have room")
        inside = torch.tensor([slopes[token] for token in tokens]).mean()
        top += bool(inside > slopes.nanmean())
    ensure(top == 0, "the tokens of the largest slopes are proposed: a swap should lower the loss")


### BEGIN HIDDEN
def test_all_are_different():
    for width in (1000, 6):
        found = swaps(proposed(width))
        ensure(len(set(found)) == len(found), "the same swap is proposed twice: it would be paid for twice")
    near(len(proposed(6)), 6, "there are not gcg_width candidates, where there are enough swaps")
    near(len(proposed(1000)), 9, "there are not all swaps, where gcg_width has room for them")


def test_few_words_are_allowed():
    allowed = torch.zeros(WORDS, dtype=torch.bool)
    allowed[[4, 7, 9]] = True
    found = swaps(proposed(top_k=8, allowed=allowed))
    right = all(bool(allowed[token]) for _, token in found)
    ensure(right, "where fewer words are allowed than gcg_top_k, forbidden ones are proposed")


def test_chance():
    one, other = proposed(4, seed=1), proposed(4, seed=2)
    near(proposed(4, seed=1), one, "the same generator proposes something else: take all chance from it")
    ensure(one.tolist() != other.tolist(), "there is no chance in it: every seed gives the same candidates")
    positions = {place for seed in range(9) for place, _ in swaps(proposed(4, seed=seed))}
    ensure(positions == {0, 1, 2}, "some position is never changed")


### END HIDDEN
