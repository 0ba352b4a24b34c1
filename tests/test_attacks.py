"""GCG of chapter 4 and its variants, and the model under attack."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.attacks import ATTACKS, NOT_ASKED, Attempt, Budget, Slot, Victim, gcg, surviving
from lib.attacks.core import ask_all
from lib.chat import encode_prompt
from lib.judges import Judge

stage = importlib.import_module("04_attack_eval")
SPLIT = [f"a{i}.b{i}" for i in range(40)]  # split at the dot when they are read again: no round trip
WORDS = [*(f"w{i}" for i in range(200)), *SPLIT, "please"]
BUDGET = Budget(gcg_steps=6, gcg_width=24, gcg_top_k=12, gcg_suffix_tokens=5, gcg_init="w7", forged="w40 w41")
BEHAVIOURS = [
    {"id": "a", "prompt": "w1 w2 w3 w4", "target": "w5 w6 w8", "prefill": "w5", "twin": "w1 w2 w50 w4"},
    {"id": "b", "prompt": "w9 w10 w11 w12 w13 w14 w7", "target": "w15 w16", "prefill": "w90"},
]


def harmless(prompts, answers):
    return [0.0] * len(answers)


def make_tokenizer(unknown: str | None = "<unk>") -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    parts = [f"{c}{i}" for i in range(40) for c in "ab"]
    words = [*special, "<think>", "</think>", ".", "é", *WORDS, *parts]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown or "<none>"))
    core.pre_tokenizer = Whitespace()
    core.add_tokens(["<think>", "</think>"])
    names = {"pad_token": "<pad>", "eos_token": "<|end|>", "additional_special_tokens": special[3:]}
    names |= {"unk_token": unknown} if unknown else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
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


def victim_of(model, tokenizer, reasoning=True, harm=harmless, **limits) -> Victim:
    limits = {"max_new_tokens": 8, "temperature": 1.0, **limits}
    return Victim("v", model, tokenizer, reasoning, Judge("j", harm, harmless), **limits)


def slot_of(model, tokenizer, budget=BUDGET, behaviour=BEHAVIOURS[0], reasoning=True) -> Slot:
    return Slot(victim_of(model, tokenizer, reasoning), Attempt(behaviour), behaviour["target"], budget)


def attack(
    model, tokenizer, behaviours=BEHAVIOURS, budget=BUDGET, seed=0, reasoning=True, name="gcg", **more
) -> list[Attempt]:
    victim = victim_of(model, tokenizer, reasoning, more.get("harm", harmless))
    attempts = [Attempt(behaviour, generator(seed + i)) for i, behaviour in enumerate(behaviours)]
    ATTACKS[name].run(victim, attempts, budget, more.get("attacker", stage.search))
    return attempts


def suffix_of(behaviour, entry) -> str:
    return entry["sent"].removeprefix(behaviour["prompt"]).strip()


def plain_loss(model, tokenizer, behaviour, suffix_text, reasoning) -> float:
    """The definition: one full forward pass over prompt, suffix and target, no cache."""
    prompt = encode_prompt(tokenizer, f"{behaviour['prompt']} {suffix_text}", reasoning=reasoning)
    target = tokenizer.encode(behaviour["target"], add_special_tokens=False)
    logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(target)).item()


# ---- loss, gradient, proposals -----------------------------------------------------------------------------


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_losses_of_candidates_are_those_of_plain_passes_one_by_one(model, tokenizer, behaviour, reasoning):
    slot = slot_of(model, tokenizer, replace(BUDGET, max_batch_tokens=60), behaviour, reasoning)  # in parts
    candidates = tokenizer.convert_tokens_to_ids("w0") + torch.randint(200, (9, 5), generator=generator())
    texts = tokenizer.batch_decode(candidates.tolist())
    for loss, text in zip(stage.losses(slot, candidates).tolist(), texts, strict=True):
        assert loss == pytest.approx(plain_loss(model, tokenizer, behaviour, text, reasoning), abs=1e-4)


def test_gradient_is_that_of_a_plain_pass(model, tokenizer):
    """Of finite differences, too: tests/course."""
    slot, table = slot_of(model, tokenizer), model.get_input_embeddings().weight
    ids = torch.tensor([*slot.prefix, *slot.start.tolist(), *slot.rest, *slot.target.tolist()])
    embeds = table[ids].clone().requires_grad_()
    logits = model(inputs_embeds=embeds[None]).logits[0, -len(slot.target) - 1 : -1]
    slope = torch.autograd.grad(F.cross_entropy(logits, slot.target), embeds)[0]
    expected = slope[len(slot.prefix) :][:5] @ table.T
    torch.testing.assert_close(stage.gradient(slot, slot.start), expected, atol=1e-5, rtol=1e-4)


def test_special_added_and_non_ascii_tokens_and_padding_rows_are_no_candidates(model, tokenizer):
    allowed = slot_of(model, tokenizer).allowed()
    assert len(allowed) == model.config.vocab_size and not allowed[len(tokenizer) :].any()
    for word in ("<pad>", "<|end|>", "<|user|>", "<think>", "</think>", "é"):
        assert not allowed[tokenizer.convert_tokens_to_ids(word)], word
    assert allowed[tokenizer.convert_tokens_to_ids("w5")]
    ban = replace(BUDGET, gcg_ban_target=True)  # of the answer, not of the reasoning before it
    behind = "w40 </think> w5 w6 w8"
    allowed = Slot(victim_of(model, tokenizer), Attempt(BEHAVIOURS[0]), behind, ban).allowed()
    assert [bool(allowed[tokenizer.convert_tokens_to_ids(word)]) for word in ("w5", "w40")] == [False, True]


# ---- the search --------------------------------------------------------------------------------------------


def test_the_trace_holds_the_best_text_so_far_with_its_true_loss_and_beats_a_blind_search(
    model, tokenizer, monkeypatch
):
    found = attack(model, tokenizer)
    for attempt, behaviour in zip(found, BEHAVIOURS, strict=True):
        losses = [point["loss"] for point in attempt.trace]
        assert [point["step"] for point in attempt.trace] == list(range(BUDGET.gcg_steps + 1))
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
        assert suffix_of(behaviour, attempt.trace[0]) == "w7 w7 w7 w7 w7"
        for point in attempt.trace:  # of the text, not of ids that no text gives
            true = plain_loss(model, tokenizer, behaviour, suffix_of(behaviour, point), True)
            assert point["loss"] == pytest.approx(true, abs=1e-4)
    traces = [attack(model, tokenizer, seed=seed)[1].trace for seed in (3, 3, 4)]
    assert traces[0] == traces[1] != traces[2]  # the seed decides
    monkeypatch.setattr(stage, "gradient", lambda slot, suffix: torch.randn(len(suffix), len(tokenizer) + 3))
    torch.manual_seed(1)
    blind = attack(model, tokenizer)
    assert sum(a.trace[-1]["loss"] for a in found) < sum(a.trace[-1]["loss"] for a in blind) - 0.1


@pytest.mark.parametrize("word, template", [("a5.b5", None), ("w33", "w33")])
def test_no_suffix_is_kept_whose_text_is_read_as_other_tokens(word, template, model, monkeypatch):
    """Neither by the tokenizer alone, nor through a chat template that rewrites a word, however good."""
    tokenizer = make_tokenizer()
    if template:
        rewritten = f"m['content'] | replace('{template}', 'w34')"
        tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", rewritten)
    token = tokenizer.convert_tokens_to_ids(word)

    def tempting(slot, suffix):
        return torch.zeros(len(suffix), len(tokenizer) + 3).index_fill_(1, torch.tensor(token), -1.0)

    monkeypatch.setattr(stage, "gradient", tempting)
    monkeypatch.setattr(stage, "losses", lambda slot, rows: -(rows == token).sum(1) - rows[:, 0] / 1000)
    budget = replace(BUDGET, gcg_width=1000)
    attempt = attack(model, tokenizer, BEHAVIOURS[:1], budget)[0]
    assert attempt.cost["did_not_survive"] >= 5 * BUDGET.gcg_steps
    assert attempt.trace[-1]["loss"] < attempt.trace[0]["loss"]
    assert not any(word in point["sent"] for point in attempt.trace)


def test_cost_counts_queries_and_tokens(model, tokenizer):
    attempt = attack(model, tokenizer, BEHAVIOURS[:1])[0]
    slot, cost = slot_of(model, tokenizer), attempt.cost
    # the prefix, the initial loss, and in each step a gradient and the candidates that survive
    rows = 1 + BUDGET.gcg_steps * (1 + BUDGET.gcg_width) - cost["did_not_survive"]
    length = BUDGET.gcg_suffix_tokens + len(slot.tail)
    assert cost["queries"] == 1 + rows and cost["forward_tokens"] == len(slot.prefix) + rows * length
    assert cost["backward_tokens"] == BUDGET.gcg_steps * length


def test_the_search_goes_on_from_the_best_candidate_even_if_it_is_worse(model, tokenizer, monkeypatch):
    budget, seen, gradient = replace(BUDGET, gcg_width=4, gcg_steps=12), [], stage.gradient
    watched = lambda slot, suffix: seen.append(suffix.tolist()) or gradient(slot, suffix)  # noqa: E731
    monkeypatch.setattr(stage, "gradient", watched)
    trace = attack(model, tokenizer, BEHAVIOURS[:1], budget)[0].trace
    best = [tokenizer.encode(suffix_of(BEHAVIOURS[0], point)) for point in trace[:-1]]
    assert len(seen) == len(best) and seen != best


# ---- variants, and the control -----------------------------------------------------------------------------


def test_random_suffix_has_equal_length_and_survives(model, tokenizer):
    attempts = attack(model, tokenizer, name="random_suffix")
    texts = [suffix_of(b, a.trace[0]) for a, b in zip(attempts, BEHAVIOURS, strict=True)]
    assert texts[0] != texts[1]
    for attempt, behaviour, text in zip(attempts, BEHAVIOURS, texts, strict=True):
        ids, slot = tokenizer.encode(text), slot_of(model, tokenizer, behaviour=behaviour)
        assert len(ids) == 5 and surviving([slot], torch.tensor([ids]))[1] == [text]
        loss = plain_loss(model, tokenizer, behaviour, text, True)
        assert [point["loss"] for point in attempt.trace] == [pytest.approx(loss, abs=1e-4)]


def test_adaptive_targets_stand_behind_a_reasoning_the_twins_behind_the_models_own(
    model, tokenizer, monkeypatch
):
    def answers(self, tries, seeds):
        assert {(b["prompt"], new["sent"]) for b, new in tries} == {("w1 w2 w50 w4",) * 2}
        assert len({*seeds}) == len(seeds)
        own = {"reasoning": "w60 w61", "well_formed": True, "refusal": "none"}
        own |= {"tokens": 3, "finish_reason": "eos"}
        wrong = [{"refusal": "full"}, {"well_formed": False, "reasoning": "w70"}, {"reasoning": ""}]
        return [own | change for change in wrong + [{}] * (len(tries) - 3)]

    given = victim_of(model, tokenizer), Attempt(BEHAVIOURS[0], generator()), BUDGET
    forged = ["w40", "w41", "</think>", "w5", "w6", "w8"]
    assert gcg.aim("gcg_twin", *given).split()[-4:] == forged[-4:]
    monkeypatch.setattr(Victim, "ask", answers)
    found = {name: gcg.aim(name, *given).split() for name in ("gcg", "gcg_close", "gcg_forged", "gcg_twin")}
    assert [found[name] for name in ("gcg", "gcg_close", "gcg_forged")] == [forged[3:], forged[2:], forged]
    assert found["gcg_twin"] == ["w60", "w61", *forged[2:]] and given[1].trace == []


def test_universal_suffix_lowers_the_mean_loss_and_goes_to_all(model, tokenizer, monkeypatch):
    behaviours = [*BEHAVIOURS, {"id": "c", "prompt": "w20 w21", "target": "w5 w6"}]
    budget = replace(BUDGET, universal_behaviours=2)
    attempts = attack(model, tokenizer, behaviours, budget, name="gcg_universal")
    assert len({suffix_of(b, a.trace[-1]) for a, b in zip(attempts, behaviours, strict=True)}) == 1
    for point in attempts[0].trace:
        suffix = suffix_of(BEHAVIOURS[0], point)
        losses = [plain_loss(model, tokenizer, b, suffix, True) for b in BEHAVIOURS]
        assert point["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert attempts[0].trace[-1]["loss"] < attempts[0].trace[0]["loss"] - 0.1
    assert attempts[1].cost["queries"] > attempts[2].cost["queries"] == 0
    gradient = stage.gradient  # each request counts alike, however steep its loss

    def steep(slot, suffix):
        return gradient(slot, suffix) * (1000 if slot.prompt[:2] == "w1" else 1)

    monkeypatch.setattr(stage, "gradient", steep)
    assert attack(model, tokenizer, behaviours, budget, name="gcg_universal")[0].trace == attempts[0].trace


# ---- the model under attack --------------------------------------------------------------------------------

LONG = " ".join(["w3"] * 126)  # of a context of 128 tokens


def test_a_victim_answers_what_it_can_read_and_the_judge_sees_nothing_else(model):
    told, tokenizer = [], make_tokenizer(unknown=None)
    judge = lambda *asked: told.append(asked) or [0.5] * len(asked[0])  # noqa: E731
    victim, texts = victim_of(model, tokenizer, harm=judge), ["w1 w2", LONG, "w3", "Hello"]
    attempt, tries = Attempt({"prompt": "w9"}, generator()), [{"sent": t, "opening": ""} for t in texts]
    ask_all(victim, [(attempt, new) for new in tries])
    answers = [new["completion"] for new in attempt.trace]
    assert [a["finish_reason"] == NOT_ASKED for a in answers] == [False, True, False, True]
    assert told == [(["w9", "w9"], [answers[0]["answer"], answers[2]["answer"]])]
    assert attempt.cost["queries"] == 2 and answers[1]["harm"] is None and {*answers[1]} == {*answers[0]}
    attempt.written(victim, ["w1 w2", "Hello w1", ""])  # by an attacker
    assert (attempt.cost["attacker_tokens"], attempt.cost["empty"]) == (2, 2)
    for rows, behind, fits in ((120, 0, True), (121, 0, False), (100, 28, True), (100, 29, False)):
        assert victim.fits(range(rows), behind) == fits  # within 128, with 8 to write
    victim.ask([({"prompt": "w1", "context": "w5"}, tries[0]), ({"prompt": "w2"}, tries[2])], [0, 1])
    assert told[-1][2:] == (["w5", ""],), "what a behaviour is about"


def test_an_answer_depends_on_its_seed_alone(model, tokenizer):
    tries = [({"prompt": "w"}, {"sent": text, "opening": ""}) for text in ("w1 w2", "w3", "w1 " * 8)]
    together = victim_of(model, tokenizer).ask(tries, [1, 2, 3])
    small = victim_of(model, tokenizer, max_batch_tokens=20)  # the longest exceeds it, and goes alone
    assert [small.ask([tries[i]], [i + 1])[0] for i in range(3)] == together
