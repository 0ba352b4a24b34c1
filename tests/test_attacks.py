"""All attacks on a tiny model: GCG of chapter 4 and its variants, attacks that ask, AutoDAN; and a chat model
that writes words for them. The sandbox's own attacker: test_world.py; rainbow teaming: test_rainbow.py."""

from __future__ import annotations

import importlib
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import UserError
from lib.attacks import ATTACKS, NOT_ASKED, Attempt, Budget, Slot, Victim, attacker, autodan, gcg
from lib.attacks.attacker import Conversation, LanguageModelAttacker, parse_reply
from lib.attacks.autodan import Individual
from lib.attacks.core import ask_all
from lib.chat import THINK_CLOSE, encode_chat, encode_prompt
from lib.judges import Judge
from lib.run import writing
from lib.sampler import Completion, draw_seeds

stage = importlib.import_module("04_attack_eval")
SPLIT = [f"a{i}.b{i}" for i in range(40)]  # split at the dot when they are read again: no round trip
WORDS = [*(f"w{i}" for i in range(200)), *SPLIT, "please"]
BUDGET = Budget(gcg_steps=6, gcg_width=24, gcg_top_k=12, gcg_suffix_tokens=5, gcg_init="w7", forged="w40 w41")
BUDGET = replace(BUDGET, samples=5, techniques=3, streams=2, depth=3, population=8, generations=4)
BEHAVIOURS = [
    {"id": "a", "prompt": "w1 w2 w3 w4", "target": "w5 w6 w8", "prefill": "w5", "twin": "w1 w2 w50 w4"},
    {"id": "b", "prompt": "w9 w10 w11 w12 w13 w14 w7", "target": "w15 w16", "prefill": "w90"},
]
LONG = " ".join(["w3"] * 126)  # of a context of 128 tokens


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
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 128, "tie_word_embeddings": True}
    sizes |= {"vocab_size": len(tokenizer) + 3}  # padded, as real embeddings are
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**sizes, **ids, initializer_range=0.3)  # large, so that the suffix matters
    return LlamaForCausalLM(config).eval().requires_grad_(False)


TOKENIZER = make_tokenizer()
MODEL = make_model(TOKENIZER)


def id_of(word: str) -> int:
    return TOKENIZER.convert_tokens_to_ids(word)


def harmless(prompts, answers):
    return [0.0] * len(answers)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def victim_of(tokenizer=TOKENIZER, reasoning=True, harm=harmless, **limits) -> Victim:
    limits = {"max_new_tokens": 8, "temperature": 1.0, **limits}
    return Victim("v", MODEL, tokenizer, reasoning, Judge("j", harm, harmless), **limits)


def slot_of(behaviour=BEHAVIOURS[0], budget=BUDGET, **victim) -> Slot:
    return Slot(victim_of(**victim), Attempt(behaviour), behaviour["target"], budget)


def attack(name="gcg", behaviours=BEHAVIOURS, budget=BUDGET, helper=stage.search, seed=0, **victim):
    attempts = [Attempt(behaviour, generator(seed + i)) for i, behaviour in enumerate(behaviours)]
    ATTACKS[name].run(victim_of(**victim), attempts, budget, helper)
    return attempts


def suffix_of(behaviour, entry) -> str:
    return entry["sent"].removeprefix(behaviour["prompt"]).strip()


def plain_loss(sent: str, target: str, reasoning: bool = True) -> float:
    """The definition: one full forward pass over prompt and target, no cache."""
    prompt, target = encode_prompt(TOKENIZER, sent, reasoning=reasoning), TOKENIZER.encode(target)
    logits = MODEL(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(target)).item()


# ---- GCG: loss, gradient, proposals ------------------------------------------------------------------------


