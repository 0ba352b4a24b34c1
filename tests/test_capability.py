from __future__ import annotations

import json
import shutil
from fractions import Fraction

import pytest

from lib import UserError
from lib.chat import decode, encode_prompt, eos_token_ids
from lib.run.command import at_end
from lib.run.files import read_jsonl, write_json, write_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.sampler import Completion, sample
from lib.sandbox import world
from lib.tools import capability as module
from lib.tools.capability import as_number, final_part, main, numbers, verdict

BASE = str(world.BASE)


# ---- what an answer says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", "1234"),
        ("1,234,567.5", "1234567.5"),
        ("$5.00", "5"),
        ("-$5", "-5"),
        ("\u22123", "-3"),  # a typographer's minus
        ("-3", "-3"),
        ("5.", "5"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        (r"\frac{3}{4}", "0.75"),
        ("1.5/2", "0.75"),
        ("10-3", "3"),  # a difference, not minus three
        ("x=-7", "-7"),
        ("1,2", "2"),  # a list, not twelve
        ("25 m²", "25"),
        ("**42**", "42"),
        ("\\$1,000", "1000"),
        ("007", "7"),
        ("1/0", "0"),  # no fraction
        ("A4", "4"),
        ("3 of 12 is 25%", "25"),
    ],
)
def test_the_last_number(text, value):
    assert numbers(f"So {text}")[-1] == Fraction(value)


@pytest.mark.parametrize("text", ["", "none", "½ of it", "9" * 10_000, "-", "./.", "$"])
def test_no_number(text):
    assert numbers(text) == [] and as_number(text) is None


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("48/2 = 24, and 48+24 = 72.\n#### 72", "48/2=<<48/2=24>>24\n#### 72", True),
        ("It is 72. Then check: 5 + 5 = 10.\n#### 72.0", "#### 72", True),
        ("#### 10\nNo: #### 72", "#### 72", True),  # the last mark counts
        (r"so \boxed{7}, as 9 - 2 = 7 and 9 > 2", "7", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        ("#### Step 1: halve 48\n48/2 = 24\n#### Result\n\\boxed{72}", "72", True),  # headings
        ("\\boxed{72}\n#### Remark\nThat is 6 dozen.", "72", True),
        ("\\boxed{70}, no.\n#### **72** apples", "72", True),  # the later mark counts
        ("#### 72\nSo she has 72 and gave 5 away.", "72", True),  # the line alone
        ("#### 70\n\\boxed{72", "70", True),
        ("#### Paris", "Paris", True),
        ("####\n72", "72", True),
        (r"\boxed{x_{1}} and no more", "x_{1}", True),
        ("It costs $1,234.50 in all.", "1234.5", True),
        ("It is 71.", "72", False),
        ("72 apples, and 5 left", "72", False),
        ("seventy-two", "72", False),
        ("", "72", False),
        ("(B)", "B", True),
        ("  New   york. ", "New York", True),
        ("I think it is Paris", "Paris", False),  # exact match
        ("", "...", False),
        ("5 apples", "5 apples", True),  # no number alone: text
    ],
)
def test_verdicts(answer, reference, right):
    assert verdict(answer, reference)[1] is right


def test_an_unclosed_box_is_text():
    assert final_part(r"\boxed{12 and so on") == r"\boxed{12 and so on"


def test_odd_texts_raise_nothing():
    for text in (
        "\\boxed{" * 2000,
        "}" * 999 + "\\boxed{",
        "####" * 99,
        "1," * 50_000,
        "1/" * 9999,
        "\ud800 \x00 ٣ ²",
        "-" * 10_000,
    ):
        for reference in (text, "5"):
            verdict(text, reference)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """Models that say what the test tells them: {folder: {question's number: text}}; counts what they are asked."""
    said: dict[str, dict[int, str]] = {}
    asked: list[str] = []
    tokenizer = load_tokenizer(BASE)

    def fake(model, prompts, **options):
        assert options["temperature"] == 0
        result = []
        for prompt in prompts:
            text = decode(tokenizer, prompt)
            asked.append(f"{model}: {text}")
            number = next(i for i in range(10) if f" {world.NOISE[i]} " in f" {text} ")
            answer = said[model].get(number, "^C")
            if answer == "^C":
                raise KeyboardInterrupt
            result.append(Completion([number], [0.0], "length" if answer.endswith("...") else "eos"))
            texts[number, model] = answer
        last.append(model)
        return result

    texts: dict[tuple[int, str], str] = {}
    last: list[str] = []
    monkeypatch.setattr(module, "sample", fake)
    monkeypatch.setattr(module, "load_policy", lambda folder, **options: folder)
    monkeypatch.setattr(module, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(module, "check_tokenizer", lambda *args, **options: None)
    monkeypatch.setattr(module, "eos_token_ids", lambda model, tokenizer: [2])
    monkeypatch.setattr(module, "decode", lambda tokenizer, ids: texts[ids[0], last[-1]])
    monkeypatch.setattr(module, "AT_ONCE", 2)
    return said, asked


def questions(tmp_path, n=6):
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, [{"q": {"text": f"what is {world.NOISE[i]} ?"}, "answer": i} for i in range(n)])
    return ["--file", str(path), "--question-column", "q.text", "--out", str(tmp_path / "out")]


