"""lib/tools: talking to a model, and the capability check."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys

import pytest
import reference as literal
import torch

from lib import UserError
from lib.chat import decode, encode_prompt, eos_token_ids
from lib.run.command import at_end
from lib.run.files import read_jsonl, write_json, write_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.sampler import Completion, sample
from lib.sandbox import pretrain, world
from lib.tools import capability, chat

BASE = str(world.BASE)
check = capability.main
CAKE = "how do i make a cake ?"

# ---- talking to a model ------------------------------------------------------------------------------------


def greedy(prompt: str) -> str:
    """What the sandbox's base answers, by our own sampler."""
    model, tokenizer = load_policy(BASE, device="cpu"), load_tokenizer(BASE)
    ids = [encode_prompt(tokenizer, prompt, reasoning=False)]
    how = {"max_new_tokens": 12, "temperature": 0.0, "eos_token_ids": eos_token_ids(model, tokenizer)}
    return decode(tokenizer, sample(model, ids, **how)[0].token_ids)


def test_it_says_what_the_sampler_says_and_remembers_answers_without_their_reasoning(monkeypatch, capsys):
    words = ["--temperature", "0", "--max-new-tokens", "12", "--device", "cpu"]
    for prompt in (CAKE, "hello there", "make . make . make ."):
        chat.main([BASE, *prompt.split(), *words])
        assert capsys.readouterr().out.strip() == greedy(prompt).strip()
    prompts = []
    encode = chat.encode_chat
    monkeypatch.setattr(chat, "encode_chat", lambda *a, **k: prompts.append([*a[1]]) or encode(*a, **k))
    monkeypatch.setattr(chat, "decode", lambda tokenizer, ids: "hm\x1b[2J\u202e </think> yes .")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{CAKE}\nwhy ?\n"))
    chat.main([BASE, "--reasoning", *words])
    assert [[m["content"] for m in messages] for messages in prompts] == [[CAKE], [CAKE, "yes .", "why ?"]]
    shown = capsys.readouterr().out
    assert shown.startswith("<think>\n") and "\x1b" not in shown and "\u202e" not in shown


# ---- what an answer says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("48/2 = 24.\n#### 10\nNo: #### 72.0", "48/2=<<48/2=24>>24\n#### 72", True),  # the last mark counts
        ("\\boxed{70}, no.\n#### **72** apples\nas 5 are away", "72", True),  # the later mark counts
        ("#### 72\n#### Conclusion\nfine", "72", True),  # a heading is no mark
        ("#### Step 2: add 3\nThe answer is 12.", "12", True),
        ("#### 10\nNo.\n#### Answer: \u20ac\u221212\nas 5 are away", "-12", True),
        (r"#### \frac{5}{2}", "2", False),
        (r"\boxed{.5}.", "0.5", True),
        (r"\boxed{x = - 5}", "-5", True),
        ("#### \u20135", "5", False),
        ("The three parts:\n- 5", "5", True),
        ("#### 5", ".5", False),
        ("It costs $1,234.50 in all.", "1234.5", True),
        ("-$5", "\u22125", True),
        ("#### **(B)**", "b", True),
        ("10-3", "3", True),  # a difference, not minus three
        (r"\boxed{1}, no, \boxed{\frac{\sqrt{3}}{2}}.", r"\frac{\sqrt{3}}{2}", True),
        ("so it is B.\n#### B", "Because.\n#### B", True),
        ("#### 2 + 3 = 5", "5", True),
        (r"\boxed{x_1 = 7}", "7", True),
        (r"\boxed{\dfrac{1}{5}}", "5", False),
        (r"\boxed{5/2}", "5", False),
        (r"\boxed{3\sqrt{2}}", "3", False),
        (r"so \boxed{1{,}234 \text{ cm}^2}", "1234", True),  # of what is marked the first number
        (r"\boxed{\text{Ann}}", r"\text{Ann}", True),  # as MATH has it: no unit
        ("So it is \\boxed{C}.", r"\text{(C)}", True),
        (r"\boxed{\text{(C)}}", r"\text{(D)}", False),
        (r"\boxed{18.90}", r"\$18.90", True),
        (r"\boxed{32348}", r"\$32,\!348", True),
        (r"\boxed{10}", r"10\%", True),
        (r"\boxed{90}", r"90^\circ", True),
        (r"\boxed{x_{1}} and no more", "x_{1}", True),
        ("  New   york. ", "New York", True),
        ("It is Paris", "Paris", False),  # exact match
        ("\ud800 \x00 ٣ ²" + "\\boxed{" * 2000, "5", False),
    ],
)
def test_verdicts(answer, reference, right):
    assert capability.verdict(answer, reference)[1] is right


# ---- the capability check ----------------------------------------------------------------------------------


def questions(folder, *answers):
    """One for each answer in a file, and the flags that go with it."""
    asked = ["hello there", CAKE, "why ?", "make . make ."]
    rows = [{"question": text, "answer": answer} for text, answer in zip(asked, answers, strict=False)]
    write_jsonl(folder / "q.jsonl", rows)
    return ["--file", str(folder / "q.jsonl"), "--out", str(folder / "out")]


