"""The sampler against plain ways to do the same: `sample_simple`, generate, a full forward pass, softmax."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections import Counter

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import lib.sampler
from lib.sampler import Completion, draw, sample, sample_simple, uniform
from tests.bench.decoders import FixedBatch, Replayed

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
# initializer_range well above the usual: otherwise greedy decoding repeats one token for ever
SIZES |= dict(max_position_embeddings=160, initializer_range=0.3)
EOS = [0, 1, 2, 3, 4, 5, 6, 7]  # eight of 97 tokens: completions end at many different steps


def tiny(family: str = "Qwen2", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | {"num_key_value_heads": 2} | changes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def random_prompts(count: int, high: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, 97) for _ in range(rng.randint(1, high))] for _ in range(count)]


PROMPTS = random_prompts(11)


def generate(model, prompt: list[int], max_new_tokens: int, eos: list[int]) -> list[int]:
    """One prompt at a time, no padding, no batch."""
    ids = torch.tensor([prompt])
    how = dict(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos or None, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()


def ids(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


# ---- token for token

KINDS = {"Qwen2": {}, "Mistral": {"sliding_window": 9}, "Olmo2": {"attn_implementation": "eager"}}
BATCHES = {"cpu": lib.sampler._Batch, "gpu": FixedBatch, "recorded": Replayed}


@pytest.fixture(params=BATCHES, ids="shapes as on a {}".format)
def shapes(request, monkeypatch):
    """A CPU attends to the columns that are written; a GPU to all, and 16 steps pass between two looks."""
    monkeypatch.setattr(lib.sampler, "_Batch", BATCHES[request.param])


@pytest.mark.parametrize("family", KINDS)
def test_greedy_equals_generate(family, shapes):
    model = tiny(family, **KINDS[family])
    expected = [generate(model, prompt, 20, EOS) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 3  # they do end at different steps
    for group_size, budget in [(1, 130), (3, 70), (3, 400), (2, None)]:
        how = dict(max_new_tokens=20, temperature=0, eos_token_ids=EOS, max_batch_tokens=budget)
        found = ids(sample(model, PROMPTS, group_size=group_size, **how))
        assert found == [tokens for tokens in expected for _ in range(group_size)]
    longer = sample(model, PROMPTS[:2], max_new_tokens=110, temperature=0, eos_token_ids=[])
    assert ids(longer) == [generate(model, prompt, 110, []) for prompt in PROMPTS[:2]]  # than spare columns


HOW = [(1.0, 1.0, None, EOS), (1.0, 1.0, 70, [9, 40]), (0.6, 0.9, 70, EOS), (0, 1.0, 300, [9, 40])]


@pytest.mark.parametrize("temperature, top_p, budget, eos", HOW)
def test_sample_writes_what_sample_simple_writes(model, shapes, temperature, top_p, budget, eos):
    """So a completion depends on its prompt and its seed alone: not on its batch-mates nor on the budget."""
    seeds = [2**62 + 17 * i for i in range(3 * len(PROMPTS))]
    how = dict(temperature=temperature, top_p=top_p, eos_token_ids=eos)
    simple = []
    for i, prompt in enumerate(PROMPTS):
        simple += sample_simple(model, prompt, seeds[3 * i : 3 * i + 3], max_new_tokens=20, **how)
    how |= dict(group_size=3, max_batch_tokens=budget)
    out = sample(model, PROMPTS, seeds=seeds, max_new_tokens=20, **how)
    for one, other in zip(out, simple, strict=True):
        near = pytest.approx(other.logprobs, abs=1e-4)
        assert one == Completion(other.token_ids, near, other.finish_reason)
    short = sample(model, PROMPTS[::-1], seeds=seeds[::-1], max_new_tokens=6, **how)
    assert ids(short)[::-1] == [tokens[:6] for tokens in ids(out)]  # a longer limit only continues


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_equal_a_plain_forward_pass(model, temperature):
    how = dict(temperature=temperature, top_p=0.9, eos_token_ids=EOS)  # not of what top_p leaves
    out = sample(model, PROMPTS, group_size=2, max_new_tokens=15, seeds=range(22), **how)
    for i, completion in enumerate(out):
        row, start = PROMPTS[i // 2] + completion.token_ids, len(PROMPTS[i // 2])
        logits = model(torch.tensor([row])).logits[0, start - 1 : -1] / (temperature or 1)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


def test_a_generator_draws_the_seeds(model):
    how = dict(group_size=2, max_new_tokens=8, eos_token_ids=EOS)
    seeds = torch.randint(2**63 - 1, (22,), generator=torch.Generator().manual_seed(5)).tolist()
    generator = torch.Generator().manual_seed(5)
    first, second = (sample(model, PROMPTS, generator=generator, **how) for _ in range(2))
    assert first == sample(model, PROMPTS, seeds=seeds, **how) and second != first
    assert first[0] != first[1]  # members of a group differ


# ---- what it costs


@contextlib.contextmanager
def recorded(model):
    """Lists that fill: ids of reading passes; (rows, columns, capacity, place) of steps: a token a row."""
    reads, steps = [], []

    def note(module, args, kwargs) -> None:
        ids, cache = kwargs["input_ids"], kwargs["cache"]
        if before := int(cache.get_seq_length()):
            keys, columns = cache.layers[0].keys, kwargs["attention_mask"].shape[-1]
            assert ids.shape[1] == 1 and before < columns
            steps.append((len(ids), columns, keys.shape[2], keys.data_ptr()))
        else:
            reads.append(ids.tolist())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield reads, steps
    hook.remove()


@pytest.mark.parametrize("budget", [60, 350, None])
def test_a_group_shares_its_prompt_and_all_passes_keep_the_budget(model, budget, monkeypatch):
    heads = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(args[0].shape[1]))
    monkeypatch.setattr(lib.sampler, "PREFILL_TOKENS", 50)
    how = dict(group_size=5, max_new_tokens=20, eos_token_ids=EOS, seeds=range(55), max_batch_tokens=budget)
    with recorded(model) as (reads, steps):
        sample(model, PROMPTS, **how)
    hook.remove()
    read = Counter(tuple(token for token in row if token) for rows in reads for row in rows)
    assert read.keys() == {tuple(prompt) for prompt in PROMPTS}
    assert budget or read.total() == len(PROMPTS)  # under a budget a group may come in parts
    assert len(reads) > 3 and all(len(rows) * len(rows[0]) <= 50 for rows in reads)  # long lists in several
    assert max(rows * columns for rows, columns, *_ in steps) <= (budget or math.inf)
    assert {*heads} == {1}  # the output layer sees last positions only


def test_no_step_is_taken_behind_the_last_token(model):
    for eos, taken in (([], 4), (range(97), 0)):
        with recorded(model) as (_, steps):
            out = sample(model, PROMPTS[:3], group_size=3, max_new_tokens=5, eos_token_ids=eos)
        assert len(steps) == taken and {len(x.token_ids) for x in out} == {taken + 1}
    assert sample(model, [], max_new_tokens=3, eos_token_ids=EOS) == []


@pytest.mark.parametrize("budget", [270, None])
def test_on_a_gpu_shapes_stay_between_repacks_and_keep_the_budget(model, monkeypatch, budget):
    monkeypatch.setattr(lib.sampler, "_Batch", FixedBatch)
    monkeypatch.setattr(lib.sampler, "LOOK", 4)
    with recorded(model) as (_, steps):
        sample(model, PROMPTS, group_size=2, max_new_tokens=90, eos_token_ids=[], max_batch_tokens=budget)
    assert all(n == capacity and rows * n <= (budget or math.inf) for rows, n, capacity, _ in steps)
    moves = sum(one != other for one, other in itertools.pairwise(steps))
    assert 0 < moves < len(steps) / 8 and len(steps) >= 89


def test_finished_rows_leave_and_waiting_prompts_take_their_place(model):
    prompts = random_prompts(60, high=12, seed=3)
    how = dict(max_new_tokens=30, eos_token_ids=EOS, seeds=range(60), max_batch_tokens=12 * 42)
    with recorded(model) as (_, steps):
        out = sample(model, prompts, **how)
    rows = [rows for rows, *_ in steps]
    needed = sum(len(c.token_ids) - 1 for c in out)  # each first token comes from the prefill
    assert sum(rows) <= 1.4 * needed  # at most about a quarter of the rows is idle at any time
    assert len(rows) < 60 * 30 / 12  # fewer steps than five full batches, one after the other
    assert max(rows) <= 16 and min(rows[: len(rows) // 2]) >= 8  # refilled while prompts wait


def test_autocast_casts_a_weight_once_and_not_for_every_token(model):
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "_to_copy" in str(function) and isinstance(args[0], torch.nn.Parameter)
            return function(*args, **(kwargs or {}))

    counts = []
    for tokens in (2, 12):
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            sample(model, PROMPTS[:2], max_new_tokens=tokens, eos_token_ids=[])
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


# ---- the distribution


def test_tokens_of_no_probability_are_never_drawn_and_rare_ones_can_be():
    logits, u = torch.full((3, 50), -torch.inf), torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    logits[:, 20] = 0.0
    for top_p in (1.0, 0.9):
        assert [x.tolist() for x in draw(logits, u, 1.0, top_p)] == [[20, 20, 20], [0, 0, 0]]
    logits = torch.zeros(2, 40)
    logits[:, 0] = math.log(40e-12)  # its share of numbers is 1e-12; in 23 bits that of u = 0 would be 1.2e-7
    assert draw(logits, torch.tensor([2e-12, 0.5e-12]).double(), 1.0, 1.0)[0].tolist() == [1, 0]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (2.0, 0.5)])
def test_the_token_is_the_exact_inverse_at_a_large_vocabulary(temperature, top_p):
    """In float32 the sum is rounded to 6e-8 near 1, more than a rare token weighs."""
    torch.manual_seed(0)
    logits, rows = torch.randn(8, 151_936) * 2, torch.arange(8)
    logits[4:, ::2] -= 60  # every other token: less than 1e-13 each, never to be drawn
    p = (logits / temperature).log_softmax(-1).double().exp()
    order = torch.arange(p.shape[1]).expand(8, -1)
    if top_p < 1:
        order = p.argsort(dim=-1, descending=True, stable=True)
    cdf = p.gather(1, order).cumsum(-1)
    mass = cdf[rows, (cdf < top_p).sum(1)] if top_p < 1 else cdf[:, -1]
    edge = cdf[:, 1000] / mass  # right after a token, and right before it
    for u in (uniform(rows, 0), edge + 1e-11, edge - 1e-11):
        rank = (cdf <= (u * mass)[:, None]).sum(1)  # the first whose cumulative probability exceeds it
        tokens, logprobs = draw(logits, u, temperature, top_p)
        assert tokens.tolist() == order[rows, rank].tolist() and (logprobs > -25).all()


def test_random_numbers_are_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = [(number >> 11) / 2**53 for number in published]
    assert uniform(torch.full((4,), 1234567), torch.arange(4)).tolist() == expected


# ---- use within training, and bad input


def test_a_model_in_training_is_so_again():
    model = tiny().train()
    model.model.layers[0].eval()  # a part that was frozen on purpose stays so
    before = [module.training for module in model.modules()]

    def interrupt(module, args, kwargs):
        assert not module.training
        raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        sample(model, PROMPTS, max_new_tokens=4, eos_token_ids=EOS)
    assert [module.training for module in model.modules()] == before


BAD = [dict(prompts=prompts) for prompts in ([[9], []], [[5], [97]], [[9] * 158])]  # the context is 160
BAD += [dict(max_batch_tokens=4), dict(max_new_tokens=0), dict(group_size=0), dict(top_p=0.0)]
BAD += [dict(temperature=math.nan), dict(seeds=[1, 2]), dict(seeds=[1], generator=torch.Generator())]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_bad_input_is_an_error(model, change):
    how = dict(prompts=[[9, 10]], max_new_tokens=3, eos_token_ids=EOS) | change
    with pytest.raises(ValueError):
        sample(model, how.pop("prompts"), **how)


def test_logits_that_are_not_finite_are_reported():
    model = tiny()
    model.model.norm.weight.data.fill_(torch.nan)
    for temperature, top_p in [(1.0, 1.0), (1.0, 0.9), (0.0, 1.0)]:
        with pytest.raises(FloatingPointError, match="not finite"):
            sample(model, PROMPTS, max_new_tokens=3, temperature=temperature, top_p=top_p, eos_token_ids=[])
