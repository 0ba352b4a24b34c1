"""Stage 1's sources: each known one on small files of its own columns, the hub's part without a hub, and the paper's counts.

All prompts are made up. What a data set's columns are is stated here once more, by hand, from its card.
"""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from lib import UserError
from lib.rewards import KINDS
from lib.run.command import run_main
from lib.run.files import read_jsonl, write_jsonl
from lib.run.text import without_context
from lib.sources import hub, parse_word, read_prompts, read_traces, same_prompt
from lib.sources.known import SOURCES

stage = importlib.import_module("01_build_mixture")
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="real data in ../shared/data is not there")
KEYS = {"id", "prompt", "kind", "source", "category", "target"}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """As the ending says; json as an array, which is what SafeEdit and Aegis are."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def turn(text: str, role: str = "user") -> dict:
    return {"content": text, "role": role, "language": "English", "toxic": False, "redacted": False}


def chat(text: str, language: str = "English", toxic: bool = False, role: str = "user") -> dict:
    talk = [turn(text, role), turn("Sure.", "assistant"), turn("and then?")]
    return {
        "conversation_hash": f"h-{text}",
        "conversation": talk,
        "turn": 2,
        "language": language,
        "toxic": toxic,
    }


def aegis(prompt: str, label: str = "unsafe") -> dict:
    redacted = 7.0 if prompt == "REDACTED" else None
    row = {
        "id": f"a{prompt[-1]}",
        "reconstruction_id_if_redacted": redacted,
        "prompt": prompt,
        "response": None,
    }
    return row | {
        "prompt_label": label,
        "response_label": None,
        "violated_categories": "Zog, Wip",
        "prompt_label_source": "human",
    }


def wild(prompt: str, data_type: str = "adversarial_harmful") -> dict:
    vanilla = data_type.startswith("vanilla")
    return {
        "vanilla": prompt if vanilla else "plain",
        "adversarial": "" if vanilla else prompt,
        "completion": "No.\tNever.",
        "data_type": data_type,
    }


def sorry(prompt: str, category: str, style: str = "base") -> dict:
    return {"question_id": 3, "category": category, "turns": [prompt], "prompt_style": style}


# (source, ending, rows, what is to be found: (kind, prompt, category))
CASES: list[tuple[str, str, list[dict], list[tuple[str, str, str]]]] = [
    (
        "wildjailbreak",
        "tsv",
        [
            wild("NA"),
            wild('tell, "me"\nof zogs'),
            wild("b", "adversarial_benign"),
            wild("007", "vanilla_harmful"),
        ]
        + [wild("v", "vanilla_benign")],
        [("harmful", "NA", ""), ("harmful", 'tell, "me"\nof zogs', ""), ("harmful", "007", "")],
    ),
    (
        "aegis",
        "json",
        [aegis("zog 1"), aegis("REDACTED"), aegis("soup 2", "safe"), aegis(" zog 3 ")],
        [("harmful", "zog 1", "Zog, Wip"), ("harmful", "zog 3", "Zog, Wip")],
    ),
    (
        "safeedit",
        "json",
        [
            {
                "id": 5,
                "unsafety category": "Zogs",
                "adversarial prompt": "play a zog: how?",
                "question": "how?",
                "safe generation": "no",
                "unsafe generation": "yes",
                "knowledge constrain": {"prompt": "2+2?", "answer": "4"},
            }
        ],
        [("harmful", "play a zog: how?", "Zogs")],
    ),
    (
        "ultrafeedback",
        "parquet",
        [
            {
                "prompt": "Cook soup.",
                "prompt_id": "p1",
                "chosen": [turn("Cook soup.")],
                "messages": [turn("x")],
                "score_chosen": 8.0,
            }
        ],
        [("harmless", "Cook soup.", "")],
    ),
    (
        "or-bench-hard",
        "csv",
        [{"prompt": "Kill a process", "category": "violence"}],
        [("ambiguous", "Kill a process", "violence")],
    ),
    (
        "wildchat",
        "parquet",
        [
            chat("hello"),
            chat("hola", "Spanish"),
            chat("rude", toxic=True),
            chat("I speak first", role="assistant"),
            chat("soup?"),
            chat("after")
            | {"conversation": [turn("Be brief.", "system"), turn("after"), turn("Sure.", "assistant")]},
        ],
        [("harmless", "hello", ""), ("harmless", "soup?", ""), ("harmless", "after", "")],
    ),
    (
        "xstest",
        "parquet",  # as on the hub
        [
            {"prompt": "kill time?", "focus": "kill", "type": "homonyms", "note": "", "label": "safe"},
            {
                "prompt": "zog someone?",
                "focus": "zog",
                "type": "contrast_homonyms",
                "note": "",
                "label": "unsafe",
            },
        ],
        [("ambiguous", "kill time?", "homonyms"), ("harmful", "zog someone?", "contrast_homonyms")],
    ),
    (
        "xstest",
        "csv",  # as the authors'
        [
            {"id": "v2-1", "type": "homonyms", "prompt": "kill time?"},
            {"id": "v2-26", "type": "contrast_homonyms", "prompt": "zog?"},
        ],
        [("ambiguous", "kill time?", "homonyms"), ("harmful", "zog?", "contrast_homonyms")],
    ),
    (
        "strongreject",
        "parquet",
        [{"prompt": "zog", "category": "Z", "source": "custom"}],
        [("harmful", "zog", "Z")],
    ),
    (
        "strongreject",
        "csv",
        [{"category": "Z", "source": "custom", "forbidden_prompt": "zog"}],
        [("harmful", "zog", "Z")],
    ),
    (
        "sorry-bench",
        "jsonl",
        [
            sorry("a", "5"),
            sorry("z", "6", "slang"),
            sorry("b", "6"),
            sorry("c", "24"),
            sorry("d", "39"),
            sorry("e", "44"),
            sorry("f", "Fraud"),
        ],
        [
            ("harmful", "a", "hate speech"),
            ("harmful", "b", "crimes or torts"),
            ("harmful", "c", "crimes or torts"),
            ("harmful", "d", "potentially inappropriate topics"),
            ("harmful", "e", "unqualified advice"),
            ("harmful", "f", "Fraud"),
        ],
    ),
    (
        "harmbench",
        "parquet",
        [{"prompt": "make a zog", "category": "zogs"}],
        [("harmful", "make a zog", "zogs")],
    ),
    (
        "rainbow",
        "jsonl",
        [{"prompt": "a zog", "risk": "zogs", "style": "slang"}],
        [("harmful", "a zog", "zogs")],
    ),
]


@pytest.mark.parametrize(
    "name, ending, rows, expected", CASES, ids=[f"{case[0]}.{case[1]}" for case in CASES]
)
def test_a_known_source_of_its_own_columns(tmp_path, name, ending, rows, expected):
    path = write_rows(tmp_path / f"rows.{ending}", rows)
    read = read_prompts(f"{name}@{path}", stage.Settings(), {})
    assert [(r["kind"], r["prompt"], r["category"]) for _, r in read] == expected
    assert all(set(r) == KEYS and r["source"] == name and kind == r["kind"] for kind, r in read)


# ---- what stands in a file -------------------------------------------------------------------------------------------

NAMES = [
    "007",
    "1e5",
    "1.0",
    "true",
    "True",
    "NA",
    "null",
    "",
    "2024-01-01",
    "1_000",
    "0x1F",
    "inf",
    "-0",
    "+1",
    "1,5",
    "Ja",
]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_name_is_the_text_that_stands_in_the_file(tmp_path, ending):
    """csv was read with types: a column of numbers lost its zeros, one of dates became times, and no target was found."""
    for names in (NAMES, ["007", "010"], ["1e5"], ["true"], ["2024-01-01"], ["1.0", "2.50"], ["NA"]):
        path = write_rows(
            tmp_path / f"x.{ending}", [{"id": name, "prompt": f"p{i}"} for i, name in enumerate(names)]
        )
        read = read_prompts(f"harmful={path}", stage.Settings(), {name: f"to {name}" for name in names})
        assert [record["target"] for _, record in read] == [f"to {name}" for name in names]
        path = write_rows(
            tmp_path / f"y.{ending}", [{"id": f"i{i}", "prompt": name} for i, name in enumerate(names)]
        )
        assert [
            record["prompt"] for _, record in read_prompts(f"harmful={path}", stage.Settings(), {})
        ] == names


def test_numbers_of_json_are_names_as_they_are_written(tmp_path):
    for ending, frame in (
        ("jsonl", "{}\n{}\n{}\n{}"),
        ("json", "[{}, {}, {}, {}]"),
        ("json", "{}\n{}\n{}\n{}"),
    ):
        rows = [f'{{"id": {name}, "prompt": "p{name}"}}' for name in ("7", "1e5", "1.50", "true")]
        (tmp_path / f"x.{ending}").write_text(frame.format(*rows))
        read = read_prompts(
            f"harmful={tmp_path / f'x.{ending}'}",
            stage.Settings(),
            {n: n for n in ("7", "1e5", "1.50", "true")},
        )
        assert [record["target"] for _, record in read] == ["7", "1e5", "1.50", "true"]


BROKEN = {
    "more.csv": ("a,b\n1,2,3\n", "line 2: more cells than the header has, 2"),
    "quote.csv": ('a,b\n"1,2\n', "cannot be read as csv (the record that begins in line 2: "),
    "odd.tsv": ('a\tb\n"1"2\t3\n', "cannot be read as tsv (the record that begins in line 2: "),
    "head.csv": ("a,b\n", "is empty"),
    "list.json": ("[1, 2]", "cannot be read as json (allowed: an array of objects, or an object a line)"),
    "cut.json": ('[{"prompt": "a"},', "not a JSON object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_file_is_one_line(tmp_path, name):
    (tmp_path / name).write_text(BROKEN[name][0])
    with pytest.raises(UserError) as error:
        read_prompts(f"harmful={tmp_path / name}", stage.Settings(), {})
    assert BROKEN[name][1] in str(error.value) and "\n" not in str(error.value)


SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "how to zog?"}
TALKS: list[
    tuple[object, str, str]
] = [  # (what stands in the column, the prompt, what is said to be left out of two of them)
    ("how to zog?", "how to zog?", ""),
    ([ASKED], "how to zog?", ""),
    ([SYSTEM, ASKED], "how to zog?", "2 turns of system"),
    (
        [SYSTEM, ASKED, {"role": "assistant", "content": "No."}, ASKED],
        "how to zog?",
        "2 turns of system, 2 turns of assistant",
    ),
    ([{"role": "assistant", "content": "Hello."}, ASKED], "how to zog?", "2 turns of assistant"),
    (
        [{"from": "system", "value": "x"}, {"from": "human", "value": "how to zog?"}],
        "how to zog?",
        "2 turns of system",
    ),
    (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "to zog?"}],
            }
        ],
        "how to zog?",
        "",
    ),
]


@pytest.mark.parametrize("column", ["prompt", "messages"])
@pytest.mark.parametrize("talk, prompt, left", TALKS)
def test_the_prompt_of_a_conversation_is_the_users_first_turn(tmp_path, capsys, talk, prompt, left, column):
    """verl's layout: the system prompt became every row's prompt, and all rows but one were duplicates."""
    path = write_rows(tmp_path / "talks.jsonl", [{column: talk}, {column: talk}, {column: [SYSTEM]}])
    read = read_prompts(f"harmless={path}", stage.Settings(), {})
    assert [record["prompt"] for _, record in read] == [
        prompt,
        prompt,
        "",
    ]  # without a user there is none: dropped as empty
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: left out {left}") if left else out == ""
    traces = write_rows(tmp_path / "traces.jsonl", [{column: talk, "reasoning": "z", "answer": "y"}])
    assert [record["prompt"] for record, _ in read_traces(str(traces), stage.Settings())] == [prompt]


OWN = {
    "hops": 2,
    "prefill": "first",
    "twin": "how to bake?",
    "target": "so",
    "place": ["x", {"y": 1}],
    "source": "mine",
}


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_record_keeps_the_fields_of_its_own(tmp_path, ending):
    row = {"text": "how to zog?", "id": "7", "topic": "zogs", "context": "A text."}
    row |= (
        OWN if ending in ("jsonl", "json") else {key: value for key, value in OWN.items() if key != "place"}
    )
    path = write_rows(tmp_path / f"own.{ending}", [row | {"hops": 2}, row | {"hops": 0, "target": ""}])
    columns = stage.Settings(prompt_column="text", category_column="topic")
    [(_, record), (_, other)] = read_prompts(f"harmful={path}", columns, {"7": "from --targets"})
    kept = {"hops", "prefill", "twin"} | ({"place"} if ending in ("jsonl", "json") else set())
    assert set(record) == KEYS | {"context"} | kept and (record["hops"], other["hops"]) == (2, 0)
    assert all(record[key] == OWN[key] for key in kept) and record["source"] == path.name
    assert (record["target"], other["target"]) == ("so", "from --targets")
    assert record["prompt"] == "A text.\n\n---\n\nhow to zog?" and record["context"] == "A text."
    for key, value in (("twin", 7), ("prefill", ["x"]), ("hops", {"a": 1})):
        bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "p", "id": "me", key: value}])
        with pytest.raises(UserError, match=f"record me: {key} is .*; allowed: (some text|a number)"):
            read_prompts(f"harmful={bad}", stage.Settings(), {})


def test_the_fields_of_its_own_reach_rl_and_evaluation(tmp_path, monkeypatch):
    for kind in KINDS:
        write_rows(
            tmp_path / f"{kind}.jsonl",
            [{"prompt": f"{kind} {i}", "hops": i, "mark": "own"} for i in range(8)],
        )
    words = [
        "--source",
        "files",
        "--files",
        *(f"{kind}={tmp_path / kind}.jsonl" for kind in KINDS),
    ]
    sets = build(
        monkeypatch,
        tmp_path / "out",
        [*words, "--sft-prompts", "0", "--rl-prompts", "8", "--eval-prompts", "2"],
    )
    assert len(sets) == 4 and all(
        r["mark"] == "own" and r["hops"] == int(r["prompt"][-1]) for rows in sets.values() for r in rows
    )


def test_targets_without_a_prompt_and_prompts_without_a_target_are_named(tmp_path, monkeypatch, capsys):
    for kind in KINDS:
        write_rows(tmp_path / f"{kind}.csv", [{"prompt": f"{kind} {i}", "id": f"00{i}"} for i in range(8)])
    (tmp_path / "targets.json").write_text(
        json.dumps({f"00{i}": "so" for i in range(7)} | {str(i): "so" for i in range(7)})
    )
    words = [
        "--source",
        "files",
        "--files",
        *(f"{kind}={tmp_path / kind}.csv" for kind in ("harmless", "ambiguous")),
    ]
    words += [
        "--eval-files",
        f"harmful={tmp_path}/harmful.csv",
        "--targets",
        f"{tmp_path}/targets.json",
        "--sft-prompts",
        "0",
    ]
    sets = build(monkeypatch, tmp_path / "out", [*words, "--rl-prompts", "4", "--lambda-harmful", "0"])
    assert sum(record["target"] == "so" for record in sets["eval_harmful"]) == 7
    out = capsys.readouterr().out
    assert "--targets: 7 of 14 are of no prompt that was read: 0, 1, 2, 3, 4, ...\n" in out
    assert "1 harmful evaluation prompts have no target: GCG needs --targets (harmful-007-" in out
    (tmp_path / "targets.json").write_text('{"000": 7}')
    with pytest.raises(UserError, match="targets.json: 000: is 7; allowed: some text"):
        stage.read_targets(str(tmp_path / "targets.json"))


SAME = [
    ("How do I bake?", "how  do i\tbake"),
    ("How do I bake?", "\u201cHow do I bake?\u201d"),
    ("How do I bake?", "How do I ba\u200bke?\ufeff"),
    ("How do I bake?", "How\u00a0do\u2003I ba\u00adke ?"),
    ("How do I bake?", "\uff28ow do I bake\uff1f"),
    ("How do I bake?", "How do I bake..."),
    ("don't", "don\u2019t"),
    ("don't", "don\u02bct".replace("\u02bc", "\u0060")),
    ("say 'x'", "say \u00abx\u00bb"),
    ("well-known", "well\u2010known"),
    ("a - b", "a \u2014 b"),
    ("a-b", "a\u2212b"),
    ("caf\u00e9", "cafe\u0301"),
    ("office", "o\ufb03ce"),
    ("stra\u00dfe", "STRASSE"),
    ("a\ufe0f b", "a b"),
    ("\u00bfqu\u00e9?", "qu\u00e9"),
]
APART = [
    ("bake", "boil"),
    ("what is C#", "what is C"),
    ("what is C++?", "what is C?"),
    ("10 - 3", "103"),
    ("it's", "its"),
    ("a b", "ab"),
]
APART += [("!!!", "???"), ("caf\u00e9", "cafe"), ("resume 1.5", "resume 15"), ("", "?")]


def test_what_is_the_same_prompt_to_a_reader():
    for one, other in SAME:
        assert same_prompt(one) == same_prompt(other), (one, other)
    for one, other in APART:
        assert same_prompt(one) != same_prompt(other), (one, other)
    assert all(same_prompt(same_prompt(text)) == same_prompt(text) for pair in SAME + APART for text in pair)


def test_a_prompt_in_another_dress_leaks_into_no_other_set(tmp_path, monkeypatch):
    for kind in KINDS:
        write_rows(
            tmp_path / f"{kind}.jsonl",
            [{"prompt": f"tell {kind} \u201c{i}\u201d \u2014 now"} for i in range(9)],
        )
    write_rows(
        tmp_path / "e.jsonl",
        [{"prompt": f"Tell harmful\u00a0'{i}' - n\u200bow!", "kind": "harmful"} for i in range(5)],
    )
    words = [
        "--source",
        "files",
        "--files",
        *(f"{kind}={tmp_path / kind}.jsonl" for kind in KINDS),
    ]
    words += [
        "--eval-files",
        str(tmp_path / "e.jsonl"),
        "--sft-prompts",
        "0",
        "--rl-prompts",
        "4",
        "--lambda-harmful",
        "1",
    ]
    sets = build(monkeypatch, tmp_path / "out", words)
    assert {r["prompt"] for r in sets["rl"]} == {
        f"tell harmful \u201c{i}\u201d \u2014 now" for i in range(5, 9)
    }


def test_every_known_source_has_a_case_here():
    assert {case[0] for case in CASES} | {"or-bench", "star1"} == set(SOURCES)


def test_or_bench_is_without_its_hard_prompts(tmp_path):
    rows = [{"prompt": f"prompt {i}", "category": "c"} for i in range(5)]
    path = write_rows(tmp_path / "or-bench-80k.csv", rows)
    with pytest.raises(UserError, match="or-bench-hard-1k.csv: no such file; .*it needs both"):
        read_prompts(f"or-bench@{path}", stage.Settings(), {})
    write_rows(tmp_path / "or-bench-hard-1k.csv", [{"prompt": "Prompt  3", "category": "c"}])
    read = read_prompts(f"ambiguous=or-bench@{path}", stage.Settings(), {})
    assert [r["prompt"] for _, r in read] == ["prompt 0", "prompt 1", "prompt 2", "prompt 4"]


def test_harmbench_as_its_authors_publish_it_has_contexts_and_names_for_targets(tmp_path, capsys):
    row = {
        "Behavior": "Sum it up.",
        "FunctionalCategory": "contextual",
        "SemanticCategory": "zogs",
        "Tags": "context",
    }
    song = row | {
        "Behavior": "Sing it.",
        "FunctionalCategory": "copyright",
        "ContextString": "",
        "BehaviorID": "song",
    }
    path = write_rows(
        tmp_path / "all.csv", [row | {"ContextString": " A text. ", "BehaviorID": "sum_up"}, song, song]
    )
    [(name, record)] = read_prompts(
        f"jailbreak=harmbench@{path}", stage.Settings(), {"sum_up": "Sure, it says"}
    )
    assert (name, record["kind"], record["prompt"]) == (
        "jailbreak",
        "harmful",
        "A text.\n\n---\n\nSum it up.",
    )
    assert record["target"] == "Sure, it says" and record["category"] == "zogs"
    assert (
        record["context"] == " A text. "
        and without_context(record["prompt"], record["context"]) == "Sum it up."
    )
    assert (
        "left out 2 copyright behaviours (hashes of the text decide these, no judge)"
        in capsys.readouterr().out
    )
    [(_, plain)] = read_prompts(
        f"harmful={path}", stage.Settings(), {"sum_up": "Sure, it says"}
    )  # by the column flags
    assert {**plain, "id": 0, "source": 0} == {**record, "id": 0, "source": 0}
    assert "left out 2 copyright behaviours" in capsys.readouterr().out
    columns = stage.Settings(
        kind_column="FunctionalCategory", kind_map=["*=harmful"]
    )  # a rule of the user's own goes before
    assert len(read_prompts(str(path), columns, {})) == 3


@needs_data
def test_of_harmbenchs_validation_set_60_of_80_are_run(capsys):
    path = SHARED / "harmbench" / "harmbench_behaviors_text_val.csv"
    read = read_prompts(f"harmful=harmbench@{path}", stage.Settings(), {})
    assert len(read) == 60 and sum("context" in record for _, record in read) == 19
    assert "left out 20 copyright behaviours" in capsys.readouterr().out


def test_star1_gives_traces(tmp_path):
    row = {"id": 1, "question": "how to zog?", "category": ["zogs"], "source": "s", "score": {"a": 10}}
    full = row | {"response": "<think>\nNo good.\n</think>\n\nI will not."}
    path = write_rows(
        tmp_path / "star.parquet", [full, row | {"question": "why?", "response": "I will not."}]
    )
    (record, first), (_, second) = read_traces(f"star1@{path}", stage.Settings())
    assert first == ("No good.", "I will not.") and second[0] == ""
    assert record["prompt"] == "how to zog?" and record["kind"] == "harmful" and record["category"] == "zogs"
    wild_path = write_rows(tmp_path / "w.tsv", [wild("zog")])
    with pytest.raises(UserError, match="wildjailbreak has prompts, no reasoning.*star1"):
        read_traces(f"wildjailbreak@{wild_path}", stage.Settings())


def test_other_columns_and_empty_filters_are_one_line(tmp_path):
    path = write_rows(tmp_path / "new.tsv", [{"attack": "zog", "data_type": "adversarial_harmful"}])
    with pytest.raises(
        UserError,
        match="wildjailbreak@.*: has columns attack, data_type; expected vanilla, adversarial, data_type",
    ):
        read_prompts(f"wildjailbreak@{path}", stage.Settings(), {})
    path = write_rows(tmp_path / "calm.tsv", [wild("soup", "vanilla_benign")])
    with pytest.raises(
        UserError, match="nothing is left by its filter: data_type vanilla_harmful or adversarial_harmful"
    ):
        read_prompts(f"wildjailbreak@{path}", stage.Settings(), {})
    path = write_rows(tmp_path / "wild.tsv", [wild("zog")])
    with pytest.raises(UserError, match="the prompts of wildjailbreak are harmful"):
        read_prompts(f"harmless=wildjailbreak@{path}", stage.Settings(), {})


def test_words():
    assert [
        (w.kind, w.name, w.sft, w.rl)
        for w in map(parse_word, ("aegis", "harmful=aegis:3", "harmful=aegis:4+0"))
    ] == [
        ("", "aegis", 0, None),
        ("harmful", "aegis", 0, 3),
        ("harmful", "aegis", 4, 0),
    ]
    given = parse_word("harmless=hub:me/chat:en:train:20")
    assert given.hub == ("me/chat", "en", "train") and given.rl == 20 and given.source == "me/chat:en:train"
    given = parse_word("harmful=aegis@a/b=c.json:5")
    assert given.path == Path("a/b=c.json") and given.name == given.source == "aegis"
    assert parse_word("notes@home.csv").path == Path("notes@home.csv")
    mistakes = {
        "aegs": "--files: given aegs; allowed a file, hub:OWNER/NAME:SPLIT, or wildjailbreak",
        "aegis:5": "a quota needs KIND=",
        "harmless=aegis:1+5": "SFT has harmful prompts only",
        "hub:me:train": "allowed hub:OWNER/NAME:SPLIT",
        "hub:me/chat": "allowed hub:OWNER/NAME:SPLIT",
        "aegis@": "allowed aegis or aegis@FILE",
    }
    for word, message in mistakes.items():
        with pytest.raises(UserError) as error:
            parse_word(word)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="--eval-files: given harmful=aegis:5; a quota is for --files only"):
        parse_word("harmful=aegis:5", "--eval-files")


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(monkeypatch):
    """Puts an answer of the hub, or an error, in its place; gives the list of what load_dataset was asked for."""
    calls: list[tuple] = []

    def install(
        rows: dict[str, list[dict]] | None = None,
        asked: Exception | None = None,
        loaded: Exception | None = None,
    ):
        class Api:
            def dataset_info(self, name, timeout):
                if asked:
                    raise asked
                return type("Info", (), {"sha": f"sha of {name}"})

        def load_dataset(name, config=None, *, split, **options):
            calls.append((name, config, split, options, datasets.config.HF_HUB_OFFLINE))
            if loaded:
                raise loaded
            return datasets.Dataset.from_list((rows or {})[config or name])

        hub._ask.cache_clear()
        monkeypatch.setattr(hub, "HfApi", Api)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    yield install
    hub._ask.cache_clear()


def test_known_sources_come_from_the_hub(fake_hub):
    rows = {
        "or-bench-80k": [{"prompt": p, "category": "c"} for p in ("a", "b")],
        "or-bench-hard-1k": [{"prompt": "b", "category": "c"}],
        "train": [wild("zog"), wild("soup", "vanilla_benign")],
    }
    calls = fake_hub(rows)
    assert [r["prompt"] for _, r in read_prompts("or-bench", stage.Settings(), {})] == ["a"]
    assert [r["prompt"] for _, r in read_prompts("wildjailbreak", stage.Settings(), {})] == ["zog"]
    text = {
        "keep_default_na": False,
        "converters": dict.fromkeys(("vanilla", "adversarial", "prompt", "category"), str),
    }
    assert calls == [
        ("bench-llm/or-bench", "or-bench-80k", "train", text, False),
        ("bench-llm/or-bench", "or-bench-hard-1k", "train", text, False),
        ("allenai/wildjailbreak", "train", "train", {"delimiter": "\t", **text}, False),
    ]
    rows = [
        {"prompt": "p", "type": "t", "label": label, "id": i, "focus": "-"}
        for i, label in enumerate(("safe", "unsafe"))
    ]
    fake_hub({"walledai/XSTest": rows})
    found = read_prompts("xstest", stage.Settings(), {})
    assert [(name, record["id"].split("-")[1]) for name, record in found] == [
        ("ambiguous", "0"),
        ("harmful", "1"),
    ]
    fake_hub({"standard": [{"prompt": "p", "category": "c", "BehaviorID": "b", "ContextString": "A poem."}]})
    [(_, record)] = read_prompts("harmbench", stage.Settings(), {"b": "Sure"})
    assert (
        record["target"] == "Sure"
        and record["prompt"].startswith("A poem.")
        and record["prompt"].endswith("p")
    )
    fake_hub({"train": [{"attack": "x"}]})
    with pytest.raises(
        UserError, match="wildjailbreak: has columns attack; expected vanilla, adversarial, data_type"
    ):
        read_prompts("wildjailbreak", stage.Settings(), {})


def test_any_data_set_of_the_hub_by_the_column_flags(fake_hub):
    calls = fake_hub({"en": [{"ask": "soup?", "sort": "fine"}, {"ask": "zog?", "sort": "bad"}]})
    columns = stage.Settings(prompt_column="ask", kind_column="sort", kind_map=["fine=harmless", "bad=drop"])
    [(name, record)] = read_prompts("hub:me/chat:en:dev", columns, {})
    assert (name, record["prompt"], record["source"]) == ("harmless", "soup?", "me/chat:en:dev")
    assert calls == [("me/chat", "en", "dev", {}, False)]


NO_HUB, GATED = (
    OSError("[Errno -2] Name or service not known"),
    RuntimeError("Dataset 'x' is a gated dataset on the Hub."),
)
GATE = "it is gated: ask for access at https://huggingface.co/datasets/allenai/wildjailbreak and log in"


@pytest.mark.parametrize(
    "asked, loaded, word, messages",
    [
        (
            NO_HUB,
            NO_HUB,
            "wildjailbreak",
            ("allenai/wildjailbreak:train:train", "Name or service", GATE, "wildjailbreak@FILE"),
        ),
        (NO_HUB, NO_HUB, "ultrafeedback", ("it needs no account", "ultrafeedback@FILE")),
        (None, GATED, "safeedit", ("is a gated dataset", "hf auth login", "safeedit@FILE")),
        (NO_HUB, NO_HUB, "hub:me/chat:dev", ("me/chat:dev: cannot be read from the hub", "give a file")),
        (None, None, "rainbow", ("rainbow: is no data set of the hub; give rainbow@FILE",)),
    ],
)
def test_no_hub_or_no_access_is_one_line(fake_hub, asked, loaded, word, messages):
    calls = fake_hub(asked=asked, loaded=loaded)
    with pytest.raises(UserError) as error:
        read_prompts(word, stage.Settings(), {})
    assert all(message in str(error.value) for message in messages) and "\n" not in str(error.value)
    assert all(offline == (asked is not None) for *_, offline in calls), (
        "only the cache is read if the hub is not there"
    )
    assert not datasets.config.HF_HUB_OFFLINE


def test_the_papers_preset_without_a_hub(fake_hub, tmp_path, monkeypatch, capsys):
    fake_hub(asked=NO_HUB, loaded=NO_HUB)
    monkeypatch.setattr(
        sys, "argv", ["01", "--preset", "paper", "--trace-files", "star1", "--out", str(tmp_path / "data")]
    )
    with pytest.raises(SystemExit) as end:
        run_main(stage.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: allenai/wildjailbreak")
    assert not (tmp_path / "data").exists()


# ---- the mixture -----------------------------------------------------------------------------------------------------


@pytest.fixture
def standins(tmp_path) -> Callable[[str], str]:
    """`standins("aegis")` is aegis@FILE; a file of each source of the paper, a few prompts more than it takes, some to drop."""
    long = "z" * 1000
    hard = [{"prompt": f"hard {i}", "category": "c"} for i in range(50)]
    attack = {"unsafety category": "Zogs", "question": "how?"}
    rows: dict[str, list[dict]] = {
        "wildjailbreak.tsv": [wild(f"wild {i}") for i in range(1210)]
        + [wild(long), wild("calm", "adversarial_benign")],
        "aegis.json": [aegis(f"aegis {i}") for i in range(705)]
        + [aegis("REDACTED"), aegis("Aegis  3"), aegis("fine", "safe")],
        "safeedit.json": [attack | {"id": i, "adversarial prompt": f"attack {i}"} for i in range(301)],
        "rainbow.jsonl": [{"prompt": f"rainbow {i}", "risk": "r", "style": "s"} for i in range(800)],
        "ultrafeedback.parquet": [{"prompt": f"task {i}", "prompt_id": str(i)} for i in range(2010)],
        "or-bench.csv": [{"prompt": f"odd {i}", "category": "c"} for i in range(2010)] + hard,
        "or-bench-hard-1k.csv": hard,
        "harmbench.parquet": [{"prompt": f"behaviour {i}", "category": "b"} for i in range(19)]
        + [{"prompt": "wild 7", "category": "b"}],
        "xstest.csv": [
            {"id": str(i), "type": t, "prompt": f"{t} {i}"}
            for t in ("homonyms", "contrast_homonyms")
            for i in range(9)
        ],
        "wildchat.parquet": [chat(f"chat {i}") for i in range(510)] + [chat("hola", "Spanish")],
    }
    paths = {name.split(".")[0]: write_rows(tmp_path / name, table) for name, table in rows.items()}
    return lambda name: f"{name}@{paths[name]}"


class Reasoner:
    """Stands for --trace-model's model."""

    def __init__(self, *args, **settings) -> None: ...

    def check(self, records) -> None: ...

    def write(self, prompts, seeds):
        return [(f"thought of {seed % 97}", "answer") for seed in seeds]


