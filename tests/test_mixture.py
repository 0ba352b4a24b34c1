"""Stage 1: the mixture's counts, disjointness, limits and determinism, from the sandbox and from files."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest

from lib import UserError
from lib.judges import load_judge
from lib.rewards import KINDS, total_reward
from lib.run.files import read_jsonl, sha256_file, write_jsonl
from lib.run.hub import load_tokenizer
from lib.sandbox.world import BASE
from lib.sources.tables import first_text, read_table

stage = importlib.import_module("01_build_mixture")
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="real data in ../shared/data is not there")


def build(monkeypatch, out: Path, *words: object) -> dict[str, list[dict]]:
    monkeypatch.setattr(sys, "argv", ["01", "--out", str(out), *map(str, words)])
    stage.main()
    return {path.stem: read_jsonl(path) for path in out.glob("*.jsonl")}


def test_sandbox_mixture_has_the_counts_asked_for_and_no_prompt_in_two_sets(tmp_path, monkeypatch):
    flags = ("--lambda-harmful", 0.3, "--rl-prompts", 200, "--sft-prompts", 30, "--eval-prompts", 20)
    sets = build(monkeypatch, tmp_path / "a", *flags)
    assert Counter(r["kind"] for r in sets["rl"]) == {"harmful": 60, "harmless": 70, "ambiguous": 70}
    assert len(sets["sft"]) == 120 and {r["kind"] for r in sets["sft"]} == {"harmful"}
    prompts = [{stage.same_prompt(r["prompt"]) for r in records} for records in sets.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["files"]["rl.jsonl"]["sha256"] == sha256_file(tmp_path / "a" / "rl.jsonl")
    assert build(monkeypatch, tmp_path / "b", *flags) == sets
    assert build(monkeypatch, tmp_path / "c", *flags, "--seed", 1) != sets


def test_another_lambda_keeps_the_traces(tmp_path, monkeypatch):
    flags = ("--rl-prompts", 100, "--sft-prompts", 10, "--eval-prompts", 10, "--lambda-harmful")
    low, high = (build(monkeypatch, tmp_path / share, *flags, share) for share in ("0.1", "0.9"))
    assert low["sft"] == high["sft"]


def test_files_duplicates_long_prompts_and_overlap_are_left_out(tmp_path, monkeypatch):
    rows = [{"text": f"question {i}"} for i in range(8)] + [
        {"text": "Question  3"},
        {"text": "x" * 1000},
        {"text": "held"},
    ]
    for kind in ("harmful", "harmless", "ambiguous"):
        write_jsonl(tmp_path / f"{kind}.jsonl", [{"text": f"{kind} {r['text']}"} for r in rows])
    write_jsonl(
        tmp_path / "eval.jsonl",
        [{"text": f"{kind} held", "kind": kind} for kind in ("harmful", "harmless", "ambiguous")],
    )
    files = [f"{kind}={tmp_path / kind}.jsonl" for kind in ("harmful", "harmless", "ambiguous")]
    flags = (
        "--source",
        "files",
        "--files",
        *files,
        "--eval-files",
        tmp_path / "eval.jsonl",
        "--prompt-column",
        "text",
    )
    sets = build(
        monkeypatch, tmp_path / "out", *flags, "--sft-prompts", 0, "--rl-prompts", 16, "--lambda-harmful", 0.5
    )
    assert Counter(r["kind"] for r in sets["rl"]) == {"harmful": 8, "harmless": 4, "ambiguous": 4}
    dropped = json.loads((tmp_path / "out" / "manifest.json").read_text())["dropped"]
    assert dropped == {"duplicate": 3, "too long": 3, "in evaluation": 3}


@needs_data
def test_the_authors_prompts_and_public_evaluation_sets(tmp_path, monkeypatch):
    words = ["--preset", "smollm", "--sft-prompts", 0]
    sets = build(monkeypatch, tmp_path / "out", *words)
    assert {r["kind"] for r in sets["rl"]} == {"harmful", "harmless"}
    assert all(len(r["prompt"]) < 400 for r in sets["rl"])
    harmbench = ["harmbench" in r["source"] for r in sets["eval_harmful"]]
    assert [
        bool(r["target"]) for r in sets["eval_harmful"]
    ] == harmbench  # StrongREJECT comes without targets
    assert harmbench.count(True) > 30 and harmbench.count(False) == 60
    assert {r["kind"] for r in sets["eval_ambiguous"]} == {"ambiguous"}


def write_pool(folder: Path, count: int = 12) -> list[str]:
    """Three jsonl files of `count` prompts each, as --files takes them."""
    for kind in KINDS:
        write_jsonl(folder / f"{kind}.jsonl", [{"prompt": f"{kind} {i}"} for i in range(count)])
    return [f"{kind}={folder / kind}.jsonl" for kind in KINDS]


def test_traces_of_a_file_are_complete_and_their_prompts_are_not_in_rl(tmp_path, monkeypatch):
    traces = [
        {"prompt": f"Harmful {i}", "thinking": "" if k == 1 else f"thought {k}", "response": f"answer {k}"}
        for i in range(6)
        for k in range(3)
    ]
    write_jsonl(tmp_path / "traces.jsonl", traces)
    flags = [
        "--source",
        "files",
        "--files",
        *write_pool(tmp_path),
        "--trace-files",
        tmp_path / "traces.jsonl",
    ]
    flags += ["--sft-prompts", 5, "--traces-per-prompt", 2, "--rl-prompts", 6, "--lambda-harmful", 0.5]
    sets = build(monkeypatch, tmp_path / "out", *flags)
    told = Counter((r["reasoning"], r["answer"]) for r in sets["sft"])
    assert told == {("thought 0", "answer 0"): 5, ("thought 2", "answer 2"): 5}
    used = {stage.same_prompt(r["prompt"]) for r in sets["sft"]}
    assert not used & {stage.same_prompt(r["prompt"]) for name in sets if name != "sft" for r in sets[name]}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"in SFT": 5, "empty trace": 6}


def test_only_prompts_with_a_whole_trace_count_and_they_get_their_quota_of_whole_ones(tmp_path, monkeypatch):
    rows = [{"prompt": f"p {i}", "reasoning": "", "answer": "No."} for i in range(5)]
    rows += [
        {"prompt": "full", "reasoning": t, "answer": a}
        for t, a in (("", "a"), ("t", " "), ("t1", "a1"), ("t2", "a2"))
    ]
    write_jsonl(tmp_path / "traces.jsonl", rows)
    flags = [
        "--source",
        "files",
        "--files",
        *write_pool(tmp_path),
        "--trace-files",
        tmp_path / "traces.jsonl",
    ]
    flags += ["--rl-prompts", 6, "--traces-per-prompt", 2]
    with pytest.raises(UserError, match="--sft-prompts: given 2; the trace files have 1 with traces"):
        build(monkeypatch, tmp_path / "out", *flags, "--sft-prompts", 2)
    sets = build(monkeypatch, tmp_path / "out", *flags, "--sft-prompts", 1)
    assert [(r["prompt"], r["reasoning"]) for r in sets["sft"]] == [("full", "t1"), ("full", "t2")]


def test_files_of_one_name_are_two_sources(tmp_path, monkeypatch, capsys):
    for folder in "abenm":
        write_jsonl(tmp_path / folder / "x.jsonl", [{"prompt": f"{folder} {i}"} for i in range(10)])
    a, b, e, n, m = (str(tmp_path / folder / "x.jsonl") for folder in "abenm")
    words = [
        "--source",
        "files",
        "--files",
        f"harmful={a}:1+2",
        f"harmful={b}:0+5",
        f"harmless={n}",
        f"ambiguous={m}",
    ]
    words += ["--eval-files", f"harmful={e}", "--sft-prompts", 1, "--rl-prompts", 7, "--lambda-harmful", "1"]
    monkeypatch.setattr("lib.sources.traces.TraceWriter", lambda *args, **options: None)
    monkeypatch.setattr(
        "lib.sources.traces.write_all", lambda writer, records, *rest: [[("t", "a")] for _ in records]
    )
    sets = build(monkeypatch, tmp_path / "out", *words, "--trace-model", "me/model", "--eval-prompts", 4)
    assert Counter(r["source"] for r in sets["rl"]) == {a: 2, b: 5}
    sources = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert sources[a]["prompts"] == {"rl pool": 2, "sft": 1, "rl": 2}
    assert sources[b]["prompts"] == {"rl pool": 5, "rl": 5} and sources[e]["prompts"] == {"eval_harmful": 4}
    assert "4 harmful evaluation prompts have no target: GCG needs --targets" in capsys.readouterr().out


def test_targets_are_for_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--targets: given, but --source is sandbox"):
        build(monkeypatch, tmp_path / "out", "--source", "sandbox", "--targets", "none.json")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_a_machine_and_the_sandbox_no_download(tmp_path, monkeypatch, capsys):
    for machine in ("nonsense", "here"):
        with pytest.raises(UserError, match=f"--dry-run: given {machine}; allowed GPUSxGIGABYTES, e.g. 1x80"):
            build(monkeypatch, tmp_path / "out", "--dry-run", machine)
    build(monkeypatch, tmp_path / "out", "--dry-run", "1x80")
    assert (
        capsys.readouterr().out == "sandbox: made here, nothing has to be downloaded\n"
        and not (tmp_path / "out").exists()
    )


def test_sets_without_a_file_are_held_out_of_training(tmp_path, monkeypatch):
    flags = ["--source", "files", "--files", *write_pool(tmp_path), "--sft-prompts", 0, "--rl-prompts", 6]
    sets = build(monkeypatch, tmp_path / "out", *flags, "--eval-prompts", 4)
    assert {name: len(records) for name, records in sets.items()} == {
        "rl": 6,
        "eval_harmful": 4,
        "eval_harmless": 4,
        "eval_ambiguous": 4,
    }
    assert len({r["prompt"] for records in sets.values() for r in records}) == 18


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_and_nested_columns_are_read_alike(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    texts = ["two\nlines", "NA", 'a "quoted", text']
    if suffix == "jsonl":
        write_jsonl(path, [{"messages": [{"content": t}]} for t in texts])
    elif suffix == "json":
        path.write_text(json.dumps([{"messages": [{"content": t}]} for t in texts]))
    elif suffix == "parquet":
        datasets.Dataset.from_list([{"messages": [{"content": t}]} for t in texts]).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["goal"], *([t] for t in texts)])
    assert [first_text(row, "goal,messages.0.content") for row in read_table(path)] == texts


def test_kinds_by_a_column_and_its_map(tmp_path, monkeypatch):
    rows = [
        {"prompt": f"{t} {i}", "type": t}
        for t in ("contrast_a", "contrast_b", "plain", "skip", "harmless")
        for i in range(4)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = [
        "--source",
        "files",
        "--files",
        tmp_path / "rows.jsonl",
        "--kind-column",
        "type",
        "--sft-prompts",
        0,
    ]
    flags += ["--kind-map", "contrast_*=harmful", "skip=drop", "plain=ambiguous"]
    sets = build(
        monkeypatch, tmp_path / "out", *flags, "--rl-prompts", 8, "--lambda-harmful", 0.5, "--eval-prompts", 2
    )
    assert Counter((r["kind"], r["category"].split("_")[0]) for r in sets["rl"]) == {
        ("harmful", "contrast"): 4,
        ("harmless", "harmless"): 2,
        ("ambiguous", "plain"): 2,
    }


def test_a_context_stands_before_the_prompt_that_is_about_it(tmp_path):
    rows = [
        {"Behavior": "Sum it up.", "ContextString": " A short text. "},
        {"Behavior": "Say hello.", "ContextString": ""},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    read = stage.read_prompts(f"harmful={tmp_path / 'rows.jsonl'}", stage.Settings(), {})
    assert [record["prompt"] for _, record in read] == ["A short text.\n\n---\n\nSum it up.", "Say hello."]


def test_mistakes_with_files_are_one_line(tmp_path, monkeypatch):
    files = write_pool(tmp_path)
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "notes.txt").write_text("hello")
    write_jsonl(tmp_path / "other.jsonl", [{"question": "why?", "kind": "odd"}])
    usual = ["--source", "files", "--files", *files, "--sft-prompts", 0, "--rl-prompts", 6]
    cases = {
        "the pool has too few": (["--rl-prompts", 600], "needs 300 harmful prompts"),
        "lambda with an empty pool": (["--files", *files[1:]], "needs 3 harmful prompts.*there are 0"),
        "no such file": (["--files", "harmful=none.csv"], "none.csv: no such file"),
        "not what its name says": (
            ["--files", f"harmful={tmp_path}/broken.parquet"],
            "cannot be read as parquet",
        ),
        "another format": (
            ["--files", f"harmful={tmp_path}/notes.txt"],
            "allowed .jsonl, .json, .csv, .tsv, .parquet",
        ),
        "no prompt column": (
            ["--files", f"harmful={tmp_path}/other.jsonl"],
            "no text in --prompt-column.*question",
        ),
        "unknown kind": (
            ["--files", f"{tmp_path}/other.jsonl", "--prompt-column", "question"],
            "record 1: kind 'odd'",
        ),
        "a map to no kind": (["--kind-map", "x=evil"], "--kind-map: given x=evil"),
        "no traces": (["--sft-prompts", 3], "--sft-prompts: no traces"),
        "two writers": (["--trace-files", "a", "--trace-model", "b"], "--trace-model: given together"),
        "files for the sandbox": (["--source", "sandbox"], "add --source files"),
        "no targets": (["--targets", f"{tmp_path}/notes.txt"], "--targets: .* is no json"),
        "a misspelt kind": (
            ["--files", "harmfull=wildjailbreak:400+800"],
            "unknown KIND harmfull: allowed harmful",
        ),
        "a licence of nothing": (["--licences", "MIT"], "--licences: given MIT"),
    }
    for name, (words, message) in cases.items():
        with pytest.raises(UserError, match=message) as error:
            build(monkeypatch, tmp_path / name.replace(" ", "-"), *usual, *words)
        assert "\n" not in str(error.value)


# ---- traces for the RL prompts: the comparison with SFT ------------------------------------------------------


def test_every_rl_prompt_of_the_sandbox_gets_its_traces_and_nothing_else_changes(tmp_path, monkeypatch):
    flags = ("--rl-prompts", 80, "--sft-prompts", 10, "--eval-prompts", 10)
    plain = build(monkeypatch, tmp_path / "plain", *flags)
    sets = build(monkeypatch, tmp_path / "traced", *flags, "--rl-traces", 8)
    traces = sets.pop("sft_rl")
    assert sets == plain and not (tmp_path / "plain" / "sft_rl.jsonl").exists()
    for name in ("sft", "rl"):
        assert (tmp_path / "plain" / f"{name}.jsonl").read_bytes() == (
            tmp_path / "traced" / f"{name}.jsonl"
        ).read_bytes()
    assert Counter(t["prompt"] for t in traces) == {r["prompt"]: 8 for r in sets["rl"]}
    assert len({t["id"] for t in traces}) == 640
    kinds = {r["prompt"]: r["kind"] for r in sets["rl"]}
    judge = load_judge("sandbox")
    for (
        kind
    ) in KINDS:  # a teacher that is mostly right, and not always; each resolves the prompt, in various words
        of_kind = [t for t in traces if t["kind"] == kind == kinds[t["prompt"]]]
        prompts, answers = [t["prompt"] for t in of_kind], [t["answer"] for t in of_kind]
        scores = zip(judge.harm_score(prompts, answers), judge.task_score(prompts, answers), strict=True)
        rewards = [total_reward(kind, harm, task, True) for harm, task in scores]
        assert set(rewards) == {0.0, 1.0} and 0.7 < sum(rewards) / len(rewards) < 0.9
        assert len({(t["reasoning"], t["answer"]) for t in of_kind}) > len(of_kind) / 2
    manifest = json.loads((tmp_path / "traced" / "manifest.json").read_text())
    assert manifest["files"]["sft_rl.jsonl"]["records"] == 640

    second = importlib.import_module("02_sft_warmstart")
    settings = second.Settings(data=str(tmp_path / "traced"), traces="sft_rl.jsonl", held_out_share=0.1)
    train, held_out = second.load_examples(settings, load_tokenizer(BASE), 512)
    assert (len(train), len(held_out)) == (576, 64)


def test_traces_of_a_file_go_to_the_rl_prompts_that_have_some(tmp_path, monkeypatch):
    prompts = [f"{kind} {i}" for kind in KINDS for i in range(12)]
    rows = [
        {"prompt": p.upper(), "reasoning": f"thought {k}", "answer": "a"}
        for p in prompts[::2]
        for k in range(3)
    ]
    write_jsonl(tmp_path / "traces.jsonl", rows)
    flags = [
        "--source",
        "files",
        "--files",
        *write_pool(tmp_path),
        "--trace-files",
        tmp_path / "traces.jsonl",
    ]
    flags += ["--rl-prompts", 9, "--sft-prompts", 2, "--eval-prompts", 2, "--lambda-harmful", 0.4]
    sets = build(monkeypatch, tmp_path / "out", *flags, "--rl-traces", 2)
    traced = [r["prompt"] for r in sets["rl"] if r["prompt"] in prompts[::2]]
    assert traced and Counter(t["prompt"] for t in sets["sft_rl"]) == dict.fromkeys(traced, 2)
    assert not {stage.same_prompt(t["prompt"]) for t in sets["sft"]} & {stage.same_prompt(p) for p in traced}

    write_jsonl(tmp_path / "traces.jsonl", [{**row, "prompt": f"other {i}"} for i, row in enumerate(rows)])
    with pytest.raises(UserError, match="--rl-traces: --trace-files have none for the 9 RL prompts"):
        build(monkeypatch, tmp_path / "none", *flags, "--rl-traces", 2)
    without = [*flags[:6], "--sft-prompts", 0, "--rl-traces", 2]
    with pytest.raises(UserError, match="--rl-traces: no traces; give --trace-files"):
        build(monkeypatch, tmp_path / "none", *without)


def test_a_model_writes_the_traces_of_the_rl_prompts_too(tmp_path, monkeypatch):
    flags = [
        "--rl-prompts",
        6,
        "--sft-prompts",
        2,
        "--traces-per-prompt",
        1,
        "--eval-prompts",
        4,
        "--trace-model",
        BASE,
    ]
    flags += ["--trace-max-new-tokens", 12, "--rl-traces", 2, "--device", "cpu"]
    sets = build(monkeypatch, tmp_path / "out", *flags)
    assert sets["sft_rl"] and {t["prompt"] for t in sets["sft_rl"]} <= {r["prompt"] for r in sets["rl"]}
    assert max(Counter(t["prompt"] for t in sets["sft_rl"]).values()) <= 2
    assert not list((tmp_path / "out").glob("*.partial.jsonl"))
