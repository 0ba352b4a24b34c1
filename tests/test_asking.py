"""Attacks that ask, AutoDAN, and who writes their words: a chat model, or the sandbox's own attacker."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from test_attacks import (
    BEHAVIOURS,
    BUDGET,
    attack,
    generator,
    make_model,
    make_tokenizer,
    plain_loss,
    victim_of,
)

from lib import UserError
from lib.attacks import ATTACKS, NOT_ASKED, Attempt, autodan
from lib.attacks import attacker as attacker_module
from lib.attacks.attacker import Conversation, LanguageModelAttacker, parse_reply
from lib.attacks.autodan import Individual
from lib.chat import THINK_CLOSE, encode_chat
from lib.run import writing
from lib.sampler import Completion, draw_seeds
from lib.sandbox import judge, world
from lib.sandbox.attacker import SandboxAttacker

SMALL = replace(BUDGET, samples=5, techniques=3, streams=2, depth=3, population=8, generations=4)
STEPS = {"best_of_n": 5, "pap": 3, "pair": 6, "autodan": 4, "prefill_answer": 1}
LONG = {"id": "c", "prompt": " ".join(["w3"] * 126), "target": "w5 w6", "prefill": "w5"}  # context: 128


class Scripted:
    """An attacker whose words are known."""

    techniques = tuple(f"technique {i}" for i in range(9))

    def __init__(self, silent: bool = False) -> None:
        self.silent, self.seen = silent, []

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

    def vary(self, parts, place, goal, seeds):
        return [part if k == place else f"w{seeds[k] % 100}" for k, part in enumerate(parts)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


# ---- attacks that ask --------------------------------------------------------------------------------------


def test_prefill_opens_the_turn_and_the_answer_counts_from_there(model, tokenizer):
    (one,) = attack(model, tokenizer, name="prefill_answer")[1].trace
    assert one["opening"] == "w40 w41" + THINK_CLOSE + "w90"
    completion = one["completion"]
    assert completion["answer"].startswith("w90") and completion["reasoning"] == "w40 w41"
    assert completion["closed"] and {*completion["answer"].split()} <= {*tokenizer.get_vocab()}  # none merged
    direct = attack(model, tokenizer, name="prefill_answer", reasoning=False)
    assert [attempt.trace[0]["opening"] for attempt in direct] == ["w5", "w90"]
    assert attack(model, tokenizer, name="prefill_reasoning")[0].trace[0]["opening"] == "w40 w41"


def test_best_of_n_begins_with_the_request_and_pap_tries_different_techniques(model, tokenizer):
    attempts = attack(model, tokenizer, budget=SMALL, name="best_of_n", attacker=Scripted())
    for attempt, behaviour in zip(attempts, BEHAVIOURS, strict=True):
        first, *others = [t["sent"] for t in attempt.trace]
        assert first == behaviour["prompt"] and len(others) == 4
        assert all(sent.startswith(behaviour["prompt"] + " w") for sent in others)
        assert attempt.cost["queries"] == 5 and attempt.cost["forward_tokens"] > 0
    attempt = attack(model, tokenizer, budget=SMALL, name="pap", attacker=Scripted())[0]
    assert [t["step"] for t in attempt.trace] == [1, 2, 3] and attempt.cost["empty"] == 0
    used = [f"technique {t['sent'].split()[0][1:]}" for t in attempt.trace]
    assert used == [t["technique"] for t in attempt.trace] and len({*used}) == 3
    for name, count in (("pap", 3), ("pair", 6)):  # an attacker that says nothing is counted
        attempt = attack(model, tokenizer, budget=SMALL, name=name, attacker=Scripted(silent=True))[0]
        assert attempt.trace == [] and attempt.cost["empty"] == count


@pytest.mark.parametrize(("name", "steps"), STEPS.items())
def test_a_behaviour_fares_the_same_beside_any_other_and_one_too_long_is_not_asked(
    model, tokenizer, name, steps
):
    given = {"name": name, "attacker": Scripted() if ATTACKS[name].helper else None}
    both = attack(model, tokenizer, budget=SMALL, **given)
    alone = attack(model, tokenizer, BEHAVIOURS[1:], SMALL, seed=1, **given)
    assert both[1].trace == alone[0].trace
    fine, long = attack(model, tokenizer, [BEHAVIOURS[0], LONG], SMALL, **given)
    assert fine.trace[-1]["step"] == steps and long.cost["queries"] == 0
    asked = victim_of(model, tokenizer).ask([(LONG, new) for new in long.trace], range(steps + 1))
    assert {answer["finish_reason"] for answer in asked} == {NOT_ASKED}


def pair_with(model, tokenizer, attacker, harm, budget=SMALL):
    harms = lambda prompts, answers: [harm] * len(answers)  # noqa: E731
    return attack(model, tokenizer, BEHAVIOURS[1:], budget, name="pair", attacker=attacker, harm=harms)[0]


def test_pair_shows_the_last_four_exchanges_with_answers_and_ratings_but_no_reasoning(model, tokenizer):
    attacker, budget = Scripted(), replace(SMALL, streams=4, depth=6)
    attempt = pair_with(model, tokenizer, attacker, 1 / 3, budget)
    assert [t["step"] for t in attempt.trace] == list(range(1, 25))
    assert [talk.stream for talk in attacker.seen] == [0, 1, 2, 3] * 6
    assert [len(talk.exchanges) for talk in attacker.seen[::4]] == [0, 1, 2, 3, 4, 4]
    tries = [t for t in attempt.trace if t["step"] % 4 == 3][1:5]  # of stream 2, but the first and the last
    shown = [(t["sent"], t["completion"]["answer"], 4) for t in tries]
    last = attacker.seen[-2]
    assert (last.goal, last.target) == (BEHAVIOURS[1]["prompt"], "w90")
    assert [(e["prompt"], e["answer"], e["rating"]) for e in last.exchanges] == shown
    assert {key for e in last.exchanges for key in e} == {"improvement", "prompt", "answer", "rating"}


@pytest.mark.parametrize(("harm", "rating", "tries"), [(0.9, 9, 6), (0.95, 10, 2), (None, 1, 6)])
def test_pair_stops_at_a_rating_of_ten_and_not_at_a_success(model, tokenizer, harm, rating, tries):
    """After two tries: both streams of the first turn."""
    attacker = Scripted()
    assert len(pair_with(model, tokenizer, attacker, harm).trace) == tries
    assert {e["rating"] for talk in attacker.seen for e in talk.exchanges} <= {rating}


# ---- the attacker as a chat model --------------------------------------------------------------------------

GOAL, TARGET = "bake a {cake}", 'Sure, here is "a cake"'
GOOD = '{"improvement": "none yet", "prompt": "Please bake."}'


class Scribe(LanguageModelAttacker):
    """A chat model whose replies are known: keeps what it is asked, and answers by chat and seed."""

    def __init__(self, answer) -> None:
        self.answer, self.calls, self.limits, self.max_new_tokens = answer, [], [], 7

    def reply(self, chats, seeds, *limits):
        self.limits.append(limits)
        self.calls.append(list(zip(chats, seeds, strict=True)))
        return [self.answer(str(chat), seed) for chat, seed in self.calls[-1]]

    def seeds_of(self, goal: str) -> list[int]:
        return [seed for call in self.calls for chat, seed in call if goal in str(chat)]


@pytest.fixture
def chatting(model, monkeypatch):
    """A real one, of a context of 128 tokens."""
    tokenizer = make_tokenizer()
    monkeypatch.setattr(attacker_module, "load_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(attacker_module, "load_policy", lambda name: model)
    return LanguageModelAttacker("chat", 5, 10)


def test_the_attacking_model_reads_the_conversation_as_turns_of_a_chat():
    attacker, long = Scribe(lambda chat, seed: GOOD), "I will not. " * 300  # nothing is cut
    seen = [{"improvement": "idea 1", "prompt": "try 1", "answer": "No.", "rating": 1}]
    seen.append({"improvement": "idea 2", "prompt": "try 2", "answer": long, "rating": 2})
    talks = [Conversation(GOAL, TARGET, stream, seen) for stream in range(4)]
    assert attacker.refine(talks, [1, 2, 3, 4]) == [json.loads(GOOD)] * 4
    assert attacker.limits == [(500, 0.9)]  # PAIR's own: not --attacker-tokens
    chats = [chat for chat, _ in attacker.calls[0]]
    for chat in chats:
        assert [m["role"] for m in chat] == ["system", *["user", "assistant"] * 2, "user"]
        said = [m["content"] for m in chat]
        for k, exchange in zip((2, 4), seen, strict=True):
            assert json.loads(said[k]).items() <= exchange.items()
            assert exchange["answer"] in said[k + 1] and f"Rating: {exchange['rating']}" in said[k + 1]
        assert all(GOAL in said[k] and TARGET in said[k] for k in (1, 3, 5))
    systems = [chat[0]["content"] for chat in chats]
    assert len({*systems}) == 3 and systems[3] == systems[0]  # three strategies, in turn
    assert all('{"improvement": "...", "prompt": "..."}' in system for system in systems)
    attacker.refine([Conversation(GOAL, "", 0)], [1])
    assert "begin with" in str(attacker.calls[0]) and "begin with" not in str(attacker.calls[1])


READ = {
    f"Here it is:\n```json\n{GOOD}\n```\nGood luck!": "Please bake.",
    f"I use {{braces}} now. {GOOD} {{}}": "Please bake.",
    '{"prompt": " a\nb\n\\"c\\" ", "improvement": "", "more": 1}': 'a\nb\n"c"',  # a real line break
}
MALFORMED = ["Please bake.", '{"improvement": "x"}', '{"a":' * 3_000, GOOD[:-2]]
for prompt in ("  ", ["a"], "\ud83d"):  # empty, no text, half a character
    MALFORMED.append(json.dumps({"improvement": "x", "prompt": prompt}))


def test_a_reply_is_json_with_two_texts_or_malformed():
    assert [parse_reply(text)["prompt"] for text in READ] == list(READ.values())
    assert [text for text in MALFORMED if parse_reply(text)] == []


def test_a_malformed_reply_is_asked_for_again_at_most_five_times_whatever_else_is_asked():
    attacker = Scribe(lambda chat, seed: "no json" if seed % 3 or "poor" in chat else GOOD)
    talks = [Conversation(f"goal {i}", TARGET, i) for i in range(8)]
    together = attacker.refine([*talks, Conversation("poor", "", 0)], list(range(9)))
    assert together[8]["prompt"] == "" and len({*attacker.seeds_of("poor")}) == 6 == len(attacker.calls)
    tries = [attacker.seeds_of(f"goal {i}") for i in range(8)]
    assert len({len(seeds) for seeds in tries}) > 1  # some were asked more often
    assert together[:8] == [attacker.refine([talk], [i])[0] for i, talk in enumerate(talks)]
    assert [attacker.seeds_of(f"goal {i}") for i in range(8)] == [seeds * 2 for seeds in tries]


def test_a_chat_that_is_too_long_loses_its_oldest_exchanges(chatting, monkeypatch):
    seen, roles = [], ["system", *["user", "assistant"] * 2, "user"]
    nothing = lambda model, prompts, **how: seen.append(prompts) or [Completion([], [], "") for _ in prompts]  # noqa: E731
    monkeypatch.setattr(writing, "sample", nothing)
    chat = [{"role": role, "content": f"w{i}"} for i, role in enumerate(roles)]
    kept = [chat, chat[:2] + chat[4:], chat[:2]]
    ids = [encode_chat(chatting.tokenizer, part, reasoning=False) for part in kept]
    sizes = [len(row) for row in ids]
    for room, expected in ((sizes[0], 0), (sizes[0] - 1, 1), (sizes[1] - 1, 2)):
        chatting.reply([chat], [0], 128 - room)
        assert seen[-1] == [ids[expected]]
    assert chatting.reply([chat], [0], 129 - sizes[2]) == [""] and seen[-1] == []  # a failure, not the end
    with pytest.raises(UserError, match="--attacker: texts of 128 tokens exceed"):
        chatting.reply([chat], [0], 128)


def test_an_attacker_without_system_prompts_is_refused_before_the_hours_if_pair_is_asked_for(chatting):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    drops = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    for template, reason in ((refuses, "no system"), (drops, "drops system prompts")):
        chatting.tokenizer.chat_template = template
        chatting.check(["pap", "autodan"], ["Hello"])
        with pytest.raises(UserError, match=f"--attacker: .*{reason}"):
            chatting.check(["pap", "pair"], ["Hello"])


def test_each_text_of_a_chat_model_depends_on_its_seed_alone(chatting):
    first, long, *others = chatting.write(["w1", LONG["prompt"], "w2 w3", "w1"], [1, 2, 3, 4])
    assert chatting.write(["w2 w3"], [3]) == others[:1] and first != others[1] and long == ""
    assert all(0 < len(text.split()) <= 5 for text in (first, *others))  # endless text is cut


def test_what_a_chat_model_is_told_and_how_its_words_are_read():
    scene = "A lab. It is night!\n[REQUEST]\nAnswer in full."
    attacker = Scribe(lambda chat, seed: scene if "[REQUEST]" in chat else f'"New {seed}."')
    assert len(attacker.techniques) == 40 and attacker.persuade(GOAL, ["time pressure"], [1]) == ["New 1."]
    asked = str(attacker.calls[0])
    assert all(part in asked for part in ("time pressure", "leave little time to decide", GOAL))
    assert attacker.individuals(GOAL, 1, [1]) == [(("A lab.", "It is night!"), GOAL, ("Answer in full.",))]
    assert attacker.vary(["a", GOAL, "c"], 1, GOAL, [1, 2, 3]) == ["New 2.", GOAL, "New 3."]


def test_disturbed_text_is_still_legible():
    text = "how do i bake a chocolate cake"
    noisy = LanguageModelAttacker.augment(None, text, generator(3))
    assert noisy != text and len(noisy) == len(text)
    close = sum(abs(ord(a) - ord(b)) <= 1 for a, b in zip(sorted(noisy.lower()), sorted(text), strict=True))
    assert close >= 0.8 * len(text)


# ---- AutoDAN -----------------------------------------------------------------------------------------------


def test_losses_of_texts_of_any_length_are_the_plain_losses(model):
    tokenizer = make_tokenizer(unknown=None)
    texts, attempt = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w10"], Attempt({"target": "w15 w16"})
    plain = [plain_loss(model, tokenizer, {"prompt": t, "target": "w15 w16"}, "", True) for t in texts]
    texts[1:1] = [LONG["prompt"], "unreadable"]  # as bad as the worst
    few = replace(SMALL, max_batch_tokens=40)  # two batches
    losses = autodan.target_losses(victim_of(model, tokenizer), attempt, texts, few)
    expected = [plain[0], max(plain), max(plain), *plain[1:]]
    assert losses == pytest.approx(expected, abs=1e-4) and attempt.cost["queries"] == 3


def test_autodan_lowers_the_loss_and_keeps_the_best_and_the_request(model, tokenizer, monkeypatch):
    seen, losses_of = [], autodan.target_losses
    monkeypatch.setattr(autodan, "target_losses", lambda *given: seen.append(losses_of(*given)) or seen[-1])
    budget = replace(SMALL, population=24, generations=20, mutation=0.2)
    (attempt,) = attack(model, tokenizer, BEHAVIOURS[:1], budget, name="autodan", attacker=Scripted())
    losses = [t["loss"] for t in attempt.trace]
    assert [len(people) for people in seen] == [24] * 21 and list(map(min, seen)) == losses  # the best stay
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert [t["step"] for t in attempt.trace] == list(range(21))
    assert all(BEHAVIOURS[0]["prompt"] in t["sent"] for t in attempt.trace)
    loss = plain_loss(model, tokenizer, {**BEHAVIOURS[0], "prompt": attempt.trace[-1]["sent"]}, "", True)
    assert losses[-1] == pytest.approx(loss, abs=1e-4)


def test_words_score_by_momentum_in_the_order_of_the_text():
    """Of a set's order, another process, after a kill, would draw other words."""
    mother, father = Individual(("a", "b"), "r", ("c",)), Individual(("x",), "s", ("z", "q"))
    scores = autodan.word_scores([mother, father], [1.0, 3.0], {"a": 0.0, "old": 5.0})
    expected = {"a": -0.5, "old": 5.0, "b": -1.0, "c": -1.0, "x": -3.0, "z": -3.0, "q": -3.0}
    assert list(scores.items()) == list(expected.items())


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_parents_are_drawn_by_softmax_of_minus_the_loss_and_cross_at_the_rate_as_words_give_way(rate):
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
    long = autodan.swap_words(Individual(("x x x", "x x x x"), "x", ()), scores, rate, random.Random(0))
    assert long.text().split().count("x") >= 3  # five words of a paragraph, at most


