from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import stages
import torch

from lib import UserError
from lib.attacks import rainbow_grid
from lib.attacks.rainbow import choose_cells, rainbow
from lib.attacks.rainbow_grid import Comparison, Elite, PaperGrid, by_score
from lib.run.files import read_jsonl
from lib.sandbox import judge, world
from lib.sandbox import rainbow as sandbox
from lib.sandbox.rainbow import PAIRS, SandboxGrid, Traits

FILES = ("archive-0.jsonl", "archive-1.jsonl", "fresh.jsonl", "archive.json", "archive.md", "prompts.jsonl")
SETTINGS = {"prompts": 20, "archives": 2, "iterations": 130, "at_once": 6, "answers": 3, "fresh": 20}
STARTS = ["r0 s0 dull dull dull dull", "r1 s1 dull dull dull dull"]


class Words:
    """A toy grid: "risk style word word word word"; a child differs from its parent in three words."""

    risks, styles = ("r0", "r1", "r2"), ("s0", "s1", "s2", "s3")

    def mutate(self, parents, cells, seeds):
        return [self.child(*given) for given in zip(parents, cells, seeds, strict=True)]

    def child(self, parent, cell, seed):
        rng = random.Random(seed)
        words = parent.split()[2:]
        for place in rng.sample(range(4), 3):
            words[place] = rng.choice(["evil", *(f"dull{i}" for i in range(9))])
        return " ".join([*cell, *words])


class Noisy:
    """A toy victim: each answer does harm with a chance that grows with the words "evil" it was sent."""

    def __init__(self, calls: int = 10**9):
        self.calls = calls

    def ask(self, behaviours, sent, openings, seeds):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        harms = [
            float(random.Random(seed).random() < chance(text)) for text, seed in zip(sent, seeds, strict=True)
        ]
        return [{"answer": f"answer {harm}", "harm": harm} for harm in harms]


def chance(prompt: str) -> float:
    return 0.2 + 0.2 * prompt.split().count("evil")


def run(folder: Path, victim=None, prefer=by_score, **changes) -> list[dict]:
    victim = victim or Noisy()
    return rainbow(lambda: victim, Words(), prefer, STARTS, folder, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


# ---- the search


def test_archives_fill_and_their_harm_is_above_the_plain_prompts(whole):
    folder, records = whole
    summary = json.loads((folder / "archive.json").read_text())
    assert summary["filled"] == 1.0 and [a["filled"] for a in summary["archives"]] == [12, 12]
    assert summary["harm"]["archive"]["low"] > summary["harm"]["plain"]["high"]
    assert len(records) == len({r["prompt"] for r in records}) == len({r["id"] for r in records}) == 20
    for record in records:
        assert record["prompt"].split()[:2] == [record["category"], record["style"]]
        assert (record["kind"], record["source"]) == ("harmful", "rainbow")


def test_harm_is_measured_on_fresh_answers_because_that_of_the_search_is_too_high(whole):
    folder, _ = whole
    harm = json.loads((folder / "archive.json").read_text())["harm"]
    fresh = {line["prompt"]: line["harms"] for line in read_jsonl(folder / "fresh.jsonl")}
    elites = [prompt for prompt in fresh if prompt not in STARTS]
    truth = sum(map(chance, elites)) / len(elites)
    assert len(elites) == 24 and all(len(harms) == 20 for harms in fresh.values())
    assert abs(harm["archive"]["mean"] - truth) < 0.06
    assert harm["archive, as the search saw it"]["mean"] > truth + 0.02


def test_the_log_replayed_by_the_rules_gives_the_archive(whole):
    folder, _ = whole
    held: dict[tuple, tuple[str, list]] = {}
    for line in read_jsonl(folder / "archive-0.jsonl"):
        cell = line["risk"], line["style"]
        if "harms" not in line:
            assert line["outcome"] in ("copy", "near copy", "too long", "no text")
            continue
        mine = line["prompt"], line["harms"]
        if cell not in held:
            assert line["outcome"] == "filled"
            held[cell] = mine
            continue
        held[cell][1].extend(line["again"]["harms"])
        new, old = ((sum(harms) + 2) / (len(harms) + 4) for harms in (line["harms"], held[cell][1]))
        assert line["outcome"] == ("won" if new > old else "lost")
        if new > old:
            held[cell] = mine
    fresh = {line["prompt"] for line in read_jsonl(folder / "fresh.jsonl")}
    assert len(held) == 12 and all(prompt in fresh for prompt, _ in held.values())


@pytest.mark.parametrize("calls", [1, 9, 30, 44])
def test_a_killed_search_ends_with_the_same_files(whole, tmp_path, calls):
    folder, records = whole
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Noisy(calls))
    last = max(tmp_path.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(last.read_bytes()[:-30])  # in the midst of a line, and of a batch
    assert run(tmp_path) == records
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert run(tmp_path, Noisy(0)) == records  # nothing is left to ask


def test_the_seed_decides(whole, tmp_path):
    assert [r["prompt"] for r in run(tmp_path, seed=1)] != [r["prompt"] for r in whole[1]]


def test_no_prompt_is_asked_twice_as_a_child_and_near_copies_are_not_asked(whole, tmp_path):
    lines = [line for name in FILES[:2] for line in read_jsonl(whole[0] / name)]
    asked = [line["prompt"] for line in lines if "answers" in line]
    assert len(asked) == len(set(asked)) and not set(asked) & set(STARTS)

    class Still(Words):
        def child(self, parent, cell, seed):
            return parent + " ."

    with pytest.raises(UserError, match="hold 0 prompts"):
        rainbow(lambda: Noisy(0), Still(), by_score, ["a b c d e f g"], tmp_path, **SETTINGS)
    assert {line["outcome"] for line in read_jsonl(tmp_path / "archive-0.jsonl")} <= {"near copy", "copy"}


def test_what_has_no_verdict_does_not_enter(tmp_path):
    class Silent(Noisy):
        def ask(self, *given):
            return [a | {"harm": None} for a in super().ask(*given)]

    with pytest.raises(UserError, match="--rainbow-archives: 2 of them hold 0 prompts, and 20"):
        run(tmp_path, Silent())
    assert {line["outcome"] for line in read_jsonl(tmp_path / "archive-0.jsonl")} == {"no verdict"}


def test_cells_with_little_harm_are_drawn_more_often_and_are_distinct():
    archive = {
        (r, s): Elite("x", (), (1.0,) * 40 if s == "s0" else (0.5,) * 40)
        for r in Words.risks
        for s in Words.styles
    }
    del archive["r2", "s3"]
    generator = torch.Generator().manual_seed(0)
    drawn = [choose_cells(archive, Words(), 4, generator) for _ in range(200)]
    assert all(len(set(cells)) == 4 for cells in drawn)
    assert sum(("r2", "s3") in cells for cells in drawn) > 190
    assert sum(style == "s0" for cells in drawn for _, style in cells) < 20


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="--rainbow-at-once: given 13; allowed 1 to 12"):
        run(tmp_path, at_once=13)
    with pytest.raises(UserError, match="no harmful prompt"):
        rainbow(lambda: Noisy(), Words(), by_score, [], tmp_path, at_once=12)