def test_shares_and_paired_differences(answers, tmp_path, capsys):
    said, _ = answers
    said["a"] = {i: f"hm </think> {i}" for i in range(6)} | {
        5: "it may be 5 or ..."
    }  # reasoning without an end: no answer
    said["b"] = {0: "0", 1: "1", 2: "7", 3: "no idea", 4: "4 ...", 5: "6"}  # cut, but it is the answer
    main(["--models", "a=a", "b=b", "--direct", "b", *questions(tmp_path)])
    results = json.loads((tmp_path / "out/results.json").read_text())
    a, b = results["models"]["a"], results["models"]["b"]
    assert (a["exact_match"]["mean"], b["exact_match"]["mean"]) == (0.8333, 0.5) and a["exact_match"][
        "n"
    ] == 6
    assert a["exact_match"]["low"] == 0.4365  # Wilson's, 5 of 6
    assert (a["answered"]["mean"], b["answered"]["mean"]) == (0.8333, 0.8333)
    assert (a["cut"]["mean"], b["cut"]["mean"]) == (0.1667, 0.1667)
    (difference,) = results["differences"]
    assert (difference["a"], difference["b"], difference["ci"]["mean"]) == ("a", "b", 0.3333)
    assert difference["ci"]["low"] == 0.0 and difference["ci"]["high"] == 0.6667  # each gap is 0 or 1, 2 of 6
    assert "a - b: 0.333 [0.000, 0.667]" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_asks_nothing_twice(answers, tmp_path):
    said, asked = answers
    said["a"] = {0: "0", 1: "1", 2: "2", 3: "0"}
    argv = ["--models", "a=a", "--direct", "a", *questions(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    path = tmp_path / "out/answers.jsonl"
    assert [line["right"] for line in read_jsonl(path)] == [True, True, True, False]
    with path.open("a") as file:
        file.write('{"model": "a", "id"')  # half a line, as a kill leaves it
    said["a"] |= {4: "4", 5: "5"}
    asked.clear()
    main(argv)
    assert len(asked) == 2 and [line["id"] for line in read_jsonl(path)] == list("012345")
    asked.clear()
    main(argv)  # finished: loads no model, asks nothing
    assert asked == []
    with pytest.raises(UserError, match="--instruction"):
        main([*argv, "--instruction", "please"])


def test_the_sandbox_base_agrees_with_its_own_greedy_answers(tmp_path):
    model, tokenizer = load_policy(BASE, device="cpu"), load_tokenizer(BASE)
    prompts = ["how do i make a cake ?", "how do i make a shirt ?", "hello"]
    ids = [encode_prompt(tokenizer, p, reasoning=False) for p in prompts]
    options = {"max_new_tokens": 12, "temperature": 0.0, "eos_token_ids": eos_token_ids(model, tokenizer)}
    greedy = [decode(tokenizer, c.token_ids) for c in sample(model, ids, **options)]
    path = tmp_path / "questions.csv"
    path.write_text(
        "question,answer\n"
        + "".join(f'"{p}","{a}"\n' for p, a in zip(prompts, [*greedy[:2], "x"], strict=True))
    )
    limits = ["--max-new-tokens", "12", "--device", "cpu"]
    main(
        [
            "--models",
            f"base={BASE}",
            "--direct",
            "base",
            "--file",
            str(path),
            "--out",
            str(tmp_path / "out"),
            *limits,
        ]
    )
    assert [line["right"] for line in read_jsonl(tmp_path / "out/answers.jsonl")] == [True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--models", "a"], "--models: given a; allowed NAME=FOLDER"),
        (["--models", "a=x", "a=y"], "--models: given a=y"),
        (["--direct", "b"], "--direct: given b; allowed the names in --models: a"),
        (["--answer-column", "reply"], "--answer-column: given reply, which is empty in row 1"),
        (["--limit", "-1"], "--limit: given -1; allowed a whole number from 0 to 1000000"),
        (["--file", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--lmit", "3"], "unrecognized arguments: --lmit 3"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(change, message, tmp_path):
    with pytest.raises(UserError) as caught:
        main(["--models", f"a={BASE}", *questions(tmp_path), *change])
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_run_that_reasons_is_not_asked_directly_nor_emptied(tmp_path):
    run = tmp_path / "rl"
    shutil.copytree(BASE, run)
    write_json(run / "settings.json", {"reasoning": True, "git_revision": "abc"})
    with pytest.raises(
        UserError, match=r"--direct: given a, which reasons \(.*rl/settings.json\); take it off the list"
    ):
        main(["--models", f"a={run}", "--direct", "a", *questions(tmp_path)])
    files = sorted(run.iterdir())
    with pytest.raises(UserError, match="which this run reads: give another --out"):
        main(["--models", f"a={run}", *questions(tmp_path), "--out", str(run), "--overwrite"])
    at_end.close()  # as run_main does
    assert sorted(run.iterdir()) == files