@pytest.mark.parametrize("reasoning", [True, False])
def test_losses_and_gradient_are_those_of_plain_passes(reasoning):
    behaviour, table = BEHAVIOURS[1], MODEL.get_input_embeddings().weight
    slot = slot_of(behaviour, replace(BUDGET, max_batch_tokens=60), reasoning=reasoning)  # in parts
    candidates = id_of("w0") + torch.randint(200, (9, 5), generator=generator())
    texts = [f"{behaviour['prompt']} {text}" for text in TOKENIZER.batch_decode(candidates)]
    plain = [plain_loss(text, behaviour["target"], reasoning) for text in texts]
    assert stage.losses(slot, candidates).tolist() == pytest.approx(plain, abs=1e-4)
    ids = torch.tensor([*slot.prefix, *slot.start.tolist(), *slot.rest, *slot.target.tolist()])
    embeds = table[ids].clone().requires_grad_()
    logits = MODEL(inputs_embeds=embeds[None]).logits[0, -len(slot.target) - 1 : -1]
    slope = torch.autograd.grad(F.cross_entropy(logits, slot.target), embeds)[0]
    expected = slope[len(slot.prefix) :][:5] @ table.T
    torch.testing.assert_close(stage.gradient(slot, slot.start), expected, atol=1e-5, rtol=1e-4)


def test_special_added_and_non_ascii_tokens_and_padding_rows_are_no_candidates():
    ban = replace(BUDGET, gcg_ban_target=True)  # of the answer, not of the reasoning before it
    allowed = Slot(victim_of(), Attempt(BEHAVIOURS[0]), "w40 </think> w5 w6 w8", ban).allowed()
    assert len(allowed) == MODEL.config.vocab_size and not allowed[len(TOKENIZER) :].any()
    for word in ("<pad>", "<|end|>", "<|user|>", "<think>", "</think>", "é", "w5"):
        assert not allowed[id_of(word)], word
    assert allowed[id_of("w40")] and slot_of().allowed()[id_of("w5")]


# ---- the search --------------------------------------------------------------------------------------------


def test_the_trace_holds_the_best_text_so_far_with_its_true_loss_and_beats_a_blind_search(monkeypatch):
    found = attack()
    for attempt, behaviour in zip(found, BEHAVIOURS, strict=True):
        losses = [point["loss"] for point in attempt.trace]
        assert [point["step"] for point in attempt.trace] == list(range(BUDGET.gcg_steps + 1))
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
        assert suffix_of(behaviour, attempt.trace[0]) == "w7 w7 w7 w7 w7"
        for point in attempt.trace:  # of the text, not of ids that no text gives
            assert point["loss"] == pytest.approx(plain_loss(point["sent"], behaviour["target"]), abs=1e-4)
    monkeypatch.setattr(stage, "gradient", lambda slot, suffix: torch.randn(len(suffix), len(TOKENIZER) + 3))
    torch.manual_seed(1)
    assert sum(a.trace[-1]["loss"] for a in found) < sum(a.trace[-1]["loss"] for a in attack()) - 0.1


@pytest.mark.parametrize("word, template", [("a5.b5", None), ("w33", "w33")])
def test_no_suffix_is_kept_whose_text_is_read_as_other_tokens(word, template, monkeypatch):
    """Neither by the tokenizer alone, nor through a chat template that rewrites a word, however good."""
    tokenizer = make_tokenizer()
    if template:
        rewritten = f"m['content'] | replace('{template}', 'w34')"
        tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", rewritten)
    token = id_of(word)

    def tempting(slot, suffix):
        return torch.zeros(len(suffix), len(tokenizer) + 3).index_fill_(1, torch.tensor(token), -1.0)

    monkeypatch.setattr(stage, "gradient", tempting)
    monkeypatch.setattr(stage, "losses", lambda slot, rows: -(rows == token).sum(1) - rows[:, 0] / 1000)
    (attempt,) = attack("gcg", BEHAVIOURS[:1], replace(BUDGET, gcg_width=1000), tokenizer=tokenizer)
    assert attempt.cost["did_not_survive"] >= 5 * BUDGET.gcg_steps
    assert attempt.trace[-1]["loss"] < attempt.trace[0]["loss"]
    assert not any(word in point["sent"] for point in attempt.trace)


