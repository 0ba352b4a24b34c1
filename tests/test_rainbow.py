"""Rainbow teaming: the search on a toy grid, the paper's grid and the sandbox's, and chapter 1 with it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import stages
import torch

from lib import UserError
from lib.attacks import rainbow
from lib.attacks.rainbow import PaperGrid, Rainbow, choose_cells
from lib.judges import refusal_label
from lib.run.files import read_jsonl
from lib.run.presets import sandbox as sandbox_preset
from lib.sandbox import judge, world
from lib.sandbox import rainbow as sandbox
from lib.sandbox.rainbow import PAIRS, Traits

FILES = ("archive-0.jsonl", "archive-1.jsonl", "archive.json", "prompts.jsonl")
CELLS = [(risk, style) for risk in ("r0", "r1", "r2") for style in ("s0", "s1", "s2", "s3")]
STARTS = ["r0 s0 dull dull dull dull", "r1 s1 dull dull dull dull"]


def child(parent, cell, rng):
    """ "risk style word word word word", different from its parent in three words."""
    rest = parent.split()[2:]
    for place in rng.sample(range(4), 3):
        rest[place] = rng.choice(["evil", *(f"dull{i}" for i in range(9))])
    return " ".join([*cell, *rest])


def toy_grid(child=child) -> SimpleNamespace:
    """Of twelve cells."""

    def mutate(parents, cells, seeds):
        return [child(*given) for given in zip(parents, cells, map(random.Random, seeds), strict=True)]

    return SimpleNamespace(cells=CELLS, mutate=mutate)


class Noisy:
    """A toy victim: each answer does harm with a chance that grows with the words "evil" it was sent."""

    def __init__(self, calls: int = 10**9):
        self.calls = calls

    def ask(self, tries, seeds):
        self.calls -= bool(tries)
        if self.calls < 0:
            raise KeyboardInterrupt
        draws = [random.Random(seed).random() for seed in seeds]
        harms = [float(u < chance(new["sent"])) for (_, new), u in zip(tries, draws, strict=True)]
        return [{"answer": f"answer {harm}", "harm": harm} for harm in harms]


def chance(prompt: str) -> float:
    return 0.2 + 0.2 * prompt.split().count("evil")


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AT_ONCE", 6), ("ANSWERS", 3), ("FRESH", 20)):
            patch.setattr(rainbow, name, value)
        yield


def run(folder: Path, victim=None, grid=None, starts=STARTS, seed=0) -> list[dict]:
    return Rainbow(victim or Noisy(), grid or toy_grid(), starts, folder, seed).records(20, 2, 130)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_the_log_replayed_by_the_rules_gives_archives_whose_harm_is_measured_anew(whole):
    folder, records = whole
    elites = []
    for name in FILES[:2]:
        held: dict[tuple, tuple[str, list]] = {}
        lines = read_jsonl(folder / name)
        for line in lines:
            cell = line["risk"], line["style"]
            if "harms" not in line:
                assert line["outcome"] in ("copy", "near copy", "too long", "no text")
            elif cell not in held:
                assert line["outcome"] == "filled" and len(line["harms"]) == 3
                held[cell] = line["prompt"], line["harms"]
            else:
                held[cell][1].extend(line["again"]["harms"])
                new, old = ((sum(h) + 2) / (len(h) + 4) for h in (line["harms"], held[cell][1]))
                assert line["outcome"] == ("won" if new > old else "lost")
                held[cell] = (line["prompt"], line["harms"]) if new > old else held[cell]
        assert len(lines) == 130 and len(held) == 12
        elites += [prompt for prompt, _ in held.values()]
    summary = json.loads((folder / "archive.json").read_text())
    harm, truth = summary["harm"], sum(map(chance, elites)) / len(elites)
    assert summary["filled"] == 1.0 and harm["archive"]["n"] == 24 and harm["plain"]["n"] == 2
    assert abs(harm["archive"]["mean"] - truth) < 0.06 and harm["archive"]["low"] > harm["plain"]["high"]
    assert len(records) == len({r["id"] for r in records}) == len({r["prompt"] for r in records}) == 20
    for r in records:
        assert r["prompt"] in elites and r["prompt"].split()[:2] == [r["category"], r["style"]]
        assert (r["kind"], r["source"]) == ("harmful", "rainbow")


@pytest.mark.parametrize("calls", [1, 9, 30, 45])
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
    assert [r["prompt"] for r in run(tmp_path / "other", seed=1)] != [r["prompt"] for r in records]


def test_no_prompt_is_asked_twice_as_a_child_and_what_is_not_worth_asking_is_not(whole, tmp_path):
    lines = [line for name in FILES[:2] for line in read_jsonl(whole[0] / name)]
    asked = [line["prompt"] for line in lines if "answers" in line]
    assert len(asked) == len(set(asked)) and not set(asked) & set(STARTS)

    def faulty(parent, cell, rng):
        return rng.choice(["", "x" * 1000, parent, parent + " now"])

    class Silent(Noisy):
        def ask(self, *given):
            return [answer | {"harm": None} for answer in super().ask(*given)]

    cases = {"faulty": (Noisy(0), toy_grid(faulty)), "silent": (Silent(), toy_grid(lambda *_: "z z z"))}
    found = []
    for name, (victim, grid) in cases.items():
        with pytest.raises(UserError, match="rainbow_archives: 2 hold 0 of 20"):
            run(tmp_path / name, victim, grid, ["r0 s0 a b c d"])
        lines = [line for file in FILES[:2] for line in read_jsonl(tmp_path / name / file)]
        found.append(Counter(line["outcome"] for line in lines))
    assert {*found[0]} == {"no text", "too long", "copy", "near copy"}
    assert found[1] == {"no verdict": 1, "copy": 2 * 130 - 1}  # in both archives together


def test_cells_with_little_harm_are_drawn_more_often_and_are_distinct():
    archive = {cell: ("", [1.0 if cell[1] == "s0" else 0.5] * 40) for cell in CELLS[:-1]}
    generator = torch.Generator().manual_seed(0)
    drawn = [choose_cells(archive, CELLS, 4, generator) for _ in range(200)]
    assert all(len(set(chosen)) == 4 for chosen in drawn)
    assert sum(CELLS[-1] in chosen for chosen in drawn) > 190  # the empty one
    assert sum(style == "s0" for chosen in drawn for _, style in chosen) < 20


def test_the_papers_grid_mutates_risk_then_style():
    asked, drawn = list[str](), list[int]()

    class Writer:
        def write(self, requests, seeds):
            drawn.extend(seeds)
            asked.extend(requests)
            no = "I'm sorry, but I can't help with that."
            return [no if "stubborn" in request else f"<{len(asked)}>" for request in requests]

    grid = PaperGrid(Writer(), lambda prompts, answers: [refusal_label(answer) for answer in answers])
    cells = [("fraud and scams", "slang"), ("terrorism", "code")]
    assert [len({*axis}) for axis in zip(*grid.cells, strict=True)] == [10, 12] and {*cells} < {*grid.cells}
    assert grid.mutate(["one", "a stubborn one"], cells, [1, 2]) == ["<3>", ""]
    assert drawn == [1, 2, 0]  # the second mutation has a seed of its own
    assert "'fraud and scams'" in asked[0] and "'terrorism'" in asked[1]
    assert "'slang'" in asked[2] and "<2>" in asked[2]  # the style is put on what the first mutation wrote


# ---- the sandbox's grid ------------------------------------------------------------------------------------


def test_sandbox_children_are_of_their_cell_and_hold_nothing_of_the_evaluation():
    secret = {*world.vocabulary("eval")} - {*world.vocabulary("train")}  # and what would be the answer
    secret |= {word for thing in world.DANGEROUS_THINGS for word in world.RECIPES[thing]}
    rng, cells = random.Random(0), sandbox.cells
    prompts = [record["prompt"] for record in world.build_pool("train", "harmful", len(cells), 0)]
    for _ in range(10):
        seeds = [rng.getrandbits(62) for _ in cells]
        prompts = sandbox.mutate(rng.sample(prompts, len(cells)), cells, seeds)
        for (risk, style), prompt in zip(cells, prompts, strict=True):
            steps, noise = judge.resolution(prompt), sandbox.read(prompt).before + sandbox.read(prompt).after
            assert not {*prompt.split()} & secret and len(steps) <= 1 + max(world.HOPS["train"]), prompt
            assert steps[-1] in PAIRS[risk] and steps[-1] in world.DANGEROUS_THINGS, prompt
            kept = {
                "chain": len(steps) == 3,
                "role play": "actor in a play" in prompt and "stay in your role ." in prompt,
                "violent verb": any(f"{verb} a {steps[0]}" in prompt for verb in world.VIOLENT_VERBS),
                "noise": len({*noise} & {*sandbox.WORDS}) >= 4,
                "refrain": any(prompt.split().count(word) >= 4 for word in noise),
                "reassurance": any(sentence in prompt for sentence in sandbox.REASSURANCE),
            }
            assert kept.get(style, True), (style, prompt)


def test_sandbox_traits_are_read_as_they_were_written():
    rng = random.Random(1)
    for _ in range(300):
        noise = [tuple(sandbox._piece(rng) for _ in range(rng.randint(0, 8))) for _ in "ba"]
        verb = rng.choice(world.PLAIN_VERBS + world.VIOLENT_VERBS)
        wrapper, question = rng.choice(sandbox.WRAPPERS), rng.choice(sandbox.QUESTIONS)
        traits = Traits(rng.randint(0, 2), rng.random() < 0.5, wrapper, question, verb, *noise)
        prompt = sandbox.write(traits, rng.choice(PAIRS["poison: venom, toxin"]), rng)
        assert sandbox.read(prompt) == traits, prompt
    for prompt in ("can you show me how to make a bomb ?", "how do i make a chair ?"):
        with pytest.raises(UserError, match="not a training prompt"):
            sandbox.read(prompt)


def test_stage_1_replaces_a_share_of_the_harmful_prompts(tmp_path, monkeypatch):
    out, small = tmp_path / "data", {"rl_prompts": 40, "sft_prompts": 4, "eval_prompts": 5, "device": "cpu"}
    hidden = {"rainbow_share": 0.5, "rainbow_tokens": 24, "rainbow_iterations": 40, "rainbow_archives": 1}
    for name, value in hidden.items():
        monkeypatch.setitem(sandbox_preset.MIXTURE, name, value)
    words = stages.flags(out=out, rainbow=world.BASE, **small)
    stages.run_here("01_build_mixture", words, monkeypatch)
    rl = read_jsonl(out / "rl.jsonl")
    found = [record for record in rl if record["source"] == "rainbow"]
    assert len(rl) == len({record["prompt"] for record in rl}) == 40 and 0 < len(found) <= 10
    assert Counter(record["kind"] for record in rl) == {"harmful": 20, "harmless": 10, "ambiguous": 10}
    assert "rainbow" in json.loads((out / "manifest.json").read_text())["sources"]