def paper_words(standins: Callable[[str], str], **flags: object) -> list[str]:
    """The paper's preset with a local file for each source: its own words, with @FILE put in."""
    preset = importlib.import_module("lib.run.presets.paper").MIXTURE

    def local(word: str) -> str:
        given = parse_word(word)
        return word.replace(given.text, standins(given.name))

    words = ["--preset", "paper", "--trace-model", "reasoner"]
    for flag in ("files", "eval_files"):
        words += [f"--{flag.replace('_', '-')}", *map(local, preset[flag])]
    return [
        *words,
        *(str(w) for name, value in flags.items() for w in (f"--{name.replace('_', '-')}", value)),
    ]


def build(monkeypatch, out: Path, words: list[str]) -> dict[str, list[dict]]:
    monkeypatch.setattr("lib.sources.traces.TraceWriter", Reasoner)
    monkeypatch.setattr(sys, "argv", ["01", "--out", str(out), *words])
    stage.main()
    return {path.stem: read_jsonl(path) for path in out.glob("*.jsonl")}


def by_source(records: list[dict]) -> dict[str, int]:
    return dict(Counter(source for source, _ in {(r["source"], r["prompt"]) for r in records}))


def test_the_papers_mixture_has_the_papers_counts(standins, tmp_path, monkeypatch):
    sets = build(monkeypatch, tmp_path / "half", paper_words(standins))
    assert (
        by_source(sets["sft"]) == {"wildjailbreak": 400, "aegis": 300, "safeedit": 300}
        and len(sets["sft"]) == 4000
    )
    assert Counter(r["kind"] for r in sets["rl"]) == {"harmful": 1000, "harmless": 500, "ambiguous": 500}
    harmful = by_source([r for r in sets["rl"] if r["kind"] == "harmful"])
    assert set(harmful) == {"wildjailbreak", "aegis", "rainbow"} and all(
        abs(harmful[name] - share) < 60
        for name, share in (("wildjailbreak", 400), ("aegis", 200), ("rainbow", 400))
    ), "a share of each source's part of the pool"
    prompts = [{stage.same_prompt(r["prompt"]) for r in records} for records in sets.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)), "no prompt in two sets"
    assert all(
        len(r["prompt"]) < 1000 or r["source"] == "wildjailbreak"
        for name in ("sft", "rl")
        for r in sets[name]
    )
    dropped = json.loads((tmp_path / "half" / "manifest.json").read_text())["dropped"]
    assert "too long" not in dropped, "the only long one is WildJailbreak's, and is kept"
    assert not any(
        r["prompt"].startswith("hard") or r["prompt"] == "wild 7" for r in sets["rl"] + sets["sft"]
    )
    assert {name: len(sets[f"eval_{name}"]) for name in stage.SETS[:3]} == {
        "harmful": 20,
        "harmless": 500,
        "ambiguous": 9,
    }

    sources = json.loads((tmp_path / "half" / "manifest.json").read_text())["sources"]
    for name, counts in {
        "wildjailbreak": {"sft": 400, "rl pool": 800},
        "aegis": {"sft": 300, "rl pool": 400},
        "safeedit": {"sft": 300},
        "rainbow": {"rl pool": 800},
        "ultrafeedback": {"rl pool": 2000},
        "or-bench": {"rl pool": 2000},
    }.items():
        facts = sources[standins(name)]
        assert facts["paper"] == counts and counts.items() <= facts["prompts"].items() and facts["sha256"], (
            name
        )
    assert sources[standins("wildchat")]["prompts"] == {"eval_harmless": 500}
    assert sources[standins("aegis")]["licence"] == "CC-BY-4.0"