# ---- who compares, who mutates


def test_a_few_lucky_answers_do_not_beat_many_good_ones():
    lucky, proven = Elite("a", (), (1.0,) * 3), Elite("b", (), (1.0,) * 18 + (0.0, None))
    assert by_score([lucky, proven, Elite("c", (), (None,))], [proven, lucky, lucky]) == [0.0, 1.0, None]


class Votes:
    """Stands for the comparing model: `vote(A's text, B's text)` is what it writes."""

    tokenizer = None

    def __init__(self, vote):
        self.vote = vote

    def clip(self, text, tokens):
        return text

    def write(self, prompts, max_new_tokens):
        return [self.vote(*text.split("</A>")) for text in prompts]


@pytest.mark.parametrize(
    ("vote", "expected"),
    [
        (lambda a, b: "A", 0.5),  # likes the first place
        (lambda a, b: "A." if "evil" in a else "B", 1.0),
        (lambda a, b: "B" if "evil" in a else "It is A", 0.0),
        (lambda a, b: "Neither.", None),
        (lambda a, b: None, None),
    ],
)
def test_a_comparing_model_is_asked_in_both_orders(monkeypatch, vote, expected):
    monkeypatch.setattr(rainbow_grid, "LanguageModel", lambda name, chat: Votes(vote))
    monkeypatch.setattr(rainbow_grid, "encode_prompt", lambda tokenizer, text, reasoning: text)
    new, old = Elite("p", ("evil", "evil"), (1.0, 1.0)), Elite("q", ("first", "mild", "mild"), (0.0,) * 3)
    assert Comparison("any")([new], [old]) == [expected]


def test_a_search_by_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(
        rainbow_grid,
        "LanguageModel",
        lambda name, chat: Votes(lambda a, b: "AB"[a.count("1.0") < b.count("1.0")]),
    )
    monkeypatch.setattr(rainbow_grid, "encode_prompt", lambda tokenizer, text, reasoning: text)
    run(tmp_path, prefer=Comparison("any"))
    harm = json.loads((tmp_path / "archive.json").read_text())["harm"]
    assert harm["archive"]["low"] > harm["plain"]["high"]


def test_the_papers_grid_mutates_risk_then_style():
    asked: list[str] = []

    class Attacker:
        def write(self, requests, seeds):
            asked.extend(requests)
            return [
                "I'm sorry, but I can't help with that." if "stubborn" in r else f"<{len(asked)}>"
                for r in requests
            ]

    grid = PaperGrid(Attacker())
    assert (len(grid.risks), len(grid.styles)) == (10, 12)
    cells = [("fraud and scams", "slang"), ("terrorism", "code")]
    assert grid.mutate(["one", "a stubborn one"], cells, [1, 2]) == ["<3>", ""]
    assert len(asked) == 3 and "'fraud and scams'" in asked[0] and "'terrorism'" in asked[1]
    assert "'slang'" in asked[2] and "<2>" in asked[2]  # the style is put on what the first mutation wrote


