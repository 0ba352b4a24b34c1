from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import UserError
from lib.attacks import ATTACKS, gcg
from lib.attacks.core import Budget, Cost
from lib.attacks.suffix import Slot
from lib.attacks.victim import Victim
from lib.chat import encode_prompt
from lib.judges import Judge

WORDS = [f"w{i}" for i in range(200)] + [
    f"a{i}.b{i}" for i in range(40)
]  # the last are split at the dot: no round trip
BUDGET = Budget(gcg_steps=6, gcg_width=24, gcg_top_k=12, gcg_suffix_tokens=5, gcg_init="w7", forged="w40 w41")
BEHAVIOURS = [
    {"id": "a", "prompt": "w1 w2 w3 w4", "target": "w5 w6 w8", "twin": "w1 w2 w50 w4"},
    {"id": "b", "prompt": "w9 w10 w11 w12 w13 w14 w7", "target": "w15 w16", "twin": "w9 w51"},
]


def harmless(prompts, answers):
    return [0.0] * len(answers)


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    parts = [f"{c}{i}" for i in range(40) for c in "ab"]
    words = [*special, "<think>", "</think>", ".", "é", *WORDS, *parts]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
    )
    return tokenizer


def make_model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # padded, as real embeddings are
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,  # large, so that the suffix matters
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def victim_of(model, tokenizer, reasoning=True, harm=harmless) -> Victim:
    return Victim(
        "v", model, tokenizer, reasoning, Judge("j", harm, harmless), max_new_tokens=8, temperature=1.0
    )


def slot_of(model, tokenizer, budget=BUDGET, behaviour=BEHAVIOURS[0], reasoning=True) -> Slot:
    return Slot(victim_of(model, tokenizer, reasoning), behaviour, behaviour["target"], budget)


def attack(
    model,
    tokenizer,
    behaviours=BEHAVIOURS,
    budget=BUDGET,
    seed=0,
    reasoning=True,
    name="gcg",
    harm=harmless,
    attacker=(),
):
    victim, generators = (
        victim_of(model, tokenizer, reasoning, harm),
        [generator(seed + i) for i in range(len(behaviours))],
    )
    return ATTACKS[name].run(victim, list(behaviours), budget, generators, lambda: None, *attacker)


def suffix_of(behaviour, entry) -> str:
    return entry["sent"].removeprefix(behaviour["prompt"]).strip()


def plain_loss(model, tokenizer, behaviour, suffix_text, reasoning) -> float:
    """The definition: one full forward pass over prompt, suffix and target, no cache."""
    prompt = encode_prompt(tokenizer, f"{behaviour['prompt']} {suffix_text}", reasoning=reasoning)
    target = tokenizer.encode(behaviour["target"], add_special_tokens=False)
    logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(target)).item()


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_loss_with_the_cached_prefix_is_the_plain_loss(model, tokenizer, behaviour, reasoning):
    budget = Budget(**{**vars(BUDGET), "max_batch_tokens": 60})  # several micro-batches
    slot = slot_of(model, tokenizer, budget, behaviour, reasoning)
    first = tokenizer.convert_tokens_to_ids("w0")
    candidates = first + torch.randint(200, (9, 5), generator=generator())
    for loss, text in zip(
        slot.losses(candidates).tolist(), tokenizer.batch_decode(candidates.tolist()), strict=True
    ):
        assert loss == pytest.approx(plain_loss(model, tokenizer, behaviour, text, reasoning), abs=1e-4)


def test_target_stands_where_the_reasoning_or_the_answer_begins(model, tokenizer):
    marker = tokenizer.encode("<think>\n", add_special_tokens=False)
    thinker, direct = (slot_of(model, tokenizer, reasoning=r) for r in (True, False))
    assert thinker.rest == direct.rest + marker
    assert thinker.prefix == direct.prefix