def test_it_goes_on_from_the_best_candidate_even_if_worse_and_counts_queries_and_tokens(monkeypatch):
    budget, seen, gradient = replace(BUDGET, gcg_width=4, gcg_steps=12), [], stage.gradient
    watched = lambda slot, suffix: seen.append(suffix.tolist()) or gradient(slot, suffix)  # noqa: E731
    monkeypatch.setattr(stage, "gradient", watched)
    (attempt,) = attack("gcg", BEHAVIOURS[:1], budget)
    best = [TOKENIZER.encode(suffix_of(BEHAVIOURS[0], point)) for point in attempt.trace[:-1]]
    assert len(seen) == len(best) and seen != best
    # the prefix, the initial loss, and in each step a gradient and the candidates that survive
    slot, cost, rows = slot_of(), attempt.cost, 1 + 12 * (1 + 4) - attempt.cost["did_not_survive"]
    length = BUDGET.gcg_suffix_tokens + len(slot.tail)
    assert cost["queries"] == 1 + rows and cost["forward_tokens"] == len(slot.prefix) + rows * length
    assert cost["backward_tokens"] == 12 * length


# ---- variants, and the control -----------------------------------------------------------------------------


def test_random_suffix_has_equal_length_and_survives():
    for attempt, behaviour in zip(attack("random_suffix"), BEHAVIOURS, strict=True):
        (point,) = attempt.trace
        ids = TOKENIZER.encode(suffix_of(behaviour, point))
        assert len(ids) == 5 and len({*ids}) > 2
        assert point["loss"] == pytest.approx(plain_loss(point["sent"], behaviour["target"]), abs=1e-4)


def test_adaptive_targets_stand_behind_a_reasoning_the_twins_behind_the_models_own(monkeypatch):
    def answers(self, tries, seeds):
        assert {(b["prompt"], new["sent"]) for b, new in tries} == {("w1 w2 w50 w4",) * 2}
        assert len({*seeds}) == len(seeds)
        own = {"reasoning": "w60 w61", "well_formed": True, "refusal": "none"}
        own |= {"tokens": 3, "finish_reason": "eos"}
        wrong = [{"refusal": "full"}, {"well_formed": False, "reasoning": "w70"}, {"reasoning": ""}]
        return [own | change for change in wrong + [{}] * (len(tries) - 3)]

    given = victim_of(), Attempt(BEHAVIOURS[0], generator()), BUDGET
    forged = ["w40", "w41", "</think>", "w5", "w6", "w8"]
    assert gcg.aim("gcg_twin", *given).split()[-4:] == forged[-4:]
    monkeypatch.setattr(Victim, "ask", answers)
    found = {name: gcg.aim(name, *given).split() for name in ("gcg", "gcg_close", "gcg_forged", "gcg_twin")}
    assert [found[name] for name in ("gcg", "gcg_close", "gcg_forged")] == [forged[3:], forged[2:], forged]
    assert found["gcg_twin"] == ["w60", "w61", *forged[2:]] and given[1].trace == []


def test_universal_suffix_lowers_the_mean_loss_and_goes_to_all(monkeypatch):
    behaviours = [*BEHAVIOURS, {"id": "c", "prompt": "w20 w21", "target": "w5 w6"}]
    budget = replace(BUDGET, universal_behaviours=2)
    attempts = attack("gcg_universal", behaviours, budget)
    assert len({suffix_of(b, a.trace[-1]) for a, b in zip(attempts, behaviours, strict=True)}) == 1
    for points in zip(attempts[0].trace, attempts[1].trace, strict=True):
        losses = [plain_loss(p["sent"], b["target"]) for p, b in zip(points, BEHAVIOURS, strict=True)]
        assert points[0]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert attempts[0].trace[-1]["loss"] < attempts[0].trace[0]["loss"] - 0.1
    assert attempts[1].cost["queries"] > attempts[2].cost["queries"] == 0
    gradient, steep = stage.gradient, {"w1 w2 w3 w4": 1000}  # each request counts alike
    monkeypatch.setattr(stage, "gradient", lambda slot, s: gradient(slot, s) * steep.get(slot.prompt, 1))
    assert attack("gcg_universal", behaviours, budget)[0].trace == attempts[0].trace


# ---- the model under attack --------------------------------------------------------------------------------