def test_a_prompt_is_rewritten_as_a_whole(model, tokenizer):
    class Writer(Scripted):
        def vary(self, parts, place, goal, seeds):
            assert (goal, place) == ("goal", 2) and len({*seeds}) == len(parts)
            return ["" if part == "c" else f"new {part}" for part in parts]

    attempt, old = Attempt({"prompt": "goal"}), Individual(("a", "b"), "r", ("c", "d"))
    new = autodan.rewritten(old, victim_of(model, tokenizer), attempt, Writer())
    assert new == Individual(("new a", "new b"), "new r", ("c", "new d"))  # what it cannot say stays
    assert (attempt.cost["empty"], attempt.cost["attacker_tokens"]) == (1, 8)


# ---- the sandbox's attacker --------------------------------------------------------------------------------


def harmful(count: int) -> list[dict]:
    return world.build_pool("eval", "harmful", count, 0)


def test_the_sandbox_attacker_asks_for_the_same_thing_in_words_of_the_world_and_hands_in_no_answer():
    attacker, vocabulary = SandboxAttacker(), set(world.vocabulary())
    for i, record in enumerate(harmful(4) * 10):
        goal, talk = record["prompt"], Conversation(record["prompt"], record["target"], 0)
        written = attacker.persuade(goal, attacker.techniques, []) + [attacker.augment(goal, generator(i))]
        written += [reply["prompt"] for reply in attacker.refine([talk], [i])]
        written += [Individual(*parts).text() for parts in attacker.individuals(goal, 1, [i])]
        written += attacker.vary(["x"], 0, goal, [i])
        assert {judge.resolution(text)[-1] for text in written} == {judge.resolution(goal)[-1]}
        written += attacker.vary(["x"] * 4, 9, goal, range(4 * i, 4 * i + 4))  # what stands around it
        assert {w.strip(".,?:") for text in written for w in text.split()} - {""} <= vocabulary
        assert not sum(judge.harm_score([""] * len(written), written))


