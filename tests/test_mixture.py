"""Chapter 1: counts, shares, order; above all, no prompt is in two sets; from the sandbox and from files."""

from __future__ import annotations

import importlib
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import stages
from test_sources import aegis, chat, wild, write_rows

from lib.judges import load_judge
from lib.rewards import KINDS
from lib.run.files import read_jsonl, sha256_file, write_jsonl
from lib.run.presets import paper, sandbox
from lib.run.text import same_prompt
from lib.sandbox.world import BASE
from lib.sources import EVAL_SETS, parse_word

stage = importlib.import_module("01_build_mixture")
SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="real data in ../shared/data is not there")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """build("name", "--flag value ...", values of the preset) -> {file: its records}."""

    def run(name: str, line: str, **preset: object) -> dict[str, list[dict]]:
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "MIXTURE", {**sandbox.MIXTURE, "eval_prompts": 20, **preset})
            stages.run_here("01_build_mixture", f"--out {tmp_path / name} {line}".split(), patch)
        return {path.stem: read_jsonl(path) for path in (tmp_path / name).glob("*.jsonl")}

    return run


@pytest.fixture
def files(tmp_path) -> str:
    """Flags for 12 prompts of each kind, in a dress of their own."""
    for kind in KINDS:
        texts = [f"tell {kind} \u201c{i}\u201d \u2014 now" for i in range(12)]
        rows = [{"prompt": text, "hops": i, "mark": "own"} for i, text in enumerate(texts)]
        write_jsonl(tmp_path / f"{kind}.jsonl", rows)
    return "--source files --files " + " ".join(f"{kind}={tmp_path / kind}.jsonl" for kind in KINDS)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def assert_no_leak(sets: dict[str, list[dict]]) -> None:
    """No prompt, whatever its dress, is in two sets; sft_rl has traces of rl's."""
    prompts = {name: {same_prompt(record["prompt"]) for record in records} for name, records in sets.items()}
    for one, other in itertools.combinations(sorted(prompts.keys() - {"sft_rl"}), 2):
        assert not prompts[one] & prompts[other], (one, other)
    assert prompts.get("sft_rl", set()) <= prompts["rl"]
    assert all(len({r["id"] for r in records}) == len(records) for records in sets.values())


# ---- the mixture ----


def test_the_sandboxs_mixture_is_as_asked_for_and_a_function_of_the_seed(tmp_path, build):
    line = "--lambda-harmful 0.3 --rl-prompts 200 --sft-prompts 30"
    sets = build("a", line)
    assert Counter(r["kind"] for r in sets["rl"]) == {"harmful": 60, "harmless": 70, "ambiguous": 70}
    assert {r["kind"] for r in sets["rl"][:60]} == set(KINDS), "in random order"
    assert len(sets["sft"]) == 120 and {r["kind"] for r in sets["sft"]} == {"harmful"}
    assert {name for name in sets if len(sets[name]) == 20} == {f"eval_{name}" for name in EVAL_SETS}
    assert_no_leak(sets)
    assert manifest(tmp_path / "a")["files"]["rl.jsonl"]["sha256"] == sha256_file(tmp_path / "a" / "rl.jsonl")
    assert build("b", line) == sets and build("c", f"{line} --seed 1") != sets


def test_a_larger_lambda_keeps_traces_and_evaluation_and_takes_more_of_the_same_prompts(build):
    low, high = (build(s, f"--rl-prompts 100 --sft-prompts 10 --lambda-harmful {s}") for s in ("0.1", "0.9"))
    harmful = [{r["prompt"] for r in sets["rl"] if r["kind"] == "harmful"} for sets in (low, high)]
    assert low | {"rl": []} == high | {"rl": []} and len(harmful[0]) == 10 and harmful[0] <= harmful[1]


