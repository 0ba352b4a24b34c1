r"""Is the capability kept? Questions with one right answer (appendix L), or the loss on held-out documents.

    python -m lib.tools.capability --no-reasoning base --file questions.jsonl --out runs/demo/capability
    python -m lib.tools.capability --no-reasoning base --loss --file documents.jsonl --out runs/demo/loss

**Exact match**, for questions such as GSM8K's: each model answers each once, greedily. What counts of an
answer, behind </think>: what stands behind its last "####" or in its last \boxed{}, whichever comes later, or
else all of it. If the reference is a number, `verdict` says which number of that counts; else texts are
compared.

**Loss**: mean negative log-likelihood, in nats a token, of documents, each counted alike: a `text`, or the
answer to a question, maybe behind an `opening` that is given. All models read the same text, no <think>.

Models are compared on the same records, in pairs. Writes results.json and answers_NAME.jsonl of each model
(after a kill, the same command goes on with the next model).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib import UserError
from lib.batches import masked_batch
from lib.chat import decode, encode_example, encode_prompt, encode_text, eos_token_ids, parse_completion
from lib.metrics import mean_of, share_of
from lib.policy import context_of, token_logprobs
from lib.report import differences
from lib.run import run_main, start
from lib.run.files import read_jsonl, write_json, write_jsonl
from lib.run.folder import reasons
from lib.run.hub import check_tokenizer, load_policy, load_tokenizer
from lib.run.settings import TOKENS, Common, named, setting
from lib.sampler import sample
from lib.sources import read_table, text_of

SHOWN = "{}: {} {mean:.3f} [{low:.3f}, {high:.3f}]"
MARK = re.compile(r"####([^\n]*)|\\boxed\{")
MARKED = re.compile(r"(?:\D*[^\w\s])?\s*\d")  # behind "####": in a heading a word stands before the number
UNITS = re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}(?:\^\S+)?")
PLAIN = {"\u2212": "-", "\\$": "", "$": "", "\\%": "", "{,}": ",", "\\,": "", "\\!": ""}  # written, meant
PLAIN |= {"\u2013": "-", "^\\circ": "", "^{\\circ}": ""}
EDGES = ". ,;:!?%*()[]{}'\""
EXPRESSION = re.compile(r"frac|sqrt|\^|[\d}]\s*/\s*[\d{]")
# 1,234 or 1234 or 1,234.5 or .5; the sign is no minus behind a digit or a word (10-3, twenty-3)
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


@dataclass
class Settings(Common):
    models: list[str] = setting(["base=lib/sandbox/base", "tars=runs/demo/rl"], "NAME=FOLDER or HUB-NAME")
    no_reasoning: list[str] = setting([], "names of those without it; those of 02 and 03 say it themselves")
    loss: bool = setting(False, "the loss on documents, instead of answers to questions")
    file: str = setting("questions.jsonl", "question and answer, or text: .jsonl, .json, .csv or .parquet")
    max_new_tokens: int = setting(1024, "of an answer", low=1)
    max_batch_tokens: int = setting(16384, "rows x columns of the sampler's cache", low=16, high=TOKENS)
    dtype: str = setting("float32", "of weights; auto: as saved", choices=("float32", "bfloat16", "auto"))

    def inputs(self) -> list[str]:
        return [self.file, *(text.partition("=")[2] for text in self.models)]


def final_part(text: str) -> tuple[str, bool]:
    r"""(what is marked as the answer, True): a number behind "####", or \boxed{...}, the last one. Else (all
    that stands behind the last "####", a heading, or the whole text, False).

    >>> final_part("2 + 3 = 5\n#### 5"), final_part("#### Step 2\nIt is \\boxed{\\frac{\\sqrt{3}}{2}}.")
    (('5', True), ('\\frac{\\sqrt{3}}{2}', True))
    """
    found, marked = text.rpartition("####")[2], False
    for mark in MARK.finditer(text):
        if mark[1] is not None:
            if MARKED.match(mark[1]):
                found, marked = mark[1], True
            continue
        depth, end = 1, mark.end()  # of \boxed{: up to the brace that closes it
        while depth and end < len(text):
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        found, marked = text[mark.end() : end - (depth == 0)], True
    return found.strip(), marked


def without_units(part: str) -> str:
    r"""Its text in braces is left out, such as a unit; if there is nothing else, that is the answer.

    >>> without_units(r"5 \text{ cm}^2"), without_units(r"\text{(C)}")
    ('5 ', '(C)')
    """
    bare = UNITS.sub("", part)
    return bare if bare.strip(EDGES + "$") else UNITS.sub(r"\1", part)


def verdict(answer: str, reference: str) -> tuple[str, bool]:
    """(what was taken from the answer, whether it is right). Nothing found, "", is wrong.

    Where the reference is a number, it is the first one of what is marked, behind its last "=", and no part
    of a fraction, a root or a power; of an answer without a mark it is the last one.
    """
    (said, marked), (right, _) = map(final_part, (answer, reference))
    said, right = map(without_units, (said, right))
    for written, meant in PLAIN.items():
        said, right = said.replace(written, meant), right.replace(written, meant)
    said, right = (text.rstrip(EDGES).lstrip(EDGES[1:]) for text in (said, right))  # .5 is not 5
    if NUMBER.fullmatch(right) and not (marked and EXPRESSION.search(said)):
        part = re.sub(r"^\s*-\s+", "-", said.rpartition("=")[2]) if marked else said  # no dash of a list
        numbers = NUMBER.findall(part)
        said = (numbers or [""])[0 if marked else -1]
        return said, said != "" and float(said.replace(",", "")) == float(right.replace(",", ""))
    said, right = (" ".join(text.casefold().split()) for text in (said, right))
    return said, said == right != ""


def read_records(path: str, loss: bool) -> list[dict]:
    """[{"id", "question", "opening", "reference"}, ...], the question of a `text` is "". Ids are places."""
    records = []
    for number, row in enumerate(read_table(Path(path))):
        keys = ("question", "opening", "answer", "text")
        question, opening, answer, text = (text_of(row.get(key)).strip() for key in keys)
        if loss and text:
            question, answer = "", text
        elif not (question and answer):
            raise UserError(f"{path}: row {number} has no question and answer; its columns: {', '.join(row)}")
        records.append({"id": str(number), "question": question, "opening": opening, "reference": answer})
    return records


def answers_of(model, tokenizer, records: list[dict], reasoning: bool, settings: Settings) -> list[dict]:
    """What the model answers to each question, and whether that is right."""
    completions = sample(
        model,
        [encode_prompt(tokenizer, record["question"], reasoning=reasoning) for record in records],
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
        eos_token_ids=eos_token_ids(model, tokenizer),
        max_batch_tokens=settings.max_batch_tokens,
        progress=True,
    )
    lines = []
    for record, completion in zip(records, completions, strict=True):
        text, cut = decode(tokenizer, completion.token_ids), completion.finish_reason == "length"
        unfinished = reasoning and cut and "</think>" not in text  # has not come to an answer
        answer = parse_completion(text).answer if reasoning else text
        taken, right = ("", False) if unfinished else verdict(answer, record["reference"])
        line = {"completion": text, "extracted": taken, "right": right, "cut": cut}
        lines.append(line | {"tokens": len(completion.token_ids)})
    return lines


@torch.no_grad()
def losses_of(model, tokenizer, records: list[dict], reasoning: bool, settings: Settings) -> list[dict]:
    """The loss of each document: of an answer with its end of turn, or of a text but for its first token, as
    far as it fits. Behind the first: without the first loss. Who has learned to begin with <think> finds all
    other beginnings unlikely, whatever else it knows."""
    lines = []
    for document in tqdm(records, unit="document", leave=False):
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
            raise UserError(f"{settings.file}: row {document['id']} has too few tokens")
        lines.append({"loss": losses.mean().item(), "loss_behind_first": losses[1:].mean().item()})
    return lines


def ask(name: str, folder: str, reasoning: bool, records: list[dict], settings: Settings) -> list[dict]:
    """The model's lines of answers_NAME.jsonl, where a command that was stopped finds them again."""
    path = Path(settings.out) / f"answers_{name}.jsonl"
    measured_by = losses_of if settings.loss else answers_of
    if path.exists():
        return read_jsonl(path)
    model = load_policy(folder, device=settings.device, dtype=settings.dtype)
    tokenizer = load_tokenizer(folder)
    texts = [record["question"] or record["reference"] for record in records[:8]]
    check_tokenizer(model, tokenizer, texts, reasoning=reasoning)
    try:
        found = measured_by(model, tokenizer, records, reasoning, settings)
    except (ValueError, FloatingPointError) as error:  # a prompt that is too long, or a broken model
        raise UserError(f"{name}: {error}") from error
    lines = [{**record, **line} for record, line in zip(records, found, strict=True)]
    write_jsonl(path, lines)
    return lines