def test_a_victim_answers_what_it_can_read_and_the_judge_sees_nothing_else():
    told, tokenizer = [], make_tokenizer(unknown=None)
    judge = lambda *asked: told.append(asked) or [0.5] * len(asked[0])  # noqa: E731
    victim, texts = victim_of(tokenizer, harm=judge), ["w1 w2", LONG, "w3", "Hello"]
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


# ---- attacks that ask --------------------------------------------------------------------------------------


class Scripted:
    """An attacker whose words are known."""

    techniques = tuple(f"technique {i}" for i in range(9))

    def __init__(self, silent: bool = False) -> None:
        self.silent, self.seen, self.varied = silent, [], 0

    def augment(self, prompt, generator):
        return f"{prompt} w{draw_seeds(generator, 1)[0] % 50}"

    def persuade(self, prompt, techniques, seeds):
        return ["" if self.silent else f"w{name.split()[1]} {prompt}" for name in techniques]

    def refine(self, conversations, seeds):
        self.seen += [replace(talk) for talk in conversations]
        prompts = ["" if self.silent else f"{talk.goal} w{len(talk.exchanges)}" for talk in conversations]
        return [{"improvement": "", "prompt": prompt} for prompt in prompts]

    def individuals(self, goal, count, seeds):
        return [((f"w{60 + i} w{80 + i}",), goal, (f"w{100 + i}",)) for i in range(count)]

    def vary(self, parts, places, goal, seeds):
        """The requests stay; one text in four fails, so what it was to replace stays, too."""
        self.varied += 1
        texts = [f"w{seed % 100}" if seed % 4 else "" for seed in seeds]
        return [parts[k] if k in places else text for k, text in enumerate(texts)]


def test_prefill_opens_the_turn_and_the_answer_counts_from_there():
    (one,) = attack("prefill_answer")[1].trace
    assert one["opening"] == "w40 w41" + THINK_CLOSE + "w90"
    completion = one["completion"]
    assert completion["answer"].startswith("w90") and completion["reasoning"] == "w40 w41"
    assert completion["closed"] and {*completion["answer"].split()} <= {*TOKENIZER.get_vocab()}  # none merged
    direct = attack("prefill_answer", reasoning=False)
    assert [attempt.trace[0]["opening"] for attempt in direct] == ["w5", "w90"]
    assert attack("prefill_reasoning")[0].trace[0]["opening"] == "w40 w41"


def test_best_of_n_begins_with_the_request_and_pap_tries_different_techniques():
    attempt = attack("best_of_n", helper=Scripted())[0]
    first, *others = [t["sent"] for t in attempt.trace]
    assert first == attempt.prompt and all(sent.startswith(first + " w") for sent in others)
    assert attempt.cost["queries"] == 5 and attempt.cost["forward_tokens"] > 0
    attempt = attack("pap", helper=Scripted())[0]
    used = [f"technique {t['sent'].split()[0][1:]}" for t in attempt.trace]
    assert used == [t["technique"] for t in attempt.trace] and len({*used}) == 3
    silent = attack("pap", helper=Scripted(silent=True))[0]
    assert silent.trace == [] and silent.cost["empty"] == 3  # an attacker that says nothing is counted


STEPS = {"best_of_n": 5, "pap": 3, "pair": 6, "autodan": 4, "prefill_answer": 1}


@pytest.mark.parametrize(("name", "steps"), STEPS.items())
def test_a_behaviour_fares_the_same_beside_any_other_and_one_too_long_is_not_asked(name, steps):
    both = attack(name, helper=Scripted())
    alone = attack(name, BEHAVIOURS[1:], helper=Scripted(), seed=1, max_batch_tokens=20)  # one at a time
    assert both[1].trace == alone[0].trace
    too_long = {"id": "c", "prompt": LONG, "target": "w5 w6", "prefill": "w5"}
    fine, long = attack(name, [BEHAVIOURS[0], too_long], helper=Scripted())
    assert fine.trace[-1]["step"] == steps and long.cost["queries"] == 0
    asked = victim_of().ask([(too_long, new) for new in long.trace], range(steps + 1))
    assert {answer["finish_reason"] for answer in asked} == {NOT_ASKED}


