"""The sampler against plain ways to do the same: model.generate, a full forward pass, softmax, splitmix64."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lib.sampler
from lib.sampler import draw, uniform
from lib.sampler import Completion, sample

SMOLLM = Path(os.environ.get("TARS_SMOLLM", "/tmp/smollm2"))
SANDBOX = Path(__file__).parents[1] / "lib" / "sandbox" / "base"
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
EOS = [0, 1, 2, 3, 4, 5, 6, 7]  # eight of 97 tokens: completions end at many different steps


def tiny_model(family: str = "qwen2", attention: str = "sdpa"):
    torch.manual_seed(0)
    # initializer_range well above the usual: otherwise greedy decoding repeats one token for ever
    common = dict(SIZES, max_position_embeddings=160, initializer_range=0.3, attn_implementation=attention)
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common, num_key_value_heads=4, tie_word_embeddings=True)).eval()
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2)).eval()
    return MistralForCausalLM(MistralConfig(**common, num_key_value_heads=2, sliding_window=9)).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def random_prompts(
    count: int, vocab: int = 97, low: int = 1, high: int = 40, seed: int = 0
) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, vocab) for _ in range(rng.randint(low, high))] for _ in range(count)]


PROMPTS = random_prompts(11)


def generate(model, prompt: list[int], max_new_tokens: int, eos: list[int]) -> list[int]:
    """The reference: one prompt at a time, no padding, no batch."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def generate_together(model, prompts: list[list[int]], max_new_tokens: int, eos: int) -> list[list[int]]:
    """The same for prompts of one length; a row that ends early is filled up with `eos`."""
    rows = torch.tensor(prompts)
    out = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
    )[:, rows.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in out]


def ids(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def logits_of(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].float()  # (completion, vocab)


class Calls:
    """Records the shapes that the model is called with: (rows, tokens, columns of the cache beforehand)."""

    def __init__(self, model) -> None:
        self.model, self.shapes, self.hidden, self.ids = model, [], [], []

    def __enter__(self) -> Calls:
        self.hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.lm_head.register_forward_pre_hook(self._head),
        ]
        return self

    def _before(self, module, args, kwargs) -> None:
        self.shapes.append((*kwargs["input_ids"].shape, kwargs["cache"].get_seq_length()))
        self.ids.append(kwargs["input_ids"].tolist())

    def _head(self, module, args) -> None:
        self.hidden.append(tuple(args[0].shape))

    def __exit__(self, *exception) -> None:
        for hook in self.hooks:
            hook.remove()

    @property
    def prefills(self) -> list[tuple[int, int, int]]:
        return [shape for shape in self.shapes if shape[2] == 0]

    @property
    def steps(self) -> list[tuple[int, int, int]]:
        return [shape for shape in self.shapes if shape[2] > 0]


# ---- greedy: token for token what generate writes


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])  # mistral here: a sliding window of 9
def test_greedy_equals_generate(family):
    model = tiny_model(family)
    expected = [generate(model, prompt, 20, EOS) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 3  # they do end at different steps
    for group_size, budget in [(1, None), (1, 130), (3, 70), (3, 400), (2, None)]:
        out = sample(
            model,
            PROMPTS,
            group_size=group_size,
            max_new_tokens=20,
            temperature=0,
            eos_token_ids=EOS,
            max_batch_tokens=budget,
        )
        assert ids(out) == [tokens for tokens in expected for _ in range(group_size)]


def test_greedy_equals_generate_with_eager_attention():
    model = tiny_model(attention="eager")
    out = sample(model, PROMPTS, max_new_tokens=9, temperature=0, eos_token_ids=EOS, max_batch_tokens=150)
    assert ids(out) == [generate(model, prompt, 9, EOS) for prompt in PROMPTS]


def test_greedy_over_many_steps_outgrows_the_spare_columns(model):
    prompts = [[9, 10, 11], [12] * 7]
    out = sample(model, prompts, max_new_tokens=150, temperature=0, eos_token_ids=[])
    assert ids(out) == [generate(model, prompt, 150, []) for prompt in prompts]


@pytest.mark.skipif(not (SMOLLM / "config.json").is_file(), reason=f"no real model at {SMOLLM} (TARS_SMOLLM)")
def test_greedy_equals_generate_on_a_real_model():
    model = AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32).eval()
    lengths = [2, 9, 21, 33]  # five prompts of each, which generate can take together without any padding
    groups = [random_prompts(5, vocab=2000, low=n, high=n, seed=n) for n in lengths]
    expected = [tokens for group in groups for tokens in generate_together(model, group, 24, eos=2)]
    order = random.Random(0).sample(range(20), 20)
    prompts, expected = [sum(groups, [])[i] for i in order], [expected[i] for i in order]
    out = sample(model, prompts, max_new_tokens=24, temperature=0, eos_token_ids=[2], max_batch_tokens=600)
    assert ids(out) == expected
    logprobs = logits_of(model, prompts[0], out[0].token_ids).log_softmax(-1)
    expected_logprobs = logprobs.gather(1, torch.tensor(out[0].token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(out[0].logprobs), expected_logprobs, atol=1e-4)


@pytest.mark.skipif(not (SANDBOX / "config.json").is_file(), reason=f"no sandbox checkpoint at {SANDBOX}")
def test_greedy_equals_generate_on_the_sandbox_model():
    model = AutoModelForCausalLM.from_pretrained(SANDBOX, dtype=torch.float32).eval()
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos] if eos is not None else []
    prompts = random_prompts(24, vocab=model.config.vocab_size, low=3, high=60, seed=2)
    out = sample(model, prompts, max_new_tokens=24, temperature=0, eos_token_ids=eos, max_batch_tokens=600)
    assert ids(out) == [generate(model, prompt, 24, eos) for prompt in prompts]