def measure(answers: dict[str, list[dict]], loss: bool) -> dict[str, Any]:
    """{"models": {name: {"capability": figures}}, "differences": of every two, a - b, paired by record}."""
    title, key = ("loss", "loss") if loss else ("exact match", "right")
    models: dict[str, dict] = {}
    for name, lines in answers.items():
        found = {"exact_match": share_of("right", True), "cut": share_of("cut", True)}
        if loss:
            found = {key: mean_of(key, 0) for key in ("loss", "loss_behind_first")}
        figures = {key: estimate(lines) for key, estimate in found.items()}
        models[name] = {"capability": figures}
        print(SHOWN.format(name, title, **next(iter(figures.values()))))
    values = {name: {title: {x["id"]: x[key] for x in lines}} for name, lines in answers.items()}
    gaps = differences(values, 0)
    for gap in gaps:
        print(SHOWN.format(f"{gap['a']} - {gap['b']}", title, **gap["ci"]))
    return {"models": models, "differences": gaps}


def main(argv: list[str] | None = None) -> None:
    settings, run = start(Settings, "capability", argv=argv, alone=True)
    models, records = named("--models", settings.models), read_records(settings.file, settings.loss)
    if unknown := [name for name in settings.no_reasoning if name not in models]:
        allowed = f"allowed the names in --models: {', '.join(models)}"
        raise UserError(f"--no-reasoning: given {unknown[0]}; {allowed}")
    reasoning = {name: reasons(name, folder, settings.no_reasoning) for name, folder in models.items()}
    for folder in models.values():  # all inputs are looked at before OUT is emptied
        load_tokenizer(folder)
    run.begin()
    answers = {name: ask(name, models[name], reasoning[name], records, settings) for name in models}
    write_json(run.out / "results.json", measure(answers, settings.loss) | {"config": run.config})


if __name__ == "__main__":
    run_main(main)