def test_no_prompt_of_files_is_in_two_sets_whatever_its_dress(tmp_path, build, files):
    """Evaluation has the harmful prompts 0 to 4, SFT two of 5 to 7, which have traces, RL what is left."""
    held = [f"Tell harmful\u00a0'{i}' - n\u200bow!" for i in range(5)]
    more = ["Tell  harmful '8' - now", "x" * 1000, "x" * 999, " "]
    own = {"kind": "harmful", "mark": "own", "hops": 8}
    rows = {"held": [{"prompt": text, **own} for text in held], "more": [{"prompt": t, **own} for t in more]}
    rows["traces"] = [{"prompt": "x" * 1000, "reasoning": "t", "answer": "a"}]
    rows["traces"] += [{"prompt": "p", "reasoning": "t", "answer": " "}]
    rows["traces"] += [{"prompt": f"q{i}", "reasoning": "<think></think>", "answer": "a"} for i in range(9)]
    answers = ("a0", "a1", "a2", "</think>")  # of a prompt two whole ones, one empty, one that closes twice
    for i, k in itertools.product(range(3, 8), range(4)):
        trace = {"reasoning": f"<think>\nt{k}\n</think>" * (k != 1), "answer": answers[k]}
        rows["traces"].append({"prompt": f"TELL HARMFUL '{i}' - now", **trace})
    for name in rows:
        write_jsonl(tmp_path / f"{name}.jsonl", rows[name])
    line = f"{files} {tmp_path}/more.jsonl --eval-files {tmp_path}/held.jsonl --rl-prompts 6"
    line += f" --trace-files {tmp_path}/traces.jsonl --sft-prompts 2 --rl-traces 8 --lambda-harmful 1"
    sets = build("out", line, traces_per_prompt=1)
    assert_no_leak(sets)
    assert Counter((r["reasoning"], r["answer"]) for r in sets["sft"]) == {("t0", "a0"): 2}
    assert sorted(r["hops"] for r in sets["rl"])[1:] == [8, 8, 9, 10, 11], "8: also x, not long enough"
    assert [(r["reasoning"], r["answer"]) for r in sets["sft_rl"]] == [("t0", "a0"), ("t2", "a2")]
    sizes = {name: len(records) for name, records in sets.items() if name.startswith("eval")}
    assert sizes == {"eval_harmful": 5, "eval_harmless": 6, "eval_ambiguous": 6}, "those without a file: half"
    records = [record for name in sets if "sft" not in name for record in sets[name]]
    assert all(record["mark"] == "own" for record in records), "fields of their own"
    dropped = manifest(tmp_path / "out")["dropped"]
    assert 5 <= dropped.pop("in evaluation") <= 7
    assert dropped.pop("trace with a marker inside") == 5
    assert dropped == {"empty trace": 15, "too long": 2, "in SFT": 2, "duplicate": 1, "empty": 1}
    other = build("other", f"{line} --seed 1")["eval_harmless"]
    assert {r["prompt"] for r in other} != {r["prompt"] for r in sets["eval_harmless"]}, "the seed's choice"


def test_sft_learns_from_harmful_prompts_alone_whatever_else_has_traces(tmp_path, build, files):
    texts = {kind: [f"tell {kind} \u201c{i}\u201d \u2014 now" for i in range(12)] for kind in KINDS}
    rows = {kind: [{"prompt": p, "reasoning": "t", "answer": "a"} for p in texts[kind]] for kind in KINDS}
    write_jsonl(tmp_path / "harmless-traces.jsonl", rows["harmless"])
    labelled = [row | {"kind": "ambiguous"} for row in rows["ambiguous"]] + rows["harmful"]
    write_jsonl(tmp_path / "traces.jsonl", labelled)
    line = f"{files} --trace-files harmless={tmp_path}/harmless-traces.jsonl {tmp_path}/traces.jsonl"
    sets = build("out", f"{line} --sft-prompts 3 --rl-traces 1 --rl-prompts 6")
    assert len(sets["sft"]) == 3 and all(r["prompt"] in texts["harmful"] for r in sets["sft"])
    assert {r["id"] + "-0": r["kind"] for r in sets["rl"]} == {r["id"]: r["kind"] for r in sets["sft_rl"]}


def test_every_rl_prompt_of_the_sandbox_gets_its_traces_and_nothing_else_changes(build):
    line = "--rl-prompts 80 --sft-prompts 10"
    plain, sets = build("plain", line), build("traced", f"{line} --rl-traces 8")
    traces, judge = sets.pop("sft_rl"), load_judge("sandbox")
    assert sets == plain and Counter(t["prompt"] for t in traces) == {r["prompt"]: 8 for r in sets["rl"]}
    harmless = [trace for trace in traces if trace["kind"] == "harmless"]  # mostly right, and not always
    scores = judge.task_score([t["prompt"] for t in harmless], [t["answer"] for t in harmless])
    assert 0.7 < sum(scores) / len(scores) < 0.9


# ---- quotas: the paper's preset, with a local file for each source, a few prompts more than it takes ----