# ---- log-probabilities and finish reasons


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_equal_a_plain_forward_pass(model, temperature):
    out = sample(
        model,
        PROMPTS,
        group_size=2,
        max_new_tokens=15,
        temperature=temperature,
        top_p=0.9,  # logprobs are of the distribution before it
        eos_token_ids=EOS,
        seeds=range(22),
        max_batch_tokens=200,
    )
    for i, completion in enumerate(out):
        logits = logits_of(model, PROMPTS[i // 2], completion.token_ids) / (temperature or 1)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


def test_finish_reasons(model):
    out = sample(model, PROMPTS, group_size=4, max_new_tokens=10, eos_token_ids=EOS, seeds=range(44))
    assert {completion.finish_reason for completion in out} == {"eos", "length"}
    for completion in out:
        ended = [token in EOS for token in completion.token_ids]
        assert len(completion.logprobs) == len(completion.token_ids)
        assert not any(ended[:-1])
        assert (completion.finish_reason == "eos") == ended[-1]
        assert completion.finish_reason == "eos" or len(completion.token_ids) == 10


def test_an_eos_at_the_last_allowed_token_counts_as_eos(model):
    prompt = PROMPTS[0]
    third = generate(model, prompt, 3, [])[2]
    (out,) = sample(model, [prompt], max_new_tokens=3, temperature=0, eos_token_ids=[third])
    assert out.finish_reason == "eos"


def test_every_completion_may_end_at_its_first_token(model):
    out = sample(model, PROMPTS, group_size=2, max_new_tokens=5, eos_token_ids=range(97), max_batch_tokens=90)
    assert [len(completion.token_ids) for completion in out] == [1] * 22


def test_autocast_casts_a_weight_once_and_not_for_every_token(model):
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            matrix = (
                bool(args) and isinstance(args[0], torch.Tensor) and args[0].dim() == 2 and args[0].is_leaf
            )
            self.count += matrix and "_to_copy" in str(function) and isinstance(args[0], torch.nn.Parameter)
            return function(*args, **(kwargs or {}))

    counts = []
    for tokens in (2, 12):
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            sample(model, PROMPTS[:2], max_new_tokens=tokens, eos_token_ids=[])
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


def test_the_second_token_follows_the_model_whatever_the_first_was(model):
    """Each token needs a random number of its own: with one for all, the second would depend on how the first was drawn."""
    prompt, count = PROMPTS[2], 4000
    out = sample(
        model,
        [prompt],
        group_size=count,
        max_new_tokens=2,
        temperature=2.0,
        eos_token_ids=[],
        seeds=range(count),
    )
    first = torch.tensor([c.token_ids[0] for c in out]).mode().values.item()
    second = torch.tensor([c.token_ids[1] for c in out if c.token_ids[0] == first]).bincount(minlength=97)
    expected = (logits_of(model, prompt, [first, 8])[1] / 2.0).softmax(-1)
    top = expected.argsort(descending=True)[:9]
    counts = torch.cat([second[top], second.sum()[None] - second[top].sum()])
    assert (
        chi_square(counts, torch.cat([expected[top], 1 - expected[top].sum()[None]])) < 27.9
    )  # 9 degrees, p = 0.001


# ---- independence


def test_result_does_not_depend_on_batch_mates_budget_or_order(model):
    seeds = list(range(100, 100 + 3 * len(PROMPTS)))
    settings = dict(max_new_tokens=20, eos_token_ids=EOS)
    alone = [
        ids(sample(model, [prompt], group_size=3, seeds=seeds[3 * i : 3 * i + 3], **settings))
        for i, prompt in enumerate(PROMPTS)
    ]
    together = sample(model, PROMPTS, group_size=3, seeds=seeds, **settings)
    assert ids(together) == sum(alone, [])
    for budget in (60, 77, 150, 333, 1000):
        assert ids(
            sample(model, PROMPTS, group_size=3, seeds=seeds, max_batch_tokens=budget, **settings)
        ) == ids(together)
    backwards = sample(model, PROMPTS[::-1], group_size=3, seeds=seeds[::-1], **settings)
    assert ids(backwards)[::-1] == ids(together)


def test_a_longer_limit_only_continues(model):
    short = sample(model, PROMPTS, max_new_tokens=6, eos_token_ids=EOS, seeds=range(11))
    long = sample(model, PROMPTS, max_new_tokens=25, eos_token_ids=EOS, seeds=range(11))
    assert [tokens[:6] for tokens in ids(long)] == ids(short)


def test_generator_draws_the_seeds(model):
    settings = dict(group_size=2, max_new_tokens=8, eos_token_ids=EOS)
    seeds = torch.randint(2**63 - 1, (22,), generator=torch.Generator().manual_seed(5)).tolist()
    from_seeds = sample(model, PROMPTS, seeds=seeds, **settings)
    assert sample(model, PROMPTS, generator=torch.Generator().manual_seed(5), **settings) == from_seeds
    generator = torch.Generator().manual_seed(5)
    first, second = (sample(model, PROMPTS, generator=generator, **settings) for _ in range(2))
    assert first == from_seeds and second != first
    assert len({tuple(tokens) for tokens in ids(first)[:2]}) == 2  # members of a group differ


# ---- what it costs


def test_each_prompt_is_prefilled_once_and_decoded_within_the_budget(model):
    for budget in (60, 130, 350, None):
        with Calls(model) as calls:
            sample(
                model,
                PROMPTS,
                group_size=5,
                max_new_tokens=20,
                eos_token_ids=EOS,
                seeds=range(55),
                max_batch_tokens=budget,
            )
        read = [
            row
            for batch, shape in zip(calls.ids, calls.shapes, strict=True)
            if shape[2] == 0
            for row in batch
        ]
        assert len(read) == len(PROMPTS) or budget
        pass
        assert all(tokens == 1 for _, tokens, _ in calls.steps)
        assert all(rows * (before + tokens) <= (budget or 10**9) for rows, tokens, before in calls.shapes)
        assert all(shape[1] == 1 for shape in calls.hidden)  # the output layer sees last positions only


def test_long_prompt_lists_are_prefilled_in_several_passes(model, monkeypatch):
    settings = dict(max_new_tokens=4, eos_token_ids=EOS, seeds=range(11))
    whole = sample(model, PROMPTS, **settings)
    monkeypatch.setattr(lib.sampler, "PREFILL_TOKENS", 50)
    with Calls(model) as calls:
        assert ids(sample(model, PROMPTS, **settings)) == ids(whole)
    assert len(calls.prefills) > 3
    assert all(rows * tokens <= 50 for rows, tokens, _ in calls.prefills)


def test_finished_rows_leave_and_waiting_prompts_take_their_place(model):
    prompts = random_prompts(60, high=12, seed=3)
    with Calls(model) as calls:
        out = sample(
            model, prompts, max_new_tokens=30, eos_token_ids=EOS, seeds=range(60), max_batch_tokens=12 * 42
        )
    lengths = [len(completion.token_ids) for completion in out]
    decoded = sum(rows for rows, _, _ in calls.steps)
    needed = sum(lengths) - len(lengths)  # each first token comes from the prefill
    assert decoded <= 1.4 * needed  # at most about a quarter of the rows is idle at any time
    assert len(calls.steps) < 60 * 30 / 12  # fewer steps than five full batches, one after the other
    rows = [shape[0] for shape in calls.steps]
    assert max(rows) <= 16 and min(rows[: len(rows) // 2]) >= 8  # refilled while prompts wait
    columns = [shape[2] for shape in calls.steps]
    assert max(columns) <= 42


# ---- the distribution


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def test_samples_follow_the_softmax(model):
    torch.manual_seed(1)
    logits = torch.randn(1, 8) * 1.5
    u = uniform(torch.arange(20000), torch.zeros(20000, dtype=torch.long))
    for temperature in (1.0, 0.6, 2.0):
        tokens, logprobs = draw(logits.expand(20000, -1), u, temperature, 1.0)
        p = (logits[0] / temperature).softmax(-1)
        assert chi_square(tokens.bincount(minlength=8), p) < 24.3  # 7 degrees of freedom, p = 0.001
        assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)


def test_top_p_keeps_the_smallest_set(model):
    p = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.2, 0.1])
    u = uniform(torch.arange(20000), torch.zeros(20000, dtype=torch.long))
    for top_p, kept in [(0.3, [1]), (0.5, [1, 3]), (0.8, [1, 3, 4]), (0.99, [0, 1, 3, 4, 5])]:
        tokens, logprobs = draw(p.log().expand(20000, -1), u, 1.0, top_p)
        counts = tokens.bincount(minlength=6)
        assert counts.nonzero()[:, 0].tolist() == kept
        assert chi_square(counts[kept], p[kept] / p[kept].sum()) < 18.5  # 4 degrees of freedom, p = 0.001
        assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)  # not renormalised


