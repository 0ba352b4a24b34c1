r"""Is the capability kept? Questions with one right answer (appendix L), or the loss on held-out documents.

    python -m lib.tools.capability --direct base --file questions.jsonl --out runs/demo/capability
    python -m lib.tools.capability --direct base --loss --file documents.jsonl --out runs/demo/loss

**Exact match**, for questions such as GSM8K's: each model answers each once, greedily. What counts of an
answer, behind </think>: the last line with "####" and a number behind it, or the last \boxed{}, whichever
comes later; else what follows any "####", a heading perhaps; else its last number. If the reference is a
number, values are compared, else the text up to case, blanks and outer punctuation.

**Loss**: mean negative log-likelihood, in nats a token, of documents, each counted alike: a `text`, or the
answer to a question, maybe behind an `opening` that is given. All models read the same text, no <think>.

Models are compared on the same records, in pairs. Writes answers.jsonl, which grows as it runs (after a kill,
the same command goes on), and results.json.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib import UserError
from lib.batches import masked_batch
from lib.chat import decode, encode_example, encode_prompt, encode_text, eos_token_ids, parse_completion
from lib.metrics import bootstrap, wilson
from lib.policy import context_of, token_logprobs
from lib.run import run_main, start
from lib.run.checks import check_tokenizer
from lib.run.files import append_jsonl, resume_log, write_json
from lib.run.folder import reasons
from lib.run.hub import load_policy, load_tokenizer
from lib.run.settings import TOKENS, Common, named, setting
from lib.sampler import sample
from lib.sources import read_table, text_of

AT_ONCE = 64  # records between two savings
SHOWN = "{}: {} {mean:.3f} [{low:.3f}, {high:.3f}]"
# 1,234 or 1234 or 1,234.5 or .5, or 3/4; the sign is no minus behind a digit or a word (10-3, twenty-3)
WHOLE = r"(?<![\w.)])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/0*[1-9]\d*)?"
NUMBER = re.compile(WHOLE + r"|(?<![\w)])-?\.\d+|\d+(?:\.\d+)?")
MARK = re.compile(r"####(?=([^\n]*))|\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")


@dataclass
class Settings(Common):
    models: list[str] = setting(["base=lib/sandbox/base", "tars=runs/demo/rl"], "NAME=FOLDER or HUB-NAME")
    direct: list[str] = setting([], "names of those without reasoning; those of 02 and 03 say it themselves")
    loss: bool = setting(False, "the loss on documents, instead of answers to questions")
    file: str = setting("questions.jsonl", "questions or documents: .jsonl, .json, .csv or .parquet")
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


def read_records(settings: Settings) -> list[dict]:
    """[{"id", "question", "opening", "reference"}, ...], the question of a `text` is "". Ids are the records'
    own; their places if not all have one."""
    rows = read_table(Path(settings.file))
    ids = [text_of(row.get("id")) for row in rows]
    if "" in ids or len(set(ids)) < len(ids):
        ids = list(map(str, range(len(rows))))
    columns, records = (settings.question_column, settings.answer_column), []
    for name, row in zip(ids, rows, strict=True):
        question, answer, opening, text = (text_of(row.get(c)).strip() for c in (*columns, "opening", "text"))
        if settings.loss and text:
            question, answer = "", text
        elif not (question and answer):
            where = f"{settings.file}: {name} has no text in {' or '.join(columns)}"
            raise UserError(f"{where}; its columns: {', '.join(row)} (--question-column, --answer-column)")
        records.append({"id": name, "question": question, "opening": opening, "reference": answer})
    return records


def answers_of(model, tokenizer, block: list[dict], reasoning: bool, settings: Settings) -> list[dict]:
    """What the model answers to each question, and whether that is right."""
    texts = [f"{q['question']}\n{settings.instruction}".strip() for q in block]
    prompts = [encode_prompt(tokenizer, text, reasoning=reasoning) for text in texts]
    limits: dict[str, Any] = {"temperature": 0.0, "eos_token_ids": eos_token_ids(model, tokenizer)}
    limits |= {"max_new_tokens": settings.max_new_tokens, "max_batch_tokens": settings.max_batch_tokens}
    lines = []
    for q, completion in zip(block, sample(model, prompts, **limits), strict=True):
        text, cut = decode(tokenizer, completion.token_ids), completion.finish_reason == "length"
        unfinished = reasoning and cut and "</think>" not in text  # has not come to an answer
        answer = parse_completion(text).answer if reasoning else text
        taken, right = ("", False) if unfinished else verdict(answer, q["reference"])
        line = {"completion": text, "extracted": taken, "right": right, "cut": cut}
        lines.append(line | {"tokens": len(completion.token_ids)})
    return lines


@torch.no_grad()
def losses_of(model, tokenizer, block: list[dict], reasoning: bool, settings: Settings) -> list[dict]:
    """The loss of each document: of an answer with its end of turn, or of a text but for its first token, as
    far as it fits. Behind the first: without the first loss. Who has learned to begin with <think> finds all
    other beginnings unlikely, whatever else it knows."""
    lines = []
    for document in block:
        if document["question"]:
            ids, mask = encode_example(tokenizer, document["question"], None, document["reference"])
            begin, opening = mask.index(True), encode_text(tokenizer, document["opening"])
            ids, mask = ids[:begin] + opening + ids[begin:], [False] * len(opening) + mask
        else:
            ids = list(tokenizer(document["reference"])["input_ids"])[: context_of(model.config)]
            mask = [False] + [True] * (len(ids) - 1)
        tensors = masked_batch([ids], [mask], tokenizer.pad_token_id, model.device)
        losses = -token_logprobs(model, *tensors)[tensors[2]]  # (tokens that count,)
        if len(losses) < 2:
            raise UserError(f"{settings.file}: {document['id']} has too few tokens")
        lines.append({"loss": losses.mean().item(), "loss_behind_first": losses[1:].mean().item()})
    return lines


def ask(name: str, folder: str, reasoning: bool, records: list[dict], settings: Settings) -> list[dict]:
    """The model's lines of answers.jsonl: those that are there, and the new ones, saved AT_ONCE at a time."""
    path, measured_by = Path(settings.out) / "answers.jsonl", losses_of if settings.loss else answers_of
    done = {line["id"]: line for line in resume_log(path) if line["model"] == name}
    if missing := [record for record in records if record["id"] not in done]:
        model = load_policy(folder, device=settings.device, dtype=settings.dtype)
        tokenizer = load_tokenizer(folder)
        texts = [record["question"] or record["reference"] for record in missing[:8]]
        check_tokenizer(model, tokenizer, texts, reasoning=reasoning)
    for begin in tqdm(range(0, len(missing), AT_ONCE), name, unit="block", disable=not missing):
        block = missing[begin : begin + AT_ONCE]
        try:
            lines = measured_by(model, tokenizer, block, reasoning, settings)
        except (ValueError, FloatingPointError) as error:  # a prompt that is too long, or a broken model
            raise UserError(f"{name}: {error}") from error
        for record, line in zip(block, lines, strict=True):
            done[record["id"]] = {"model": name, **record, **line}
            append_jsonl(path, done[record["id"]])
    return [done[record["id"]] for record in records]


