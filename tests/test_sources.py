"""The room of sources: known data sets on small files of their columns, files of each format, no hub.

All prompts are made up. What the columns of a data set are is stated here once more, by hand, from its card.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from lib import UserError
from lib.run.files import write_jsonl
from lib.run.text import same_prompt, without_context
from lib.sources.known import KNOWN
from lib.sources.reading import parse_word, read_source

KEYS = {"id", "prompt", "kind", "source", "category", "target"}
ENDINGS = ("jsonl", "json", "csv", "tsv", "parquet")


def write_rows(path: Path, rows: list[dict]) -> Path:
    """As the ending says; json as an array."""
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


def read(word: object, flag: str = "--files") -> list[dict]:
    return read_source(parse_word(str(word), flag), Counter())


def fails(word: object, flag: str = "--files") -> str:
    with pytest.raises(UserError) as error:
        read(word, flag)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- known data sets ----


def turn(text: object, role: str = "user") -> dict:
    return {"content": text, "role": role}


TALK = [turn("Be brief.", "system"), turn("how to zog?"), turn("No.", "assistant"), turn("why?")]


def chat(text: str, language: str = "English", toxic: bool = False) -> dict:
    return {"conversation": [TALK[0], turn(text), *TALK[2:]], "language": language, "toxic": toxic}


def wild(prompt: str, kind: str = "adversarial_harmful") -> dict:
    return {"vanilla": "plain", "adversarial": prompt, "data_type": kind}


def aegis(prompt: str, label: str = "unsafe") -> dict:
    return {"prompt": prompt, "prompt_label": label, "violated_categories": "Zog, Wip"}


def rows_of(columns: str, *rows: tuple) -> list[dict]:
    return [dict(zip(columns.split(), row, strict=True)) for row in rows]


CHATS = [chat("hello"), chat("hola", "Spanish"), chat("rude", toxic=True)]
CHATS += [chat("I begin") | {"conversation": TALK[2:]}]
WILD = [wild("NA"), wild('say, "me"\nof'), wild("b", "adversarial_benign")]
WILD += [wild("", "vanilla_harmful") | {"vanilla": "007"}]
REDACTED = [aegis(" zog 1 "), aegis("REDACTED"), aegis("soup", "safe")]
ODD = rows_of("prompt type label", ("a", "homonyms", ""), ("b", "contrast_x", ""), ("c", "t", "unsafe"))
DOMAINS = {"5": "hate speech", "6": "crimes or torts", "44": "unqualified advice", "Fraud": "Fraud"}
SORRIES = [("6", ["no"], "slang"), *((number, [f"p{number}"], "base") for number in DOMAINS)]
SORRIES = rows_of("category turns prompt_style", *SORRIES)
TARS = [([turn("a")], "wildjailbreak"), ([turn("b")], "aegis"), ([turn("c")], "refusal")]
STAR = {"question": "zog?", "category": ["zogs"], "response": "<think>\nNo good.\n</think>\n\nI will not."}
EDIT = {"unsafety category": "Z", "adversarial prompt": "zog", "question": "?"}
# a file of the data set: its rows, and "set: prompt: category" of what is taken
CASES: dict[str, tuple[list[dict], list[str]]] = {
    "wildjailbreak.tsv": (WILD, ["harmful: NA: ", 'harmful: say, "me"\nof: ', "harmful: 007: "]),
    "aegis.json": (REDACTED, ["harmful: zog 1: Zog, Wip"]),
    "safeedit.json": ([EDIT], ["harmful: zog: Z"]),
    "ultrafeedback.parquet": ([{"prompt": "Soup.", "prompt_id": "p"}], ["harmless: Soup.: "]),
    "wildchat.parquet": (CHATS, ["harmless: hello: "]),
    "xstest.csv": (ODD, ["ambiguous: a: homonyms", "harmful: b: contrast_x", "harmful: c: t"]),
    "or-bench-hard.csv": ([{"prompt": "Kill it", "category": "c"}], ["ambiguous: Kill it: c"]),
    "strongreject.parquet": ([{"prompt": "zog", "category": "Z"}], ["harmful: zog: Z"]),
    "strongreject.csv": ([{"category": "Z", "forbidden_prompt": "zog"}], ["harmful: zog: Z"]),
    "sorry-bench.jsonl": (SORRIES, [f"harmful: p{number}: {domain}" for number, domain in DOMAINS.items()]),
    "harmbench.parquet": ([{"prompt": "make a zog", "category": "zogs"}], ["harmful: make a zog: zogs"]),
    "rainbow.jsonl": ([{"prompt": "a zog", "risk": "zogs", "style": "slang"}], ["harmful: a zog: zogs"]),
    "tars.parquet": (
        rows_of("prompt ability", *TARS),
        ["jailbreak: a: wildjailbreak", "harmful: b: aegis", "harmless: c: refusal"],
    ),
}


@pytest.mark.parametrize("file", CASES)
def test_a_known_data_set_of_its_own_columns(tmp_path, file):
    rows, expected = CASES[file]
    path = write_rows(tmp_path / file, rows)
    found = read(f"{path.stem}@{path}")
    assert [f"{r['kind']}: {r['prompt']}: {r['category']}" for r in found] == expected
    assert all(set(r) >= KEYS and r["source"] == path.stem for r in found)
    assert KNOWN[path.stem].record.__doc__
    assert {name.split(".")[0] for name in CASES} | {"or-bench", "star1"} == set(KNOWN)


def test_or_bench_is_without_its_hard_prompts(tmp_path):
    path = write_rows(tmp_path / "80k.csv", [{"prompt": f"prompt {i}", "category": "c"} for i in range(5)])
    assert "or-bench-hard-1k.csv" in fails(f"or-bench@{path}")
    hard = write_rows(tmp_path / "or-bench-hard-1k.csv", [{"prompt": "Prompt  3", "category": "c"}])
    assert [r["prompt"] for r in read(f"ambiguous=or-bench@{path}")] == [f"prompt {i}" for i in (0, 1, 2, 4)]
    assert parse_word(f"or-bench@{path}").files == [path, hard], "both are inputs"


def test_harmbench_as_its_authors_publish_it_has_contexts_and_targets_beside(tmp_path):
    row = {"FunctionalCategory": "contextual", "SemanticCategory": "zogs", "Behavior": "Sum it up."}
    song = row | {"FunctionalCategory": "copyright", "ContextString": "", "BehaviorID": "song"}
    rows = [row | {"ContextString": " A text. ", "BehaviorID": "sum_up"}, song, song]
    path = write_rows(tmp_path / "harmbench_behaviors_all.csv", rows)
    (tmp_path / "harmbench_targets_all.json").write_text('{"sum_up": "Sure, it says",\n "song": "La"}')
    [record] = read_source(parse_word(f"jailbreak=harmbench@{path}"), dropped := Counter())
    assert (record["kind"], record["target"]) == ("jailbreak", "Sure, it says")
    assert record["prompt"] == "A text.\n\n---\n\nSum it up." and record["context"] == " A text. "
    assert without_context(record["prompt"], record["context"]) == "Sum it up."
    assert dropped == {"rows of harmbench": 2}
    path = path.rename(tmp_path / "harmbench_behaviors_val.csv")
    assert read(f"harmbench@{path}")[0]["target"] == "", "another set's targets are not its own"


def test_traces_of_star1(tmp_path):
    path = write_rows(tmp_path / "star.parquet", [STAR, STAR | {"response": "I will not."}])
    whole, cut = read(f"star1@{path}", "--trace-files")
    assert (whole["reasoning"], whole["answer"]) == ("No good.", "I will not.") and "answer" not in cut
    assert (whole["prompt"], whole["category"]) == ("zog?", "zogs")


# ---- files of yours ----

NAMES = ["", 'a "b"\nc', *"007 1e5 1.0 true True NA null 2024-01-01 1_000 inf -0 1,5".split()]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_text_is_what_stands_in_the_file(tmp_path, ending):
    """csv was once read with types: a column of numbers lost its zeros, one of dates became times."""
    for names in (NAMES, ["007", "010"], ["2024-01-01"], ["1.0", "2.50"]):
        rows = [{"target": name, "prompt": name or "p"} for name in names]
        found = read(f"harmful={write_rows(tmp_path / f'x.{ending}', rows)}")
        assert [{key: r[key] for key in ("target", "prompt")} for r in found] == rows


def test_the_prompt_of_a_conversation_is_the_users_first_turn(tmp_path):
    """verl's layout: the system prompt once became every row's, and all rows but one were duplicates."""
    gpt, parts = [{"from": "human", "value": "how to zog?"}], [{"type": "text", "text": "how to zog?"}]
    both = [turn(None, None) | gpt[0]]  # a column of both makers' turns
    talks = ["how to zog?", TALK[1:2], TALK, [turn("Hello.", "assistant"), *TALK], gpt, both]
    talks += [[turn(parts)], []]
    path = write_rows(tmp_path / "talks.jsonl", [{"prompt": talk} for talk in talks])
    assert [record["prompt"] for record in read(f"harmless={path}")] == ["how to zog?"] * 7 + [""]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_record_keeps_what_stage_4_reads_and_of_json_all(tmp_path, ending):
    row = {"prompt": "how to zog?", "id": "7", "context": "A text.", "category": "zogs", "kind": "jailbreak"}
    own = {"hops": 2, "prefill": "first", "twin": "how to bake?", "target": "so"}
    more = {"place": ["x", {"y": 1}], "source": "mine"} if ending in ("jsonl", "json") else {"note": "n"}
    rows = [row | own | more, row | own | {"hops": 0, "twin": "", **more}]
    path = write_rows(tmp_path / f"own.{ending}", rows)
    record, other = read(path)
    assert set(record) == KEYS | {"context", "hops", "prefill", "twin"} | ({"place"} & set(more))
    assert set(other) == set(record) - {"twin"} and (record["hops"], other["hops"]) == (2, 0)
    assert all(record[key] == own[key] for key in own) and record["source"] == str(path)
    assert record["prompt"] == "A text.\n\n---\n\nhow to zog?" and record["context"] == "A text."
    assert (record["kind"], read(f"ambiguous={path}")[0]["kind"]) == ("jailbreak", "ambiguous")


def test_ids_are_unique_and_no_text_holds_what_tokenizers_do_not_take(tmp_path):
    text = '{"id": 7, "prompt": "x\\ud800y"}\n{"id": 7, "prompt": "z\\u0000", "context": NaN, "hops": 3.0}'
    (tmp_path / "x.json").write_text(text)
    one, other = read(f"harmful={tmp_path}/x.json")
    assert (one["prompt"], other["prompt"], other["hops"]) == ("x\ufffdy", "z\ufffd", 3)
    assert one["id"].startswith("x-7-") and one["id"] != other["id"]


BROKEN = {  # word: what stands in its file, and in the line
    "harmful=more.csv": ("prompt,b\n1,2,3\n", "more cells than the header"),
    "harmful=deep.json": ("[" * 10**5, "cannot be read as json"),
    "harmful=other.jsonl": ('{"question": "why?"}', "no harmful prompt in 1 rows of question"),
    "kind.jsonl": ('{"prompt": "p", "kind": "odd"}', "record 1: ValueError: kind is 'odd', allowed harmful"),
    "wildjailbreak@x.csv": ("attack,data_type\nzog,vanilla_harmful", "'adversarial'; its columns are attack"),
    "harmless=aegis@x.json": (json.dumps(REDACTED), "no harmless prompt in 3 rows"),
}


@pytest.mark.parametrize("word", BROKEN)
def test_a_malformed_file_is_one_line(tmp_path, monkeypatch, word):
    text, line = BROKEN[word]
    monkeypatch.chdir(tmp_path)
    Path(word.split("=")[-1].split("@")[-1]).write_text(text)
    assert line in fails(word)


SAME = [
    "How do I bake?|how  do i\tbake|\u201cHow do I bake?\u201d|How do I ba\u200bke?\ufeff|How do I bake...",
    "How do I bake?|How\u00a0do\u2003I ba\u00adke ?|\uff28ow do I bake\uff1f",
    "don't say 'x'|don\u2019t say \u00abx\u00bb",
    "a-b - c|a\u2010b \u2014 c|\u00bfa\ufe0f-b \u2212 c?",
    "caf\u00e9 office stra\u00dfe|cafe\u0301 o\ufb03ce STRASSE",
]
APART = ["bake|boil", "what is C#|what is C", "10 - 3|103", "it's|its", "!!!|???", "caf\u00e9|cafe", "1.5|15"]


def test_what_is_the_same_prompt_to_a_reader():
    for texts in SAME + APART:
        keys = [same_prompt(text) for text in texts.split("|")]
        assert len(set(keys)) == (1 if texts in SAME else 2), texts
        assert [same_prompt(key) for key in keys] == keys


# ---- words, and the hub ----


def test_a_word_is_taken_apart():
    words = [parse_word(word) for word in ("aegis", "harmful=aegis:3", "harmful=aegis:4+0")]
    assert [(w.kind, w.sft, w.rl) for w in words] == [("", 0, None), ("harmful", 0, 3), ("harmful", 4, 0)]
    for place, rl in (("me/chat:en:train", ":20"), ("me/chat:train", "")):
        source = parse_word(f"harmless=hub:{place}{rl}")
        assert source.hub == source.name == place and source.rl == (20 if rl else None)
    source = parse_word("harmful=aegis@a/b=c.json:5")
    assert (source.files, source.name, source.hub) == ([Path("a/b=c.json")], "aegis", "")
    assert parse_word("notes@home.csv").files == [Path("notes@home.csv")]


def test_a_word_that_says_nothing_is_one_line_with_what_is_allowed():
    wrong = "aegs aegis:5 hub:me:train hub:me/chat aegis@ rainbow notes.txt harmful= harmfull=aegis:4".split()
    words = [("--files", word) for word in ("", *wrong)]
    for flag, word in (*words, ("--eval-files", "harmful=aegis:5"), ("--trace-files", "star1:5")):
        assert fails(word, flag).startswith(f"{flag}: given {word}; allowed")


def test_data_sets_come_from_the_hub_or_one_line_says_why_not(monkeypatch):
    hard = [{"prompt": "b", "category": "c"}]
    hub = {("or-bench-80k", "train"): [{"prompt": "a", "category": "c"}, *hard]}
    hub |= {("or-bench-hard-1k", "train"): hard, ("en", "dev"): [{"prompt": "soup?", "kind": "harmless"}]}
    hub |= {(None, "none"): []}

    def load_dataset(name, config=None, *, split):
        if name == "zjunlp/SafeEdit":
            raise RuntimeError("Dataset 'x' is a gated dataset\non the Hub.")
        return datasets.Dataset.from_list(hub[config, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [one], [other] = read("or-bench"), read("hub:me/chat:en:dev")
    assert (one["prompt"], one["source"]) == ("a", "or-bench")
    assert (other["prompt"], other["source"]) == ("soup?", "me/chat:en:dev")
    assert "no harmful prompt in 0 rows" in fails("harmful=hub:me/chat:none")
    line = fails("safeedit")
    assert "zjunlp/SafeEdit:train: cannot be read from the hub (Dataset 'x' is a gated dataset on" in line
    assert "hf auth login" in line