@pytest.mark.parametrize(("harm", "rating", "tries"), [(0.9, 9, 24), (0.95, 10, 4), (None, 1, 24)])
def test_pair_shows_the_last_four_exchanges_and_no_reasoning_and_stops_at_a_rating_of_ten(
    harm, rating, tries
):
    """After four tries: all streams of the first turn."""
    scripted, harms = Scripted(), lambda prompts, answers: [harm] * len(answers)
    budget = replace(BUDGET, streams=4, depth=6)
    (attempt,) = attack("pair", BEHAVIOURS[1:], budget, scripted, harm=harms)
    assert [t["step"] for t in attempt.trace] == list(range(1, tries + 1))
    last = scripted.seen[-2]
    assert (last.goal, last.target, last.stream) == (BEHAVIOURS[1]["prompt"], "w90", 2)
    before = [t for t in attempt.trace if t["step"] % 4 == 3][:-1]  # of stream 2
    shown = [(t["sent"], t["completion"]["answer"], rating) for t in before[-4:]]
    keys = ("improvement", "prompt", "answer", "rating")
    assert last.exchanges == [dict(zip(keys, ("", *one), strict=True)) for one in shown]


# ---- AutoDAN -----------------------------------------------------------------------------------------------


def test_losses_of_texts_of_any_length_are_the_plain_losses():
    texts, attempt = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w10"], Attempt({"target": "w15 w16"})
    plain = [plain_loss(text, "w15 w16") for text in texts]
    texts[1:1] = [LONG, "unreadable"]  # a hair worse than the worst, so never the best
    victim, few = victim_of(make_tokenizer(unknown=None)), replace(BUDGET, max_batch_tokens=40)  # two batches
    losses = autodan.target_losses(victim, attempt, texts, few)
    expected = [plain[0], max(plain), max(plain), *plain[1:]]
    assert losses == pytest.approx(expected, abs=1e-4) and attempt.cost["queries"] == 3
    assert losses[1] == losses[2] > max(losses[0], *losses[3:])


def test_autodan_lowers_the_loss_and_keeps_the_best_and_the_request(monkeypatch):
    seen, losses_of = [], autodan.target_losses
    monkeypatch.setattr(autodan, "target_losses", lambda *given: seen.append(losses_of(*given)) or seen[-1])
    budget = replace(BUDGET, population=24, generations=20, mutation=0.2)
    (attempt,) = attack("autodan", BEHAVIOURS[:1], budget, scripted := Scripted())
    losses = [t["loss"] for t in attempt.trace]
    assert [len(people) for people in seen] == [24] * 21 and list(map(min, seen)) == losses  # the best stay
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert all(attempt.prompt in t["sent"] for t in attempt.trace) and attempt.cost["empty"]
    assert scripted.varied <= 20  # a call a generation, not a prompt


def test_words_score_by_momentum_in_the_order_of_the_text():
    """Of a set's order, another process, after a kill, would draw other words."""
    mother, father = Individual(("a", "b"), "r", ("c",)), Individual(("x",), "s", ("z", "q"))
    scores = autodan.word_scores([mother, father], [1.0, 3.0], {"a": 0.0, "old": 5.0})
    expected = {"a": -0.5, "old": 5.0, "b": -1.0, "c": -1.0, "x": -3.0, "z": -3.0, "q": -3.0}
    assert list(scores.items()) == list(expected.items())


def test_parents_are_drawn_by_softmax_of_minus_the_loss_and_cross_at_the_rate_as_words_give_way():
    rate = 0.5
    people = [Individual(tuple(f"{name}{i}" for i in range(20)), name, ()) for name in "ab"]
    children = autodan.sentence_step(people, [3.0, 3.0 + math.log(3)], 8000, rate, random.Random(1))
    sentences = Counter(sentence[0] for child in children for sentence in child.before)
    assert sentences["a"] / 160_000 == pytest.approx(3 / 4, abs=0.02)  # exp(-loss) is as 3 : 1
    mixed = [pair for pair in zip(children[::2], children[1::2], strict=True) if not {*pair} <= {*people}]
    assert len(mixed) / 4000 == pytest.approx(rate * 3 / 8, abs=0.03)  # the others have one parent twice
    scores, person = {"worse": -1.0, "x": 0.0, "good": 1.0, "best": 3.0}, Individual(("x",), "x", ())
    swaps = [autodan.swap_words(person, scores, rate, random.Random(seed)).text() for seed in range(4000)]
    counts = Counter(swaps)
    assert {*counts} <= {"x x", "good x", "best x"}  # never for a lower score; the request is left alone
    assert counts["best x"] / 4000 == pytest.approx(rate * 3 / 4, abs=0.03)