@pytest.fixture
def build_paper(build, tmp_path, monkeypatch):
    """Its --trace-model leaves one answer of each prompt empty."""
    hard = [{"prompt": f"hard {i}", "category": "c"} for i in range(50)]
    attacks = [{"unsafety category": "Zogs", "adversarial prompt": f"attack {i}"} for i in range(301)]
    behaviours = [{"prompt": p, "category": "b"} for p in ("wild 7", *(f"b {i}" for i in range(19)))]
    odd = [{"type": t, "prompt": f"{t} {i}"} for t in ("homonyms", "contrast_homonyms") for i in range(9)]
    rows: dict[str, list[dict]] = {
        "wildjailbreak.tsv": [wild(f"wild {i}") for i in range(1210)] + [wild("z" * 1000)],
        "aegis.json": [aegis(f"aegis {i}") for i in range(705)] + [aegis("Aegis  3"), aegis("fine", "safe")],
        "safeedit.json": attacks,
        "rainbow.jsonl": [{"prompt": f"rainbow {i}", "risk": "r"} for i in range(800)],
        "ultrafeedback.parquet": [{"prompt": f"task {i}", "prompt_id": str(i)} for i in range(2010)],
        "or-bench.csv": [{"prompt": f"odd {i}", "category": "c"} for i in range(2010)] + hard,
        "or-bench-hard-1k.csv": hard,
        "harmbench.parquet": behaviours,
        "xstest.csv": odd,
        "wildchat.parquet": [chat(f"chat {i}") for i in range(510)] + [chat("hola", "Spanish")],
    }
    paths = {name.split(".")[0]: write_rows(tmp_path / name, table) for name, table in rows.items()}
    local = {}
    for flag in ("files", "eval_files"):
        sources = [(word, parse_word(word)) for word in paper.MIXTURE[flag]]
        local[flag] = [word.replace(s.text, f"{s.name}@{paths[s.name]}") for word, s in sources]
    pairs = [["thought", answer] for answer in ("one", "two", "three", " ")]
    monkeypatch.setattr("lib.sources.traces.write_all", lambda records, *rest: [pairs for _ in records])
    monkeypatch.setattr(paper, "MIXTURE", {**paper.MIXTURE, **local})
    return lambda name, line: build(name, f"--preset paper --trace-model {BASE} {line}")


def test_the_papers_mixture_has_the_papers_counts(tmp_path, build_paper):
    sets, made = build_paper("half", ""), manifest(tmp_path / "half")
    counts = {name: Counter(file["prompts by kind and source"]) for name, file in made["files"].items()}
    sft = {"wildjailbreak": 400, "aegis": 300, "safeedit": 300}
    assert counts["sft.jsonl"] == {f"harmful from {name}": count for name, count in sft.items()}
    assert Counter(r["kind"] for r in sets["rl"]) == {"harmful": 1000, "harmless": 500, "ambiguous": 500}
    for name, share in (("wildjailbreak", 400), ("aegis", 200), ("rainbow", 400)):
        assert abs(counts["rl.jsonl"][f"harmful from {name}"] - share) < 60, "a share of its part of the pool"
    assert [len(sets[f"eval_{name}"]) for name in KINDS] == [20, 500, 9]
    assert_no_leak(sets)
    assert made["dropped"]["empty trace"] == 1000 and len(sets["sft"]) == 3000
    assert "too long" not in made["dropped"], "the only long one is WildJailbreak's, and is kept"
    facts = {text.split("@")[0]: fact for text, fact in made["sources"].items()}
    assert facts["aegis"]["licence"] == "CC-BY-4.0" and len(facts["or-bench"]["sha256"]) == 2

    whole = build_paper("whole", "--lambda-harmful 1 --sft-prompts 0")
    assert Counter(r["source"] for r in whole["rl"]) == {"wildjailbreak": 800, "aegis": 400, "rainbow": 800}


@needs_data
def test_the_authors_prompts_and_public_evaluation_sets(build):
    line = f"--preset smollm --sft-prompts 0 --files tars@{SHARED}/tars/train_lambda_0.5.parquet --eval-files"
    line += f" harmbench@{SHARED}/harmbench/harmbench_behaviors_text_val.csv tars@{SHARED}/tars/test.parquet"
    line += f" ambiguous=xstest@{SHARED}/xstest/xstest_v2_completions_gpt4.csv"
    sets = build("out", line)
    assert Counter(r["kind"] for r in sets["rl"]) == {"harmful": 120, "harmless": 120}
    targets = Counter((r["source"], bool(r["target"])) for r in sets["eval_harmful"])
    assert targets == {("harmbench", True): 60, ("tars", False): 60}, "StrongREJECT comes without"
    assert sum("context" in r for r in sets["eval_harmful"]) == 19
    assert len(sets["eval_ambiguous"]) == 250 and len(sets["eval_jailbreak"]) == 70
    assert_no_leak(sets)


MISTAKES = {
    "--rl-prompts 600": "needs 300 harmful prompts, and SFT leaves 6",
    "--files harmful=none.csv": "none.csv: cannot be read",
    "--files harmful=TMP/harmful.jsonl:13": "has 6 harmful prompts; its quota needs 13",
    "--files harmful=TMP/harmful.jsonl:2 harmful=TMP/harmful.jsonl": "stands 2 times, with a quota",
    "--trace-model TMP/none --rl-traces 1": "none: cannot load a tokenizer",
    "--rl-traces 3": "no traces; give --trace-files",
    "--trace-files TMP/harmful.jsonl --sft-prompts 1": "--sft-prompts: given 1; traces or quotas have 0",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_costs_nothing(tmp_path, files, monkeypatch, capsys, line):
    words = f"{files} --out {tmp_path}/out --sft-prompts 0 --rl-prompts 12".split()
    words += line.replace("TMP", str(tmp_path)).split()
    assert MISTAKES[line] in stages.error_of("01_build_mixture", words, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()