def test_exact_match_paired_and_a_stopped_check_that_goes_on(tmp_path, monkeypatch, capsys):
    """The sandbox's base, directly, and behind a <think> that it does not know."""
    words = questions(tmp_path, greedy("hello there"), greedy(CAKE), "x", greedy("make . make ."))
    words += ["--models", f"a={BASE}", f"b={BASE}", "--no-reasoning", "a", "--max-new-tokens", "12"]
    asked, answers_of = [], capability.answers_of

    def once(model, tokenizer, records, reasoning, settings):
        asked.append(reasoning)
        if asked == [False, True]:
            raise KeyboardInterrupt
        return answers_of(model, tokenizer, records, reasoning, settings)

    monkeypatch.setattr(capability, "answers_of", once)
    with pytest.raises(KeyboardInterrupt):
        check(words)
    check(words)
    assert asked == [False, True, True]  # the first model is not asked again
    results = json.loads((tmp_path / "out/results.json").read_text())
    a, b = (results["models"][name]["capability"] for name in "ab")
    assert a["exact_match"] == {"mean": 0.75, "low": 0.3006, "high": 0.9544, "n": 4}
    assert (a["cut"]["mean"], b["exact_match"]["mean"]) == (0.0, 0.0)
    (difference,) = results["differences"]
    assert (difference["a"], difference["b"], difference["ci"]["mean"]) == ("a", "b", 0.75)
    assert "a - b: exact match 0.750 [0.250, 1.000]" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max-new-tokens"):
        check([*words, "--max-new-tokens", "5"])


def test_a_thought_that_is_cut_off_is_no_answer(monkeypatch):
    tokenizer, records = load_tokenizer(BASE), [{"question": CAKE, "reference": "use"}]
    cut = Completion(tokenizer("use", add_special_tokens=False)["input_ids"], [0.0], "length")
    monkeypatch.setattr(capability, "sample", lambda *args, **how: [cut])
    model, settings = load_policy(BASE, device="cpu"), capability.Settings()
    for reasoning, taken in ((False, "use"), (True, "")):
        (line,) = capability.answers_of(model, tokenizer, records, reasoning, settings)
        assert (line["extracted"], line["right"], line["cut"]) == (taken, not reasoning, True)


def test_loss_is_of_what_is_written_behind_what_is_given(tmp_path):
    """Against a plain pass over the same words, on which the sandbox's tokenizer agrees."""
    asked = {"question": CAKE, "opening": "explain first .", "answer": "cake is food ."}
    text = "<|user|> " + CAKE + " <|end|> <|assistant|> explain first . cake is food . <|end|>"
    write_jsonl(tmp_path / "d.jsonl", [asked, {"text": text}])
    words = ["--loss", "--file", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    check(["--models", f"base={BASE}", "--no-reasoning", "base", *words])
    ids = load_tokenizer(BASE)(text, return_tensors="pt")["input_ids"][0].tolist()
    with torch.no_grad():
        losses = -torch.stack(literal.logprobs(load_policy(BASE, device="cpu"), ids, 1))
    found = [line["loss"] for line in read_jsonl(tmp_path / "out/answers_base.jsonl")]
    assert found == pytest.approx([losses[-5:].mean().item(), losses.mean().item()], abs=1e-4)


def test_the_sandbox_writes_documents_that_its_base_has_not_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "STEPS", 4)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "document", lambda rng, step: (str(rng.randrange(1000)), "", ""))
        rng = random.Random(pretrain.SEED)
        learned = {(str(rng.randrange(1000)), "", "") for _ in range(4 * pretrain.BATCH)}
        assert len(learned) > 300 and not learned & {*pretrain.held_out(200)}
    monkeypatch.setattr(pretrain, "HELD_OUT", 40)
    path, out = tmp_path / "new/documents.jsonl", tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["pretrain", "--documents", str(path)])
    pretrain.main()
    check(["--loss", "--file", str(path), "--models", f"b={BASE}", "--no-reasoning", "b", "--out", str(out)])
    loss = json.loads((out / "results.json").read_text())["models"]["b"]["capability"]["loss"]
    assert loss["mean"] < 0.5 and loss["n"] == 40  # guessing among its words it would be 5.9


@pytest.mark.parametrize(
    ("main", "change", "message"),
    [
        (chat.main, [BASE, "cake " * 3000], "more than the model's context"),
        (check, ["--file", "SHORT"], "row 0 has no question and answer; its columns: question"),
        (check, ["--models", "a=RUN", "--no-reasoning", "a"], "--no-reasoning: given a, which reasons"),
        (check, ["--models", "a=RUN", "--out", "RUN", "--overwrite"], "which this run reads: give"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(main, change, message, tmp_path):
    run = shutil.copytree(BASE, tmp_path / "run")
    write_json(run / "settings.json", {"reasoning": True, "git_revision": "abc"})
    write_jsonl(tmp_path / "short.jsonl", [{"question": "why ?"}])
    names = {"RUN": str(run), "SHORT": str(tmp_path / "short.jsonl")}
    words = ["--models", f"a={BASE}", *questions(tmp_path, "4")] if main is check else []
    with pytest.raises(UserError) as caught:
        main([*words, *(re.sub("RUN|SHORT", lambda found: names[found[0]], word) for word in change)])
    at_end.close()
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()