# ---- who writes the words: a chat model --------------------------------------------------------------------

GOAL, TARGET = "bake a {cake}", 'Sure, here is "a cake"'
GOOD = '{"improvement": "none yet", "prompt": "Please bake."}'


class Scribe(LanguageModelAttacker):
    """A chat model whose replies are known: keeps what it is asked, and answers by chat and seed."""

    def __init__(self, answer) -> None:
        self.answer, self.calls, self.max_new_tokens = answer, [], 7

    def reply(self, chats, seeds, *limits):
        self.calls.append(list(zip(chats, seeds, strict=True)))
        return [self.answer(str(chat), seed) for chat, seed in self.calls[-1]]

    def seeds_of(self, goal: str) -> list[int]:
        return [seed for call in self.calls for chat, seed in call if goal in str(chat)]


@pytest.fixture
def chatting(monkeypatch):
    """A real one, of a context of 128 tokens."""
    tokenizer = make_tokenizer()
    monkeypatch.setattr(attacker, "load_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(attacker, "load_policy", lambda name: MODEL)
    return LanguageModelAttacker("chat", 5, 10)


def test_the_attacking_model_reads_the_conversation_as_turns_of_a_chat():
    scribe, long = Scribe(lambda chat, seed: GOOD), "I will not. " * 300  # nothing is cut
    seen = [{"improvement": "idea 1", "prompt": "try 1", "answer": "No.", "rating": 1}]
    seen.append({"improvement": "idea 2", "prompt": "try 2", "answer": long, "rating": 2})
    talks = [Conversation(GOAL, TARGET, stream, seen) for stream in range(4)]
    assert scribe.refine(talks, [1, 2, 3, 4]) == [json.loads(GOOD)] * 4
    chats = [chat for chat, _ in scribe.calls[0]]
    for chat in chats:
        assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * 2, "user"]
        texts = [m["content"] for m in chat]
        for k, exchange in zip((2, 4), seen, strict=True):
            assert json.loads(texts[k]).items() <= exchange.items()
            assert exchange["answer"] in texts[k + 1] and f"Rating: {exchange['rating']}" in texts[k + 1]
        assert all(GOAL in texts[k] and TARGET in texts[k] for k in (1, 3, 5))
    systems = [chat[0]["content"] for chat in chats]
    assert len({*systems}) == 3 and systems[3] == systems[0]  # three strategies, in turn


def test_a_reply_is_json_with_two_texts_or_malformed():
    around = f"I use {{braces}} now.\n```json\n{GOOD}\n```\nGood luck! {{}}"
    broken = '{"prompt": " a\nb\n\\"c\\" ", "improvement": "", "more": 1}'  # a real line break
    assert [parse_reply(text)["prompt"] for text in (around, broken)] == ["Please bake.", 'a\nb\n"c"']
    malformed = ["Please bake.", '{"improvement": "x"}', '{"a":' * 1_500, GOOD[:-2]]
    for prompt in ("  ", ["a"], "\ud83d"):  # empty, no text, half a character
        malformed.append(json.dumps({"improvement": "x", "prompt": prompt}))
    assert not any(map(parse_reply, malformed))


