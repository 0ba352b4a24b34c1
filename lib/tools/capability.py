r"""Is the capability kept? Exact match on questions with one right answer, such as GSM8K's (appendix L).

    python -m lib.tools.capability --models base=lib/sandbox/base tars=runs/demo/rl --direct base \
        --file questions.jsonl --out runs/demo/capability

Each model answers each question once, greedily. What counts of an answer, behind </think>: the last line with
"####" and a number behind it, or the last \boxed{}, whichever comes later; else what follows any "####", a
heading perhaps; else its last number. If the reference is a number, values are compared, else the text up to
case, blanks and outer punctuation. Models are compared on the same questions, in pairs.

Writes answers.jsonl, which grows as it runs (after a kill, the same command goes on), and results.json.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import UserError
from lib.chat import decode, encode_prompt, eos_token_ids, parse_completion, parse_direct
from lib.metrics import bootstrap, wilson
from lib.run import run_main, start
from lib.run.checks import check_tokenizer
from lib.run.files import append_jsonl, resume_log, write_json
from lib.run.folder import reasons
from lib.run.hub import load_policy, load_tokenizer
from lib.run.settings import TOKENS, Common, named, setting
from lib.sampler import sample
from lib.sources import read_table, text_of

AT_ONCE = 64  # questions between two savings
SHOWN = "{}: exact match {mean:.3f} [{low:.3f}, {high:.3f}]"
# 1,234 or 1234 or 1,234.5 or .5, or 3/4; the sign is no minus behind a digit or a word (10-3, twenty-3)
WHOLE = r"(?<![\w.)])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/0*[1-9]\d*)?"
NUMBER = re.compile(WHOLE + r"|(?<![\w)])-?\.\d+|\d+(?:\.\d+)?")
MARK = re.compile(r"####(?=([^\n]*))|\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")


@dataclass
class Settings(Common):
    models: list[str] = setting(
        ["base=lib/sandbox/base", "tars=runs/demo/rl"], "NAME=FOLDER or NAME=HUB-NAME"
    )
    direct: list[str] = setting([], "names of those without reasoning; those of 02 and 03 say it themselves")
    file: str = setting("questions.jsonl", "questions: .jsonl, .json, .csv or .parquet")
    out: str = setting("runs/demo/capability", "folder for the results")
    question_column: str = setting("question", "its name in FILE")
    answer_column: str = setting("answer", "the reference's")
    instruction: str = setting("", "said behind each question: how to mark the answer")
    max_new_tokens: int = setting(1024, "of an answer", low=1)
    max_batch_tokens: int = setting(16384, "rows x columns of the sampler's cache", low=16, high=TOKENS)
    dtype: str = setting("float32", "of weights; auto: as saved", choices=("float32", "bfloat16", "auto"))

    def inputs(self) -> list[str]:
        return [self.file, *(text.partition("=")[2] for text in self.models)]


def plain(text: str) -> str:
    r"""Without LaTeX's fractions, spaces and escapes, signs of currency, and typographers' minus signs.

    >>> [str(x) for x in numbers(plain(r"$1,234.50 is -3 and 1/2, \frac{3}{4}; 10-3 = 7."))]
    ['2469/2', '-3', '1/2', '3/4', '10', '3', '7']
    """
    text = text.replace("\u2212", "-").replace("\\!", "").replace("\\$", "$")
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"(-?)[$€£¥]\s*", r"\1", text)


def numbers(text: str) -> list[Fraction]:
    """The values of all numbers in a `plain` text, exactly."""
    found = [x for x in NUMBER.findall(text) if len(x) < 300]  # more: a model that cannot stop
    parts = [x.replace(",", "").partition("/") for x in found]
    return [Fraction(over) / Fraction(under or 1) for over, _, under in parts]


def final_part(text: str) -> str:
    r"""What is marked as the answer in a `plain` text: a number behind "####", or in \boxed{}, the later one.

    >>> final_part("2 + 3 = 5\n#### 5"), final_part("#### Result\nIt is \\boxed{1/2}.")
    ('5', '1/2')
    """
    marks = [mark for mark in MARK.finditer(text) if mark[1] is None or numbers(mark[1])]
    if not marks:
        return text.rpartition("####")[2].strip()
    return (marks[-1][1] or marks[-1][2] or "").strip(" \t\r#")


def verdict(answer: str, reference: str) -> tuple[str, bool]:
    """(what was taken from the answer, whether it is right). Nothing found, "", is wrong."""
    said, right = final_part(plain(answer)), final_part(plain(reference))
    if NUMBER.fullmatch(re.sub(r"\s*\\?%?\s*\.?\s*\Z", "", right)):  # and $5.00, 5. and 50 %
        found = numbers(said)
        return (str(found[-1]), found[-1:] == numbers(right)) if found else ("", False)
    said, right = (unicodedata.normalize("NFKC", text).casefold() for text in (said, right))
    said, right = (" ".join(text.split()).strip(" .,;:!?\"'()[]{}*") for text in (said, right))
    return said, said == right != ""


def read_questions(settings: Settings) -> list[dict]:
    """[{"id", "question", "reference"}, ...]. Ids are the records' own; their places if not all have one."""
    rows = read_table(Path(settings.file))
    ids = [text_of(row.get("id")) for row in rows]
    if "" in ids or len(set(ids)) < len(ids):
        ids = list(map(str, range(len(rows))))
    columns, questions = (settings.question_column, settings.answer_column), []
    for name, row in zip(ids, rows, strict=True):
        question, reference = (text_of(row.get(column)).strip() for column in columns)
        if not (question and reference):
            where = f"{settings.file}: {name} has no text in {' or '.join(columns)}"
            raise UserError(f"{where}; its columns: {', '.join(row)} (--question-column, --answer-column)")
        questions.append({"id": name, "question": question, "reference": reference})
    return questions