def test_gradient_is_that_of_the_one_hot_rows(model, tokenizer):
    """Against autograd on a plain forward pass: d loss / d one-hot = (d loss / d embedding) E^T."""
    behaviour = BEHAVIOURS[0]
    slot = slot_of(model, tokenizer, behaviour=behaviour)
    gradient = slot.gradient(slot.start)
    table = model.get_input_embeddings().weight
    ids = torch.tensor([*slot.prefix, *slot.start.tolist(), *slot.rest, *slot.target.tolist()])
    embeds = table[ids].clone().requires_grad_()
    logits = model(inputs_embeds=embeds[None]).logits[0, -len(slot.target) - 1 : -1]
    by_embedding = torch.autograd.grad(F.cross_entropy(logits, slot.target), embeds)[0]
    begin = len(slot.prefix)
    expected = by_embedding[begin : begin + 5] @ table.T
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_gradient_equals_finite_differences(model, tokenizer):
    slot = slot_of(model, tokenizer, reasoning=False)
    gradient, table, step = slot.gradient(slot.start), model.get_input_embeddings().weight, 3e-3
    ids = torch.tensor([*slot.prefix, *slot.start.tolist(), *slot.rest, *slot.target.tolist()])
    for position, token in ((0, 30), (2, 100), (4, 7)):
        losses = []
        for sign in (1, -1):
            embeds = table[ids].clone()
            embeds[len(slot.prefix) + position] += sign * step * table[token]
            logits = model(inputs_embeds=embeds[None]).logits[0, -len(slot.target) - 1 : -1]
            losses.append(F.cross_entropy(logits, slot.target).item())
        assert gradient[position, token].item() == pytest.approx(
            (losses[0] - losses[1]) / (2 * step), rel=1e-2, abs=2e-3
        )


def test_search_lowers_the_loss_and_beats_random_search_at_the_same_number_of_queries(
    model, tokenizer, monkeypatch
):
    found = attack(model, tokenizer)
    monkeypatch.setattr(
        Slot, "gradient", lambda self, suffix: torch.randn(len(suffix), model.config.vocab_size)
    )
    torch.manual_seed(1)
    blind = attack(model, tokenizer)
    for attempt in found:
        assert attempt.trace[-1]["loss"] < attempt.trace[0]["loss"] - 0.1
    assert sum(a.trace[-1]["loss"] for a in found) < sum(a.trace[-1]["loss"] for a in blind) - 0.1


def test_trace_holds_the_best_text_after_each_step_with_its_true_loss(model, tokenizer):
    for attempt, behaviour in zip(
        attack(model, tokenizer),
        BEHAVIOURS,
        strict=True,
    ):
        losses = [point["loss"] for point in attempt.trace]
        assert [point["step"] for point in attempt.trace] == list(range(BUDGET.gcg_steps + 1))
        assert losses == sorted(losses, reverse=True)
        assert suffix_of(behaviour, attempt.trace[0]) == "w7 w7 w7 w7 w7"
        for point in attempt.trace:  # of the text, not of ids that no text gives
            assert point["loss"] == pytest.approx(
                plain_loss(model, tokenizer, behaviour, suffix_of(behaviour, point), True), abs=1e-4
            )


def test_candidates_that_do_not_survive_the_round_trip_are_dropped_and_counted(model, tokenizer):
    survivor, split = (tokenizer.convert_tokens_to_ids(w) for w in ("w3", "a5.b5"))
    candidates = torch.tensor([[survivor] * 5, [survivor] * 4 + [split]])
    kept, texts = slot_of(model, tokenizer).surviving(candidates)
    assert kept.tolist() == [[survivor] * 5] and texts == ["w3 w3 w3 w3 w3"]
    attempt = attack(model, tokenizer, BEHAVIOURS[:1])[0]
    assert attempt.cost["did_not_survive"] > 0
    assert not any("." in point["sent"] for point in attempt.trace)


def test_special_added_and_non_ascii_tokens_and_padding_rows_are_no_candidates(model, tokenizer):
    allowed = slot_of(model, tokenizer).allowed()
    assert len(allowed) == model.config.vocab_size and not allowed[len(tokenizer) :].any()
    for word in ("<pad>", "<|end|>", "<|user|>", "<think>", "</think>", "é"):
        assert not allowed[tokenizer.convert_tokens_to_ids(word)], word
    assert allowed[tokenizer.convert_tokens_to_ids("w5")]
    banned = Budget(**{**vars(BUDGET), "gcg_ban_target": True})
    assert not slot_of(model, tokenizer, banned).allowed()[tokenizer.convert_tokens_to_ids("w5")]