def measure(answers: dict[str, list[dict]], loss: bool) -> dict[str, Any]:
    """{"models": {name: {"capability": figures}}, "differences": of every two, a - b, paired by record}."""
    shares = {} if loss else {"exact_match": "right", "answered": "extracted", "cut": "cut"}
    means = ("loss", "loss_behind_first") if loss else ("tokens",)
    title, first = ("loss", "loss") if loss else ("exact match", "right")
    models, differences = {}, list[dict[str, Any]]()
    for name, lines in answers.items():
        figures = {figure: wilson([bool(line[key]) for line in lines]) for figure, key in shares.items()}
        figures |= {figure: bootstrap([line[figure] for line in lines], 0) for figure in means}
        models[name] = {"capability": figures}
        print(SHOWN.format(name, title, **next(iter(figures.values()))))
    for a, b in itertools.combinations(answers, 2):
        gaps = [x[first] - y[first] for x, y in zip(answers[a], answers[b], strict=True)]
        differences.append({"figure": title, "a": a, "b": b, "ci": bootstrap(gaps, 0)})
        print(SHOWN.format(f"{a} - {b}", title, **differences[-1]["ci"]))
    return {"models": models, "differences": differences}


def main(argv: list[str] | None = None) -> None:
    settings, run = start(Settings, "capability", argv=argv)
    if run.size > 1:
        raise UserError("torchrun: this command runs as one process; start it with python")
    models, records = named("--models", settings.models), read_records(settings)
    if unknown := [name for name in settings.direct if name not in models]:
        raise UserError(f"--direct: given {unknown[0]}; allowed the names in --models: {', '.join(models)}")
    reasoning = {name: reasons(name, folder, settings.direct) for name, folder in models.items()}
    for folder in models.values():  # all inputs are looked at before OUT is emptied
        load_tokenizer(folder)
    run.begin()
    answers = {name: ask(name, models[name], reasoning[name], records, settings) for name in models}
    write_json(run.out / "results.json", measure(answers, settings.loss) | {"config": run.config})


if __name__ == "__main__":
    run_main(main)