def test_the_first_token_of_whole_completions_follows_the_model(model):
    prompt = PROMPTS[2]
    out = sample(
        model,
        [prompt],
        group_size=4000,
        max_new_tokens=2,
        temperature=2.0,
        eos_token_ids=[],
        seeds=range(4000),
    )
    p = (logits_of(model, prompt, [8])[0] / 2.0).softmax(-1)
    counts = torch.tensor([tokens[0] for tokens in ids(out)]).bincount(minlength=97)
    order = p.argsort(descending=True)
    top = order[:9]
    grouped = torch.cat([counts[top], counts.sum()[None] - counts[top].sum()])
    assert chi_square(grouped, torch.cat([p[top], 1 - p[top].sum()[None]])) < 27.9  # 9 degrees, p = 0.001


def test_tokens_of_no_probability_are_never_drawn():
    logits = torch.full((3, 50), -torch.inf)
    logits[:, 20] = 0.0
    for top_p in (1.0, 0.9):
        tokens, logprobs = draw(
            logits, torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64), 1.0, top_p
        )
        assert tokens.tolist() == [20, 20, 20] and logprobs.tolist() == [0, 0, 0]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_token_is_the_exact_inverse_at_the_vocabulary_of_qwen(top_p):
    """In float32 it is rounded to 6e-8 near 1, more than a rare token weighs."""
    torch.manual_seed(0)
    logits = torch.randn(8, 151_936) * 2
    logits[4:, ::2] -= 27  # every other token: about 1e-17 each, never to be drawn
    p = logits.log_softmax(-1).double().exp()
    order = (
        p.argsort(dim=-1, descending=True, stable=True)
        if top_p < 1
        else torch.arange(p.shape[1]).expand(8, -1)
    )
    cdf = p.gather(1, order).cumsum(-1)
    mass = cdf[torch.arange(8), (cdf < top_p).sum(1)] if top_p < 1 else cdf[:, -1]
    edge = cdf[:, 1000]  # right after a token, and right before it
    for u in (
        uniform(torch.arange(8), torch.zeros(8, dtype=torch.long)),
        edge / mass + 1e-11,
        edge / mass - 1e-11,
    ):
        rank = (cdf <= (u * mass)[:, None]).sum(1)  # the first whose cumulative probability exceeds it
        tokens, logprobs = draw(logits, u, 1.0, top_p)
        assert tokens.tolist() == order[torch.arange(8), rank].tolist()
        assert (logprobs > -25).all()