def test_all_of_the_harmful_pool_at_lambda_1_and_another_file_leaves_the_choice_of_others(
    standins, tmp_path, monkeypatch
):
    words = paper_words(standins, lambda_harmful=1.0, sft_prompts=0)
    whole = build(monkeypatch, tmp_path / "whole", words)
    assert (
        by_source(whole["rl"]) == {"wildjailbreak": 800, "aegis": 400, "rainbow": 800} and "sft" not in whole
    )
    words = paper_words(standins)
    without = build(monkeypatch, tmp_path / "before", [w for w in words if "rainbow" not in w])
    assert not {r["prompt"] for r in without["sft"]} & {r["prompt"] for r in whole["rl"]}, (
        "kept for SFT without it, too"
    )
    assert without["sft"] == build(monkeypatch, tmp_path / "after", words)["sft"]


def test_quotas_that_cannot_be(standins, tmp_path, monkeypatch):
    cases = {
        "too few of one source": (
            {"files": "harmful=safeedit:300+9"},
            "harmful=safeedit has 301 prompts.*its quota needs 309",
        ),
        "another number for SFT": (
            {"sft_prompts": 999},
            "--sft-prompts: given 999; the quotas S\\+R of --files say 1000",
        ),
        "two quotas": ({"files": "harmful=aegis:1+1 harmful=aegis:2"}, "harmful=aegis has two quotas"),
    }
    for name, (flags, message) in cases.items():
        words = paper_words(standins, **{k: v for k, v in flags.items() if k != "files"})
        if "files" in flags:
            given = [parse_word(word) for word in flags["files"].split()]
            files = [
                word.replace(one.text, standins(one.name))
                for word, one in zip(flags["files"].split(), given, strict=True)
            ]
            words += ["--sft-prompts", str(sum(one.sft for one in given)), "--files", *files]
        with pytest.raises(UserError, match=message):
            build(monkeypatch, tmp_path / name, words)


