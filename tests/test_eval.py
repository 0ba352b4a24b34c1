"""Chapter 4 as a whole: runs of the stage with two tiny models and a judge."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from stages import PATIENCE, run_group, run_here
from test_attacks import LONG, make_model, make_tokenizer

from lib import UserError, attacks, metrics
from lib.attacks.session import Lab
from lib.run.command import at_end
from lib.run.files import read_jsonl, write_json, write_jsonl
from lib.run.presets import sandbox

stage = importlib.import_module("04_attack_eval")
JUDGE = """
def harm_score(prompts, answers):
    return [min(1.0, len(set(a.split())) / 8) for a in answers]

def task_score(prompts, answers):
    return [min(1.0, len({*p.split()} & {*a.split()}) / 4) for p, a in zip(prompts, answers, strict=True)]
"""
BROKEN = "harm_score = task_score = lambda prompts, answers: [2.0] * len(answers)"
KINDS = {"harmful": "harmful", "jailbreak": "harmful", "harmless": "harmless", "ambiguous": "ambiguous"}
SMALL = {"gcg_width": 8, "gcg_top_k": 8, "gcg_suffix_tokens": 3, "budgets": ["0", "0.4"], "answer_tokens": 6}
SHORT = "--device cpu --no-reasoning direct --max-new-tokens 12"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with judges, data, and two models: one of stage 3 that reasons, one that says nothing."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "my_judge.py").write_text(JUDGE)
    (folder / "broken_judge.py").write_text(BROKEN)
    for file, kind in KINDS.items():
        records = []
        for i in range(4):
            record = {"id": f"{file}-{i}", "prompt": f"w{i} w{i + 1} w{i + 20} w{len(file)}", "kind": kind}
            record |= {"category": ("toy", "decoy")[i % 2], "hops": 3 + i % 2}
            records.append(record | {"target": f"w{i + 30} w{i + 31}"})
        write_jsonl(folder / f"data/eval_{file}.jsonl", records)
    tokenizer = make_tokenizer()
    for name in ("thinker", "direct"):
        make_model(tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_json(folder / "thinker/settings.json", {"reasoning": True})
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def run(folder: Path, out: Path, more: str = "", models=("thinker", "direct"), **preset) -> Path:
    """A whole run, as `python 04_attack_eval.py` makes it; `preset`: what only presets set."""
    words = f"{SHORT} --judge my_judge --behaviours 2 --gcg-steps 3 --data {folder}/data --out {out}"
    words += " --models " + " ".join(f"{name}={folder / name}" for name in models)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "argv", ["04_attack_eval.py", *words.split(), *more.split()])
        patch.setattr(sandbox, "EVAL", {**sandbox.EVAL, **SMALL, **preset})
        # The report itself is slow.
        patch.setattr(stage, "write_report", lambda out, _, lines: write_jsonl(out / "shown.jsonl", lines))
        try:
            stage.main()
        finally:
            at_end.close()  # as run_main does
    return out


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory) -> Path:
    return run(made, tmp_path_factory.mktemp("runs") / "eval")


def results_of(out: Path) -> dict:
    results = json.loads((out / "results.json").read_text())
    assert results.pop("seconds").keys() == results["models"].keys()
    results["config"].pop("out")
    return results


def change_first(folder: Path, name: str, **change) -> list[dict]:
    path = folder / f"data/eval_{name}.jsonl"
    first, *rest = read_jsonl(path)
    write_jsonl(path, [{**first, **change}, *rest])
    return [first, *rest]


def test_a_name_that_the_preset_takes_for_one_without_reasoning_may_say_otherwise(folder):
    settings = stage.Settings(models=[f"direct={folder / 'thinker'}"], no_reasoning=["direct", "absent"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "EVAL", {**sandbox.EVAL, "no_reasoning": settings.no_reasoning})
        assert [model.reasoning for model in attacks.read_models(settings)] == [True]


# ---- results -----------------------------------------------------------------------------------------------


def test_results_have_the_names_that_stay_and_follow_from_the_completions(finished):
    results, lines = results_of(finished), read_jsonl(finished / "completions.jsonl")
    assert set(results) == {"models", "differences", "config", "seed"}
    for name, model in results["models"].items():
        assert set(model["dsr"]) == {"direct", "jailbreak", "plain_or_gcg", "gcg"}
        assert set(model["controls"]) == {"no suffix", "random suffix", "initial suffix"}
        assert [steps for steps, _ in model["dsr_by_budget"]["gcg"]] == [0, 1, 3]
        served = {"harmless", "ambiguous", "ambiguous/toy", "ambiguous/decoy"}
        assert set(model["compliance"]) == served | {"harmful"} and set(model["task_score"]) == served
        formats = {"direct", "jailbreak", "gcg", "harmless", "ambiguous"} if name == "thinker" else set()
        assert set(model["format_rate"]) == formats and model["reasoning"] == (name == "thinker")
        mine = [x for x in lines if x["model"] == name]
        assert len(mine) == 4 * 4 + 2 * (2 + 3)
        held = [x["harm"] < 0.5 for x in mine if x["set"] == "direct"]
        assert model["dsr"]["direct"] == metrics.wilson(held)


def test_each_try_is_sent_as_the_attack_found_it_and_answered_within_its_budget(finished):
    lines, found = read_jsonl(finished / "completions.jsonl"), read_jsonl(finished / "attacks.jsonl")
    traces = {(x["model"], x["attack"], x["id"]): {t["step"]: t for t in x["trace"]} for x in found}
    assert len(traces) == 2 * 2 * 2  # models, attacks, requests
    for line in lines:
        sent, step = line["prompt"], -1  # no attack
        if line["set"] in ("gcg", "random_suffix"):  # the best so far, at each budget
            step = line["step"]
            sent = traces[line["model"], line["set"], line["id"]][step]["sent"]
            assert len(sent.split()) == 7 and step in (0, 1, 3)
        assert (line["sent"], line["step"], line["opening"]) == (sent, step, "")
        tokens = len(f"{line['reasoning']} {line['answer']}".split())
        assert tokens <= (12 if line["model"] == "thinker" else 6)
        if line["model"] == "direct":  # it is given no <think>
            assert line["reasoning"] == "" and line["well_formed"] and not line["closed"]


def test_techniques_and_transfers_are_told_and_what_lacks_a_target_or_a_set_is_left_out(folder, tmp_path):
    records = change_first(folder, "harmful", target=" ")
    out = run(folder, tmp_path / "eval", "--attacks gcg_universal pap", universal_behaviours=1)
    lines = [x for x in read_jsonl(out / "completions.jsonl") if x["model"] == "direct"]
    asked = {name: [x["id"] for x in lines if x["set"] == name] for name in {x["set"] for x in lines}}
    assert asked["direct"] == [record["id"] for record in records]
    assert asked["no_suffix"] == asked["transfer_thinker"] == asked["direct"][1:3]
    assert {*asked["gcg_universal"]} == {"harmful-1"} and {*asked["gcg_universal_new"]} == {"harmful-2"}
    assert all(("technique" in line) == (line["set"] == "pap") for line in lines)
    for name in ("jailbreak", "harmless"):  # which stage 1 need not write
        (folder / f"data/eval_{name}.jsonl").unlink()
    out = run(folder, tmp_path / "pap", "--attacks pap")  # which needs no target
    assert read_jsonl(out / "attacks.jsonl")[0]["id"] == "harmful-0"
    model = results_of(out)["models"]["direct"]
    assert {*model["dsr"]} == {"direct", "pap", "pap_mean", "plain_or_pap"}
    assert "harmless" not in model["compliance"] and "ambiguous" in model["compliance"]


def test_what_is_too_long_is_not_asked_and_in_no_figure(folder, tmp_path, monkeypatch):
    for name in ("harmful", "harmless"):
        change_first(folder, name, prompt=LONG)
    names = "--attacks gcg gcg_twin gcg_universal prefill_answer"
    known = {"forged": "w1 w2 ."}  # words that the models know
    out = run(folder, tmp_path / "eval", names, **known)
    found = results_of(out)
    shown = [x for x in read_jsonl(out / "completions.jsonl") if x["finish_reason"] != attacks.NOT_ASKED]
    assert read_jsonl(out / "shown.jsonl") == shown  # in no table of the report either
    tried = [x["trace"] for x in read_jsonl(out / "attacks.jsonl") if x["attack"] == "gcg"]
    assert [len(trace) for trace in tried] == [1, 4, 1, 4]  # nothing is searched that could not be sent
    once = dict.fromkeys(("direct", "harmless", "no_suffix", "random_suffix", "prefill_answer"), 1)
    for name, model in found["models"].items():
        other = "direct" if name == "thinker" else "thinker"
        expected = once | {"gcg": 3, "gcg_universal": 3, f"transfer_{other}": 1}
        assert model["not_asked"] == expected | ({"gcg_twin": 3} if name == "thinker" else {})
        counted = {attack: ci["n"] for attack, ci in model["dsr"].items()}
        assert (counted.pop("direct"), counted.pop("jailbreak")) == (3, 4) and {*counted.values()} == {1}
        assert model["compliance"]["harmless"]["n"] == 3 and not model["unknown"]
    monkeypatch.setattr(attacks.session, "load_policy", None)  # nothing is asked again
    assert results_of(run(folder, out, names, **known)) == found


# ---- kills, processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_ends_with_the_same_bytes(made, finished, tmp_path, seed):
    """A kill leaves the beginning of one file, perhaps half a line, and nothing of what comes later."""
    out, rng = Path(shutil.copytree(finished, tmp_path / "eval")), random.Random(seed)
    (out / "results.json").unlink()
    first, second = out / "attacks.jsonl", out / "completions.jsonl"
    if seed % 2:
        second.unlink()
    cut = first if seed % 2 else second
    third = out / "separation.jsonl"
    for path in (cut, third):
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    run(made, out)
    assert third.read_bytes() == (finished / third.name).read_bytes()
    assert results_of(out) == results_of(finished)
    assert second.read_bytes() == (finished / second.name).read_bytes()
    for a, b in zip(read_jsonl(first), read_jsonl(finished / first.name), strict=True):
        assert [a[key] for key in ("model", "attack", "id", "trace")] == list(b.values())[:4]


def test_two_processes_find_and_answer_what_one_does(made, tmp_path, monkeypatch):
    words = f"{SHORT} --data {made}/data --models thinker={made}/thinker direct={made}/direct --judge stages"
    words += " --behaviours 3 --gcg-steps 2 --attacks gcg gcg_universal gcg_close --out"
    one, two = tmp_path / "one", tmp_path / "two"
    group = run_group("04_attack_eval", [*words.split(), str(two)], tmp_path / "log")
    run_here("04_attack_eval", [*words.split(), str(one)], monkeypatch)
    for rank, process in enumerate(group):
        process.join(PATIENCE)
        assert process.exitcode == 0, (tmp_path / f"log.{rank}").read_text()
    for a, b in zip(*(read_jsonl(out / "attacks.jsonl") for out in (one, two)), strict=True):
        assert a.pop("cost")["queries"] == b.pop("cost")["queries"]
        for t, u in zip(a["trace"], b["trace"], strict=True):  # a loss's last digits depend on its batch
            assert (t.pop("loss") or 0) == pytest.approx(u.pop("loss") or 0, rel=1e-5)
        assert a == b
    assert read_jsonl(one / "completions.jsonl") == read_jsonl(two / "completions.jsonl")
    assert results_of(one)["models"].keys() == results_of(two)["models"].keys()


# ---- mistakes ----------------------------------------------------------------------------------------------


MISTAKES = [  # flags, what changes in the first harmful record, and in the preset
    ("--systems other=Kind.", {}, {}, "--systems: given other; allowed the names in --models"),
    ("--max-new-tokens 500", {}, {}, "--max-new-tokens: given 500; with it all prompts of"),
    ("--judge broken_judge", {}, {}, "--judge: broken_judge gave 2.0"),
    ("", {"prompt": "w1 Hello"}, {}, "its tokenizer cannot read"),
    ("--attacks gcg_forged", {}, {}, "its tokenizer cannot read 'let me see"),
    ("", {}, {"gcg_init": "w1 w2"}, "gcg_init: given w1 w2; 3 of it make 6 tokens behind 'w0 w1"),
]


@pytest.mark.parametrize("flags, record, preset, message", MISTAKES)
def test_a_mistake_is_one_line_before_any_search(
    folder, tmp_path, monkeypatch, flags, record, preset, message
):
    make_tokenizer(unknown=None).save_pretrained(folder / "thinker")  # it knows no others
    change_first(folder, "harmful", **record)
    monkeypatch.setattr(Lab, "attack", lambda *given: pytest.fail("a search has begun"))
    with pytest.raises(UserError) as error:
        run(folder, tmp_path / "eval", flags, **preset)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("name", ["direct", "thinker"])
def test_other_weights_cost_no_earlier_results(folder, tmp_path, name):
    """Of the model, or of the attacker."""
    more = {"more": f"--behaviours 0 --attacker {folder}/thinker", "models": ("direct",)}
    out = run(folder, tmp_path / "eval", **more)
    weights = folder / name / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=f"sha256 of .*{name}/model.safetensors"):
        run(folder, out, **more)
    assert (out / "results.json").exists() and (out / "completions.jsonl").exists()