def test_proposals_are_distinct_single_swaps_among_the_best_allowed_tokens(model, tokenizer):
    gradient = torch.randn(3, 50, generator=generator())
    allowed = torch.ones(50, dtype=torch.bool)
    allowed[10:20] = False
    suffix = torch.tensor([1, 2, 3])
    budget = Budget(gcg_steps=1, gcg_width=1000, gcg_top_k=4, gcg_suffix_tokens=3, gcg_init="x")
    candidates = gcg.propose(gradient, suffix, allowed, budget, generator())
    assert (
        len(candidates) == 12 == len(set(map(tuple, candidates.tolist())))
    )  # all there are: 3 positions x top 4
    assert ((candidates != suffix).sum(1) == 1).all()
    for position in range(3):
        tokens = [i for i in gradient[position].argsort().tolist() if allowed[i] and i != suffix[position]][
            :4
        ]
        swapped = {int(c[position]) for c in candidates if c[position] != suffix[position]}
        assert swapped == set(tokens)


def test_seed_decides(model, tokenizer):
    traces = [attack(model, tokenizer, seed=seed)[1].trace for seed in (3, 3, 4)]
    assert traces[0] == traces[1] != traces[2]


def test_random_suffix_has_equal_length_and_survives(model, tokenizer):
    attempts = attack(model, tokenizer, name="random_suffix")
    for attempt, behaviour in zip(attempts, BEHAVIOURS, strict=True):
        text = suffix_of(behaviour, attempt.trace[0])
        ids = tokenizer.encode(text)
        assert len(ids) == 5
        assert slot_of(model, tokenizer).surviving(torch.tensor([ids]))[1] == [text]
        loss = plain_loss(model, tokenizer, behaviour, text, True)
        assert attempt.trace[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert suffix_of(BEHAVIOURS[0], attempts[0].trace[0]) != suffix_of(BEHAVIOURS[1], attempts[1].trace[0])


def test_cost_counts_queries_and_tokens(model, tokenizer):
    attempt = attack(model, tokenizer, BEHAVIOURS[:1])[0]
    # the prefix, the initial loss, and in each step a gradient and the candidates that survive
    assert (
        attempt.cost["queries"]
        == 2 + BUDGET.gcg_steps * (1 + BUDGET.gcg_width) - attempt.cost["did_not_survive"]
    )
    assert attempt.cost["backward_tokens"] > 0 and attempt.cost["forward_tokens"] > attempt.cost["queries"]


@pytest.mark.parametrize("target", [None, "", "   "])
def test_missing_target_is_a_user_error(model, tokenizer, target):
    with pytest.raises(UserError, match="behaviour x: attacks need a target"):
        attack(model, tokenizer, [{"id": "x", "prompt": "w1", "target": target}])


def test_init_must_be_one_token(model, tokenizer):
    with pytest.raises(UserError, match="--gcg-init"):
        attack(model, tokenizer, budget=Budget(**{**vars(BUDGET), "gcg_init": "w1 w2"}))


def test_out_of_memory_halves_the_candidates_says_so_and_changes_nothing(
    model, tokenizer, monkeypatch, capsys
):
    expected = attack(model, tokenizer)
    compute = Slot._losses

    def small(self, suffixes):
        if len(suffixes) > 5:
            raise torch.OutOfMemoryError
        return compute(self, suffixes)

    monkeypatch.setattr(Slot, "_losses", small)
    found = attack(model, tokenizer)
    for a, b in zip(found, expected, strict=True):
        assert [t["sent"] for t in a.trace] == [t["sent"] for t in b.trace]
    assert "out of memory with 24 candidates at a time: from now on 12" in capsys.readouterr().out


# ---- variants ----------------------------------------------------------------------------------------------


def test_adaptive_targets_stand_behind_a_reasoning(model, tokenizer):
    behaviour, close = BEHAVIOURS[0], "</think>"
    targets = {
        name: make(victim_of(model, tokenizer), behaviour, BUDGET, generator(), Cost())
        for name, make in gcg.TARGETS.items()
    }
    assert targets["gcg"] == "w5 w6 w8"
    assert targets["gcg_close"].split() == [close, "w5", "w6", "w8"]
    assert targets["gcg_forged"].split() == ["w40", "w41", close, "w5", "w6", "w8"]
    assert targets["gcg_twin"].split()[-4:] == [close, "w5", "w6", "w8"]


def test_the_twins_target_is_the_models_own_compliant_reasoning(model, tokenizer, monkeypatch):
    def answers(self, behaviours, sent, openings, seeds):
        assert set(sent) == {"w1 w2 w50 w4"} and {b["prompt"] for b in behaviours} == {"w1 w2 w50 w4"}
        refused = {
            "reasoning": "no",
            "well_formed": True,
            "refusal": "full",
            "tokens": 3,
            "finish_reason": "eos",
        }
        return [refused] * 3 + [{**refused, "refusal": "none", "reasoning": "w60 w61"}] * (len(sent) - 3)

    monkeypatch.setattr(Victim, "ask", answers)
    cost = Cost()
    assert gcg.twin_target(victim_of(model, tokenizer), BEHAVIOURS[0], BUDGET, generator(), cost).split()[
        :3
    ] == [
        "w60",
        "w61",
        "</think>",
    ]


@pytest.mark.parametrize("name", ["gcg", "gcg_close", "gcg_forged", "gcg_universal", "random_suffix"])
def test_a_search_asks_no_judge_and_makes_all_its_steps(model, tokenizer, name, monkeypatch):
    """However much harm the answers would do: what a suffix achieves is asked by chapter 4, once at each budget."""
    asked, gradients, gradient = [], [], Slot.gradient
    monkeypatch.setattr(
        Slot, "gradient", lambda self, suffix: gradients.append(self.id) or gradient(self, suffix)
    )
    monkeypatch.setattr(Victim, "ask", lambda self, *given, **options: asked.append(given))
    attempts = attack(model, tokenizer, name=name, harm=lambda prompts, answers: asked.append(answers))
    steps = 0 if name == "random_suffix" else BUDGET.gcg_steps
    assert not asked and sorted(gradients) == sorted("ab" * steps)
    assert [[t["step"] for t in attempt.trace] for attempt in attempts] == [list(range(steps + 1))] * 2


def test_the_ban_is_on_the_answer_not_on_the_reasoning_before_it(model, tokenizer):
    budget = Budget(**{**vars(BUDGET), "gcg_ban_target": True})
    allowed = Slot(victim_of(model, tokenizer), BEHAVIOURS[0], "w40 </think> w5 w6 w8", budget).allowed()
    assert (
        not allowed[tokenizer.convert_tokens_to_ids("w5")] and allowed[tokenizer.convert_tokens_to_ids("w40")]
    )


def test_with_a_buffer_the_search_goes_on_from_the_best(model, tokenizer):
    """With a buffer of one, the search never moves to a worse suffix, so the gradient is always taken at the best one."""
    budget = Budget(**{**vars(BUDGET), "gcg_buffer": 1, "gcg_width": 4, "gcg_steps": 12})
    seen, gradient = [], Slot.gradient
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            Slot, "gradient", lambda self, suffix: seen.append(suffix.tolist()) or gradient(self, suffix)
        )
        trace = attack(model, tokenizer, BEHAVIOURS[:1], budget)[0].trace
    best = [tokenizer.encode(suffix_of(BEHAVIOURS[0], point)) for point in trace[:-1]]
    assert seen == best


def test_universal_suffix_lowers_the_mean_loss_and_goes_to_all(model, tokenizer):
    third = {"id": "c", "prompt": "w20 w21", "target": "w5 w6"}
    budget = Budget(**{**vars(BUDGET), "universal_behaviours": 2})
    attempts = attack(model, tokenizer, [*BEHAVIOURS, third], budget, name="gcg_universal")
    suffixes = {suffix_of(b, a.trace[-1]) for a, b in zip(attempts, [*BEHAVIOURS, third], strict=True)}
    assert len(suffixes) == 1
    mean = [
        sum(plain_loss(model, tokenizer, b, suffix_of(BEHAVIOURS[0], t), True) for b in BEHAVIOURS) / 2
        for t in attempts[0].trace
    ]
    assert [t["loss"] for t in attempts[0].trace] == pytest.approx(mean, abs=1e-4)
    assert mean[-1] < mean[0] - 0.1 and attempts[2].cost["queries"] == 0