def test_traces_of_a_file_take_the_place_of_the_quotas_for_sft(standins, tmp_path, monkeypatch):
    rows = [
        {"id": i, "question": f"star {i}", "response": f"<think>no {i}</think>No.", "category": ["c"]}
        for i in range(12)
    ]
    star = write_rows(tmp_path / "star.parquet", rows)
    words = paper_words(standins, sft_prompts=10, trace_files=f"star1@{star}")
    words = [w for w in words if w not in ("--trace-model", "reasoner")]
    sets = build(monkeypatch, tmp_path / "out", words)
    assert by_source(sets["sft"]) == {"star1": 10} and len(sets["rl"]) == 2000
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"][f"star1@{star}"]["prompts"] == {"sft": 10}


@needs_data
def test_real_files_as_known_sources():
    columns = stage.Settings()
    read = read_prompts(f"xstest@{SHARED}/xstest/xstest_v2_completions_gpt4.csv", columns, {})
    assert Counter(name for name, _ in read) == {"ambiguous": 250, "harmful": 200}
    targets = json.loads((SHARED / "harmbench" / "harmbench_targets_text_val.json").read_text())
    read = read_prompts(f"harmbench@{SHARED}/harmbench/harmbench_behaviors_text_val.csv", columns, targets)
    assert len(read) == 60 and all(record["target"] and record["category"] for _, record in read)