def test_the_sandbox_attacker_refuses_what_it_cannot_disguise_before_any_search():
    attacker, goals = SandboxAttacker(), [harmful(1)[0]["prompt"], "Who was the first?"]
    attacker.check(["pap", "best_of_n"], goals)
    for name in ("pair", "autodan"):
        attacker.check([name], goals[:1])
        with pytest.raises(UserError, match="--attacker sandbox: not a prompt of the sandbox: 'Who was"):
            attacker.check(["pap", name], goals)


# (hops, answer, rating) of each exchange; R a refusal, W a wrong recipe, P part of the right one
LEARNS = {"2R1": 3, "2W1": 1, "1R1 3W1": 2, "3W1 2R1": 4, "1P4 2P7 3W1 4R1": 2, "4R1": 4, "0W1": 0}


@pytest.mark.parametrize(("seen", "hops"), LEARNS.items())
def test_the_sandbox_attacker_learns_from_answers(seen, hops):
    answers = {"R": world.REFUSALS[0], "W": "use bami .", "P": "use bami ."}
    rows = [(int(s[0]), answers[s[1]], int(s[2])) for s in seen.split()]
    shown = [{"prompt": "let a mean b . " * 3 * n, "answer": a, "rating": r} for n, a, r in rows]
    (reply,) = SandboxAttacker().refine([Conversation(harmful(1)[0]["prompt"], "", 0, shown)], [5])
    assert reply["prompt"].count("let ") // 3 == hops
