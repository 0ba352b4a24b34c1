"""Exercise `sample_simple`: lib/sampler.py. It must write what the engine writes, `sample`."""

import pytest
from grading import ensure, near, wrong

import lib.sampler
from lib.sampler import sample, sample_simple

PROMPT, SEEDS, EOS = [3, 8, 5, 11], [2**61 + 31 * i for i in range(6)], [22]


@pytest.fixture
def fed(model):
    """How many tokens the model was fed in each pass."""
    counts = []

    def count(module, given, named):
        counts.append(named.get("input_ids", *given[:1]).numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


def tokens(completions):
    return [completion.token_ids for completion in completions]


def compare(model, monkeypatch, **how):
    """What both write, and a hint where the tokens differ."""
    how = {"max_new_tokens": 9, "eos_token_ids": EOS} | how
    engine = {"prompts": [PROMPT], "group_size": len(SEEDS), "seeds": SEEDS} | how
    right, found = sample(model, **engine), sample_simple(model, PROMPT, SEEDS, **how)
    ensure(len(found) == len(SEEDS), "there is not one completion for each seed")
    if tokens(found) != tokens(right):
        plain = lib.sampler.uniform
        monkeypatch.setattr(lib.sampler, "uniform", lambda seeds, steps: plain(seeds, steps + 1))
        late = tokens(sample(model, **engine)) == tokens(found)
        ensure(not late, "off by one: the first token takes the random number 0 of its seed")
        wrong("`sample` writes other tokens with these seeds")
    return found, right


def test_it_writes_what_the_engine_writes(model, monkeypatch):
    compare(model, monkeypatch)


def test_the_prompt_is_read_once(model, fed):
    sample_simple(model, PROMPT, SEEDS, max_new_tokens=5, eos_token_ids=[])
    ensure(fed[0] == len(PROMPT), "the first pass must read the prompt, once for all seeds")
    again = any(count > len(SEEDS) for count in fed[1:])
    ensure(not again, "a step feeds more than one token a row: the cache knows what came before")


### BEGIN HIDDEN
def test_temperature_and_top_p(model, monkeypatch):
    for how in ({"temperature": 0.5}, {"temperature": 0}, {"top_p": 0.6}):
        compare(model, monkeypatch, **how)


def test_ends(model, monkeypatch):
    found, right = compare(model, monkeypatch, eos_token_ids=[22, 16, 21])
    ensure(len({len(ids) for ids in tokens(right)}) > 1, "the test is broken: all end together")
    same = [a.finish_reason == b.finish_reason for a, b in zip(found, right, strict=True)]
    ensure(all(same), "finish_reason is not that of `sample`")


def test_it_stops_when_all_have_ended(model, fed):
    everything = list(range(23))
    found = sample_simple(model, PROMPT, SEEDS, max_new_tokens=9, eos_token_ids=everything)
    near([len(ids) for ids in tokens(found)], [1] * 6, "a completion goes on behind its end")
    ensure(len(fed) <= 2, "it goes on when all rows have ended")
    fed.clear()
    found = sample_simple(model, PROMPT, SEEDS, max_new_tokens=3, eos_token_ids=[])
    near([len(ids) for ids in tokens(found)], [3] * 6, "a completion has not max_new_tokens tokens")
    ensure(len(fed) <= 3, "there is a pass whose result nobody uses")


def test_logprobs(model, monkeypatch):
    found, right = compare(model, monkeypatch, temperature=0.7)
    for one, other in zip(found, right, strict=True):
        ensure(len(one.logprobs) == len(one.token_ids), "there is not one log-probability for each token")
        near(one.logprobs, other.logprobs, "the log-probabilities are not those that `sample` gives")


### END HIDDEN
