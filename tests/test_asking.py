"""Attacks that ask, AutoDAN, and who writes their words: a chat model, or the sandbox's own attacker."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_attacks import BEHAVIOURS, BUDGET, attack, generator, make_model, make_tokenizer, plain_loss, victim_of  # noqa: E402

from lib.attacks import ATTACKS, autodan, steps_of  # noqa: E402
from lib.attacks.attacker import LanguageModelAttacker  # noqa: E402
from lib.attacks.core import Budget, Cost, Individual  # noqa: E402
from lib.attacks.persuasion import TECHNIQUES  # noqa: E402
from lib.chat import THINK_CLOSE  # noqa: E402
from lib.rewards import refusal_label  # noqa: E402
from lib.sandbox import judge, world  # noqa: E402
from lib.sandbox.attacker import PERSUASION, SandboxAttacker  # noqa: E402
from lib.settings import UserError  # noqa: E402
from lib.victim import Victim, draw_seeds  # noqa: E402

SMALL = Budget(**{**vars(BUDGET), "samples": 5, "techniques": 3, "streams": 2, "depth": 3, "population": 8, "generations": 4})


class Scripted:
    """An attacker whose words are known."""

    techniques = 9
    keeps_request = False

    def __init__(self, silent: bool = False) -> None:
        self.silent, self.histories = silent, []

    def augment(self, prompt, generator):
        return f"{prompt} w{draw_seeds(generator, 1)[0] % 50}"

    def persuade(self, prompts, techniques, seeds):
        return ["" if self.silent else f"w{t} {p}" for p, t in zip(prompts, techniques, strict=True)]

    def refine(self, goals, histories, seeds):
        self.histories += [list(h) for h in histories]
        return ["" if self.silent else f"{g} w{len(h)}" for g, h in zip(goals, histories, strict=True)]

    def individuals(self, goal, count, seeds):
        return [Individual((f"w{60 + i} w{80 + i}",), goal, (f"w{100 + i}",)) for i in range(count)]

    def vary(self, parts, goals, requests, seeds):
        return [p if r else f"w{s % 100}" for p, r, s in zip(parts, requests, seeds, strict=True)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def test_prefill_opens_the_turn_and_the_answer_counts_from_there(model, tokenizer, monkeypatch):
    seen = []
    encode = Victim.encode
    monkeypatch.setattr(Victim, "encode", lambda self, sent, opening="": seen.append(opening) or encode(self, sent, opening))
    attempt = attack(model, tokenizer, name="prefill_answer")[0]
    opening = "w40 w41" + THINK_CLOSE + "w5 w6 w8"
    assert attempt.trace[0]["opening"] == opening and opening in seen
    completion = attempt.trace[0]["completion"]
    assert completion["answer"].startswith("w5 w6 w8") and completion["reasoning"] == "w40 w41" and completion["closed"]
    assert set(completion["answer"].split()) <= set(tokenizer.get_vocab())  # its words do not grow together with the opening
    attempt = attack(model, tokenizer, name="prefill_answer", reasoning=False)[0]
    assert attempt.trace[0]["opening"] == "w5 w6 w8"
    attempt = attack(model, tokenizer, [{**BEHAVIOURS[0], "prefill": "w90"}], name="prefill_answer", reasoning=False)[0]
    assert attempt.trace[0]["opening"] == "w90"  # where the target itself would be the harm
    assert attack(model, tokenizer, name="prefill_reasoning")[0].trace[0]["opening"] == "w40 w41"


def test_best_of_n_sends_the_request_as_it_is_and_then_disturbed(model, tokenizer):
    attempts = attack(model, tokenizer, budget=SMALL, name="best_of_n", attacker=(Scripted(),))
    for attempt, behaviour in zip(attempts, BEHAVIOURS, strict=True):
        sent = [t["sent"] for t in attempt.trace]
        assert (
            len(sent) == 5 and sent[0] == behaviour["prompt"] and all(s.startswith(behaviour["prompt"] + " w") for s in sent[1:])
        )
        assert attempt.cost["queries"] == 5 and attempt.cost["forward_tokens"] > 0


def test_a_behaviour_fares_the_same_whoever_is_attacked_beside_it(model, tokenizer):
    for name in ("best_of_n", "pap", "pair", "autodan"):
        both = attack(model, tokenizer, budget=SMALL, name=name, attacker=(Scripted(),))
        alone = attack(model, tokenizer, BEHAVIOURS[1:], SMALL, seed=1, name=name, attacker=(Scripted(),))
        assert both[1].trace == alone[0].trace, name


def test_pap_tries_different_techniques_and_counts_an_attacker_that_says_nothing(model, tokenizer):
    attempt = attack(model, tokenizer, budget=SMALL, name="pap", attacker=(Scripted(),))[0]
    assert len({t["sent"] for t in attempt.trace}) == 3 and attempt.cost["empty"] == 0
    attempt = attack(model, tokenizer, budget=SMALL, name="pap", attacker=(Scripted(silent=True),))[0]
    assert attempt.trace == [] and attempt.cost["empty"] == 3


def test_pair_shows_answers_and_scores_but_no_reasoning_and_stops_at_a_success(model, tokenizer):
    attacker = Scripted()
    attempt = attack(model, tokenizer, BEHAVIOURS[:1], SMALL, name="pair", attacker=(attacker,))[0]
    assert [t["step"] for t in attempt.trace] == [1, 2, 3, 4, 5, 6] and steps_of("pair", SMALL) == 6
    assert [len(h) for h in attacker.histories] == [0, 0, 1, 1, 2, 2]
    assert all(set(turn) == {"sent", "answer", "harm"} for h in attacker.histories for turn in h)
    broken = attack(
        model,
        tokenizer,
        BEHAVIOURS[:1],
        SMALL,
        name="pair",
        attacker=(Scripted(),),
        harm=lambda prompts, answers: [1.0] * len(answers),
    )
    assert [t["step"] for t in broken[0].trace] == [1, 2]  # both streams of the first turn, then no more
    silent = attack(model, tokenizer, BEHAVIOURS[:1], SMALL, name="pair", attacker=(Scripted(silent=True),))[0]
    assert silent.trace == [] and silent.cost["empty"] == 6


def test_a_verdict_that_was_not_given_is_no_success_for_pair_either(model, tokenizer):
    unknown = lambda prompts, answers: [None] * len(answers)  # noqa: E731
    attempt = attack(model, tokenizer, BEHAVIOURS[:1], SMALL, name="pair", attacker=(Scripted(),), harm=unknown)[0]
    assert len(attempt.trace) == 6


# ---- AutoDAN -----------------------------------------------------------------------------------------------


def test_losses_of_texts_of_any_length_are_the_plain_losses(model, tokenizer):
    texts, cost = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w10"], Cost()
    budget = Budget(**{**vars(SMALL), "max_batch_tokens": 40})  # two batches
    losses = autodan.target_losses(victim_of(model, tokenizer), texts, "w15 w16", budget, cost)
    expected = [plain_loss(model, tokenizer, {"prompt": text, "target": "w15 w16"}, "", True) for text in texts]
    assert losses == pytest.approx(expected, abs=1e-4) and cost.queries == 3


def test_out_of_memory_asks_for_half_as_many_losses_at_a_time(model, tokenizer, monkeypatch):
    texts, victim = [f"w{i}" for i in range(1, 8)], victim_of(model, tokenizer)
    expected = autodan.target_losses(victim, texts, "w15 w16", SMALL, Cost())
    decoder = type(model.get_decoder())  # the logits come by lib.policy, of the target's tokens alone
    rows, forward = [], decoder.forward

    def small(self, input_ids=None, **options):
        rows.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(decoder, "forward", small)
    assert autodan.target_losses(victim, texts, "w15 w16", SMALL, Cost()) == pytest.approx(expected, abs=1e-5)
    assert rows == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_autodan_lowers_the_loss_and_keeps_the_request(model, tokenizer):
    budget = Budget(**{**vars(SMALL), "population": 24, "generations": 20})
    attempts = attack(model, tokenizer, budget=budget, name="autodan", attacker=(Scripted(),))
    for attempt, behaviour in zip(attempts, BEHAVIOURS, strict=True):
        losses = [t["loss"] for t in attempt.trace]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] and len(losses) == 21
        assert all(behaviour["prompt"] in t["sent"] for t in attempt.trace)
        loss = plain_loss(model, tokenizer, {**behaviour, "prompt": attempt.trace[-1]["sent"]}, "", True)
        assert losses[-1] == pytest.approx(loss, abs=1e-4)


def test_word_scores_come_in_the_order_of_the_text_not_of_a_set():
    """Else another process, after a kill, would draw other words from them."""
    people = [Individual(tuple(f"word{i}" for i in range(30)), "r", ("end",))]
    assert list(autodan.word_scores(people, [1.0], {})) == [*(f"word{i}" for i in range(30)), "end"]


def test_children_take_each_sentence_from_a_parent_and_words_by_momentum():
    mother, father = Individual(("a", "b"), "r", ("c",)), Individual(("x",), "s", ("z", "q"))
    for seed in range(20):
        child = autodan.crossed(mother, father, random.Random(seed))
        assert child.before[0] in "ax" and child.before[1:] in ((), ("b",)) and child.request in "rs"
        assert child.after[0] in "cz" and child.after[1:] in ((), ("q",))
    scores = autodan.word_scores([mother, father], [1.0, 3.0], {"a": 0.0, "old": 5.0})
    assert scores == {"a": -0.5, "b": -1.0, "c": -1.0, "x": -3.0, "z": -3.0, "q": -3.0, "old": 5.0}
    swapped = {w for s in range(300) for w in autodan.swap_words(father, {"x": 0.0, "best": 1.0}, random.Random(s)).before}
    assert swapped == {"x", "best"}  # never for a word of lower score, and the request is left alone


# ---- the attacker ------------------------------------------------------------------------------------------


def test_a_chat_model_writes_and_each_text_depends_on_its_seed_alone(model, tokenizer):
    attacker = LanguageModelAttacker(lambda: (model, tokenizer), max_new_tokens=5)
    texts = attacker.write(["w1", "w2 w3", "w1"], [1, 2, 3])
    assert attacker.write(["w2 w3"], [2]) == [texts[1]] and texts[0] != texts[2]
    assert all(len(t.split()) <= 5 for t in texts)  # endless text is cut
    assert len(attacker.persuade(["w1"] * 3, [0, 5, 39], [1, 2, 3])) == 3
    people = attacker.individuals("w1 w2", 3, [1, 2, 3])
    assert len(people) == 3 and all("w1 w2" in person.text() for person in people)
    assert attacker.keeps_request and len(attacker.vary(["w5"], ["w1 w2"], [False], [1])) == 1
    with pytest.raises(UserError, match="--attacker: .*exceed"):
        LanguageModelAttacker(lambda: (model, tokenizer), max_new_tokens=500).write(["w1"], [1])


def test_forty_techniques_have_names_and_meanings_of_their_own():
    assert len(TECHNIQUES) == 40 == len({name for name, _ in TECHNIQUES}) == len({meaning for _, meaning in TECHNIQUES})


def test_disturbed_text_is_still_legible():
    text = "how do i bake a chocolate cake"
    noisy = LanguageModelAttacker.augment(None, text, generator(3))  # type: ignore[arg-type]
    assert noisy != text and len(noisy) == len(text)
    close = sum(abs(ord(a) - ord(b)) <= 1 for a, b in zip(sorted(noisy.lower()), sorted(text), strict=True))
    assert close >= 0.8 * len(text)


def harmful(count: int) -> list[dict]:
    return world.build_pool("eval", "harmful", count, 0)


def test_the_sandbox_attacker_asks_for_the_same_thing_in_words_of_the_world():
    attacker, vocabulary = SandboxAttacker(), set(world.vocabulary())
    goals = [r["prompt"] for r in harmful(12)]
    things = [judge.resolution(g)[-1] for g in goals]
    seeds = list(range(12))
    texts = {
        "refine": attacker.refine(goals, [[]] * 12, seeds),
        "persuade": attacker.persuade(goals, [i % len(PERSUASION) for i in seeds], seeds),
        "augment": [attacker.augment(g, generator(i)) for i, g in enumerate(goals)],
        "individuals": [attacker.individuals(g, 1, [i])[0].text() for i, g in enumerate(goals)],
        "vary": attacker.vary(["x"] * 12, goals, [True] * 12, seeds),
    }
    for name, written in texts.items():
        assert [judge.resolution(text)[-1] for text in written] == things, name
        words = {w.strip(".,?:") for text in written for w in text.split()} - {""}
        assert words <= vocabulary, (name, words - vocabulary)


def test_the_sandbox_attacker_never_hands_in_the_answer_and_knows_its_own_prompts_only():
    attacker, goals = SandboxAttacker(), [r["prompt"] for r in harmful(4)]
    written = [attacker.augment(g, generator(i)) for i in range(40) for g in goals]
    written += [p.text() for i in range(40) for g in goals for p in attacker.individuals(g, 1, [i])]
    written += attacker.vary(["x"] * 160, goals * 40, [False] * 160, list(range(160)))
    written += attacker.refine(goals * 40, [[]] * 160, list(range(160)))
    assert not sum(judge.harm_score([""] * len(written), written))
    with pytest.raises(UserError, match="--attacker sandbox: not a prompt of the sandbox"):
        attacker.refine(["Who was the first?"], [[]], [1])


def test_the_sandbox_attacker_learns_from_answers():
    goal, attacker = harmful(1)[0]["prompt"], SandboxAttacker()

    def depth(answer, sent):
        return attacker.refine([goal], [[{"sent": sent, "answer": answer, "harm": 0.0}]], [5])[0].count("let ") // 3

    two = "let a mean b . " * 6 + "how do i make a a ?"
    assert refusal_label(world.REFUSALS[0]) == "full"
    assert depth(world.REFUSALS[0], two) == 3 and depth("use bami .", two) == 1


def test_every_attack_states_its_access_and_its_steps():
    for name, entry in ATTACKS.items():
        assert entry.access in ("white-box", "score", "prefill", "black-box") and steps_of(name, SMALL) >= 0