def test_a_token_of_probability_1e_12_in_front_is_not_drawn_by_the_smallest_numbers():
    """Its share of the numbers is 1e-12; with 23 bits it would be 1.2e-7, that of u = 0."""
    logits = torch.zeros(1, 40)
    logits[0, 0] = math.log(40e-12)
    seeds = torch.arange(2**22)
    u = uniform(seeds, torch.zeros_like(seeds))
    assert u.unique().numel() > 2**22 - 10 and u.dtype == torch.float64
    assert draw(logits.expand(2, -1), torch.tensor([2e-12, 0.5e-12], dtype=torch.float64), 1.0, 1.0)[
        0
    ].tolist() == [1, 0]


def splitmix64(seed: int, step: int) -> int:
    mask = 2**64 - 1
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_uniform_is_splitmix64():
    assert splitmix64(1234567, 0) == 6457827717110365317  # the published test vector
    seeds = torch.randint(2**63 - 1, (200,), generator=torch.Generator().manual_seed(0))
    for step in (0, 1, 999):
        expected = [(splitmix64(seed, step) >> 11) / 2**53 for seed in seeds.tolist()]
        assert uniform(seeds, torch.full_like(seeds, step)).tolist() == expected


def test_uniform_is_uniform_and_independent():
    seeds, steps = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    u = uniform(seeds, steps)  # (seeds, steps)
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.004 and abs(float(u.var()) - 1 / 12) < 0.002
    for a, b in [(u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, 1:], u[:-1, :-1])]:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.015