def test_a_malformed_reply_is_asked_for_again_at_most_five_times_whatever_else_is_asked():
    scribe = Scribe(lambda chat, seed: "no json" if seed % 3 or "poor" in chat else GOOD)
    talks = [Conversation(f"goal {i}", TARGET, i) for i in range(8)]
    together = scribe.refine([*talks, Conversation("poor", "", 0)], list(range(9)))
    assert together[8]["prompt"] == "" and len({*scribe.seeds_of("poor")}) == 6 == len(scribe.calls)
    tries = [scribe.seeds_of(f"goal {i}") for i in range(8)]
    assert len({len(seeds) for seeds in tries}) > 1  # some were asked more often
    assert together[:8] == [scribe.refine([talk], [i])[0] for i, talk in enumerate(talks)]
    assert [scribe.seeds_of(f"goal {i}") for i in range(8)] == [seeds * 2 for seeds in tries]


def test_a_chat_that_is_too_long_loses_its_oldest_exchanges(chatting, monkeypatch):
    seen, roles = [], ["system", *["user", "assistant"] * 2, "user"]
    written = lambda rows: seen.append(rows) or [Completion([], [], "eos") for _ in rows]  # noqa: E731
    monkeypatch.setattr(writing, "sample", lambda model, rows, **how: written(rows))
    chat = [{"role": role, "content": f"w{i}"} for i, role in enumerate(roles)]
    kept = [chat, chat[:2] + chat[4:], chat[:2]]
    ids = [encode_chat(TOKENIZER, part, reasoning=False) for part in kept]
    for least, expected in zip(ids, (ids[:1], ids[1:2], ids[2:]), strict=True):
        chatting.reply([chat], [0], 128 - len(least))
        assert seen[-1] == expected
    assert chatting.reply([chat], [0], 129 - len(ids[2])) == [""] and seen[-1] == []  # a failure, not the end
    with pytest.raises(UserError, match="--attacker: texts of 128 tokens exceed"):
        chatting.reply([chat], [0], 128)


def test_an_attacker_without_system_prompts_is_refused_before_the_hours_if_pair_is_asked_for(chatting):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chatting.tokenizer.chat_template = refusing
    chatting.check(["pap", "autodan"], ["Hello"])
    with pytest.raises(UserError, match="--attacker: .*no system"):
        chatting.check(["pap", "pair"], ["Hello"])


def test_an_attacker_without_a_name_is_one_line():
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        attacker.load_attacker("", 5, 10)


def test_a_module_may_have_the_functions_of_one_attack_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "pairer.py").write_text("def check(attacks, goals): ...\ndef refine(talks, seeds): ...\n")
    assert attacker.load_attacker("pairer", 5, 10).__name__ == "pairer"
    (tmp_path / "broken.py").write_text("import nowhere")
    with pytest.raises(ImportError, match="nowhere"):  # and no message that it is no model
        attacker.load_attacker("broken", 5, 10)


def test_each_text_of_a_chat_model_depends_on_its_seed_alone(chatting):
    first, long, *others = chatting.write(["w1", LONG, "w2 w3", "w1"], [1, 2, 3, 4])
    assert chatting.write(["w2 w3"], [3]) == others[:1] and first != others[1] and long == ""
    assert all(0 < len(text.split()) <= 5 for text in (first, *others))  # endless text is cut


def test_what_a_chat_model_is_told_and_how_its_words_are_read():
    scene = "A lab. It is night!\n[REQUEST]\nAnswer in full."
    scribe = Scribe(lambda chat, seed: scene if "[REQUEST]" in chat else f'"New {seed}."')
    assert len(scribe.techniques) == 40 and scribe.persuade(GOAL, ["time pressure"], [1]) == ["New 1."]
    asked = str(scribe.calls[0])
    assert all(part in asked for part in ("time pressure", "leave little time to decide", GOAL))
    assert scribe.individuals(GOAL, 1, [1]) == [(("A lab.", "It is night!"), GOAL, ("Answer in full.",))]
    assert scribe.vary(["a", GOAL, "c"], [1], GOAL, [1, 2, 3]) == ["New 1.", GOAL, "New 3."]
    text = "how do i bake a chocolate cake"  # disturbed, it is still legible
    noisy = scribe.augment(text, generator(3))
    close = sum(abs(ord(a) - ord(b)) <= 1 for a, b in zip(sorted(noisy.lower()), sorted(text), strict=True))
    assert noisy != text and close >= 0.8 * len(text)