def ask(name: str, folder: str, reasoning: bool, questions: list[dict], settings: Settings) -> list[dict]:
    """The model's lines of answers.jsonl: those that are there, and the new ones, saved AT_ONCE at a time."""
    path = Path(settings.out) / "answers.jsonl"
    done = {line["id"]: line for line in resume_log(path) if line["model"] == name}
    if missing := [q for q in questions if q["id"] not in done]:
        model = load_policy(folder, device=settings.device, dtype=settings.dtype)
        tokenizer = load_tokenizer(folder)
        check_tokenizer(model, tokenizer, [q["question"] for q in questions[:8]], reasoning=reasoning)
        limits: dict[str, Any] = {"temperature": 0.0, "eos_token_ids": eos_token_ids(model, tokenizer)}
        limits |= {"max_new_tokens": settings.max_new_tokens, "max_batch_tokens": settings.max_batch_tokens}
    for begin in tqdm(range(0, len(missing), AT_ONCE), name, unit="block", disable=not missing):
        block = missing[begin : begin + AT_ONCE]
        texts = [f"{q['question']}\n{settings.instruction}".strip() for q in block]
        try:
            prompts = [encode_prompt(tokenizer, text, reasoning=reasoning) for text in texts]
            completions = sample(model, prompts, **limits)
        except (ValueError, FloatingPointError) as error:  # a prompt that is too long, or a broken model
            raise UserError(f"{name}: {error}") from error
        for q, completion in zip(block, completions, strict=True):
            text, cut = decode(tokenizer, completion.token_ids), completion.finish_reason == "length"
            answer = (parse_completion if reasoning else parse_direct)(text).answer
            unfinished = reasoning and cut and "</think>" not in text  # has not come to an answer
            taken, right = ("", False) if unfinished else verdict(answer, q["reference"])
            read = {"completion": text, "extracted": taken, "right": right, "cut": cut}
            done[q["id"]] = {"model": name, **q, **read, "tokens": len(completion.token_ids)}
            append_jsonl(path, done[q["id"]])
    return [done[q["id"]] for q in questions]


def measure(answers: dict[str, list[dict]]) -> dict[str, Any]:
    """{"models": {name: figures}, "differences": exact match, a - b, of every two, paired by question}."""
    shares = {"exact_match": "right", "answered": "extracted", "cut": "cut"}
    models, differences = {}, list[dict[str, Any]]()
    for name, lines in answers.items():
        figures = {figure: wilson([bool(line[key]) for line in lines]) for figure, key in shares.items()}
        models[name] = figures | {"tokens": bootstrap([line["tokens"] for line in lines], 0)}
        print(SHOWN.format(name, **figures["exact_match"]))
    for a, b in itertools.combinations(answers, 2):
        gaps = [x["right"] - y["right"] for x, y in zip(answers[a], answers[b], strict=True)]
        differences.append({"figure": "exact match", "a": a, "b": b, "ci": bootstrap(gaps, 0)})
        print(SHOWN.format(f"{a} - {b}", **differences[-1]["ci"]))
    return {"models": models, "differences": differences}


def main(argv: list[str] | None = None) -> None:
    settings, run = start(Settings, "capability", argv=argv)
    if run.size > 1:
        raise UserError("torchrun: this command runs as one process; start it with python")
    models, questions = named("--models", settings.models), read_questions(settings)
    if unknown := [name for name in settings.direct if name not in models]:
        raise UserError(f"--direct: given {unknown[0]}; allowed the names in --models: {', '.join(models)}")
    reasoning = {name: reasons(name, folder, settings.direct) for name, folder in models.items()}
    for folder in models.values():  # all inputs are looked at before OUT is emptied
        load_tokenizer(folder)
    run.begin()
    answers = {name: ask(name, models[name], reasoning[name], questions, settings) for name in models}
    write_json(run.out / "results.json", measure(answers) | {"config": run.config})


if __name__ == "__main__":
    run_main(main)