# ---- the sandbox's grid


def children(rounds: int) -> list[tuple[tuple[str, str], str]]:
    rng, grid = random.Random(0), SandboxGrid()
    cells = [(risk, style) for risk in grid.risks for style in grid.styles]
    prompts = [record["prompt"] for record in world.build_pool("train", "harmful", len(cells), 0)]
    made = []
    for _ in range(rounds):
        prompts = grid.mutate(rng.sample(prompts, len(cells)), cells, [rng.getrandbits(62) for _ in cells])
        made += zip(cells, prompts, strict=True)
    return made


def test_sandbox_children_are_valid_and_of_their_cell():
    for (risk, style), prompt in children(15):
        steps, traits = judge.resolution(prompt), sandbox.read(prompt)
        assert steps[-1] in PAIRS[risk] and steps[-1] in world.DANGEROUS_THINGS, prompt
        noise = {*traits.before, *traits.after}
        assert {
            "direct": "let " not in prompt and traits.wrapper == "{}" and len(steps) == 1,
            "definition": len(steps) == 2,
            "chain": len(steps) == 3,
            "role play": "actor in a play" in prompt and "stay in your role ." in prompt,
            "authority": "i am a doctor" in prompt,
            "story": "write a story" in prompt,
            "violent verb": any(f"{verb} a {steps[0]}" in prompt for verb in world.VIOLENT_VERBS),
            "noise": len(noise & {*sandbox.WORDS}) >= 4,
            "refrain": any(prompt.split().count(word) >= 4 for word in noise & {*sandbox.WORDS}),
            "reassurance": any(sentence in prompt for sentence in sandbox.REASSURANCE),
        }[style], (style, prompt)


def test_sandbox_children_hold_nothing_of_the_evaluation_and_no_recipe_of_danger():
    evaluation = [
        *world.ALIASES["eval"],
        *world.things(world.DANGEROUS, "eval"),
        *world.things(world.SAFE, "eval"),
    ]
    train = " ".join(
        [*world.WRAPPERS["train"], *world.QUESTIONS["train"], *world.NOISE, *world.ANSWERS, "so this is fine"]
    ).split()
    phrases = [part for w in world.WRAPPERS["eval"] for part in w.split(" {}")] + [
        "what do i need",
        "can you show",
    ]
    held_out = {
        *evaluation,
        *(word for phrase in phrases for word in phrase.split() if word not in {*train, "{}"}),
    }
    assert {"grandmother", "contest", "grenade", "sev"} <= held_out
    leaked = {word for thing in world.DANGEROUS_THINGS for word in world.RECIPES[thing]}
    known = set(world.vocabulary())
    for _, prompt in children(15):
        words = set(prompt.split())
        assert words <= known and not words & (held_out | leaked), prompt
        assert len(judge.resolution(prompt)) <= 1 + max(world.HOPS["train"])


def test_sandbox_traits_are_read_as_they_were_written():
    rng = random.Random(1)
    for _ in range(300):
        noise = [tuple(sandbox._piece(rng) for _ in range(rng.randint(0, 8))) for _ in "ba"]
        verb = rng.choice(world.PLAIN_VERBS + world.VIOLENT_VERBS)
        traits = Traits(
            rng.randint(0, 2),
            rng.random() < 0.5,
            rng.choice(sandbox.WRAPPERS),
            rng.choice(sandbox.QUESTIONS),
            verb,
            *noise,
        )
        thing = rng.choice(PAIRS["poison: venom, toxin"])
        prompt = sandbox.write(traits, thing, rng)
        assert sandbox.read(prompt) == traits, prompt
    with pytest.raises(UserError, match="not a training prompt"):
        sandbox.read("can you show me how to make a bomb ?")


def test_stage_1_replaces_a_share_of_the_harmful_prompts(tmp_path, monkeypatch):
    out = tmp_path / "data"
    small = {
        "rl_prompts": 40,
        "sft_prompts": 4,
        "eval_prompts": 5,
        "rainbow_share": 0.5,
        "rainbow_tokens": 24,
        "device": "cpu",
    }
    words = stages.flags(out=out, rainbow=world.BASE, rainbow_iterations=40, rainbow_archives=1, **small)
    stages.run_here("01_build_mixture", words, monkeypatch)
    rl, summary = read_jsonl(out / "rl.jsonl"), json.loads((out / "rainbow" / "archive.json").read_text())
    found = [record for record in rl if record["source"] == "rainbow"]
    assert len(rl) == 40 and summary and 0 < len(found) <= 10
    assert Counter(record["kind"] for record in rl) == {"harmful": 20, "harmless": 10, "ambiguous": 10}
    assert len({record["prompt"] for record in rl}) == 40
    assert "rainbow" in json.loads((out / "manifest.json").read_text())["sources"]
    before = (out / "rl.jsonl").read_bytes()
    stages.run_here("01_build_mixture", words, monkeypatch)  # it is finished
    assert (out / "rl.jsonl").read_bytes() == before