# ---- use within training, and bad input


def test_sampling_between_optimizer_steps_leaves_the_model_trainable():
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()  # a part that was frozen on purpose stays so
    before = [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        (out,) = sample(model, PROMPTS[:1], max_new_tokens=4, eos_token_ids=[], seeds=[1])
        assert [module.training for module in model.modules()] == before
        loss = model(torch.tensor([PROMPTS[0] + out.token_ids])).logits.logsumexp(-1).sum()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_interrupt_restores_the_training_flags(model):
    def interrupt(module, args, kwargs):
        raise KeyboardInterrupt

    model.train()
    hook = model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        sample(model, PROMPTS, max_new_tokens=4, eos_token_ids=EOS)
    hook.remove()
    assert model.training and all(module.training for module in model.modules())
    model.eval()


def test_progress_counts_completions_and_a_quick_call_shows_no_bar(model, monkeypatch, capsys):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self._time = lambda: self.start_t  # quick, however busy the machine is
            bars.append(self)

    monkeypatch.setattr("lib.sampler.tqdm", Bar)
    sample(
        model, PROMPTS, group_size=2, max_new_tokens=6, eos_token_ids=EOS, max_batch_tokens=90, progress=True
    )
    assert [(bar.n, bar.total) for bar in bars] == [(22, 22)]
    assert "completion" not in capsys.readouterr().err  # a bar in a bar is noise, unless one has to wait


def test_no_prompts(model):
    assert sample(model, [], max_new_tokens=3, eos_token_ids=EOS) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[[9], []]), "prompt 1 has no tokens"),
        (dict(prompts=[[9] * 150], max_new_tokens=11), r"150 tokens \+ max_new_tokens 11 .*160"),
        (dict(max_batch_tokens=4, max_new_tokens=3), "max_batch_tokens 4"),
        (dict(max_new_tokens=0), "max_new_tokens 0"),
        (dict(group_size=0), "group_size 0"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(seeds=[1, 2]), "2 seeds for 1 completions"),
        (dict(seeds=[1], generator=torch.Generator()), "generator"),
    ],
)
def test_bad_input_is_named(model, change, message):
    settings = dict(prompts=[[9, 10]], max_new_tokens=3, eos_token_ids=EOS) | change
    with pytest.raises(ValueError, match=message):
        sample(model, settings.pop("prompts"), **settings)


def test_logits_that_are_not_finite_are_reported():
    model = tiny_model()
    model.model.norm.weight.data.fill_(torch.nan)
    for temperature, top_p in [(1.0, 1.0), (1.0, 0.9), (0.0, 1.0)]:
        with pytest.raises(FloatingPointError, match="not finite"):
            sample(model, PROMPTS, max_new_tokens=3, temperature=temperature, top_p=top_p, eos_token_ids=[])
