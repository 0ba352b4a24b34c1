r"""Is the capability kept? Exact match on questions with one right answer, such as GSM8K's.

    python -m lib.tools.capability --models base=lib/sandbox/base tars=runs/demo/rl --file questions.jsonl --out runs/demo/capability

Each model answers each question once, greedily. Of an answer (what follows </think>) counts what stands in the last line
with "####" and a number behind it, or in the last \boxed{}, whichever comes later; else what follows any "####", a heading
perhaps; else its last number. If the reference is a number, values are compared, else the
text up to case, blanks and outer punctuation. Models are compared on the same questions, in pairs.

Writes answers.jsonl, which grows as it runs (after a kill, the same command goes on), and results.json.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import UserError
from lib.chat import decode, encode_prompt, eos_token_ids, parse_completion, parse_direct, set_date
from lib.metrics import bootstrap, wilson
from lib.run.checks import check_tokenizer
from lib.run.command import Flags, number
from lib.run.files import append_jsonl, resume_log, write_json
from lib.run.folder import checksums, claim_folder, date_of_run, reasons
from lib.run.hub import load_policy, load_tokenizer
from lib.run.settings import TOKENS, named
from lib.sampler import sample
from lib.sources.tables import first_text, read_table

AT_ONCE = 64  # questions between two savings
# 1,234 or 1234 or 1,234.5 or .5, or 3/4; the sign is no minus behind a digit or a word (10-3, twenty-3)
NUMBER = re.compile(
    r"(?<![\w.)])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/0*[1-9]\d*)?|(?<![\w)])-?\.\d+|\d+(?:\.\d+)?"
)
CURRENCY = "$€£¥"
DIGITS = 300  # a number of more is a model that cannot stop

# ---- what an answer says -----------------------------------------------------------------------------------


def final_part(text: str) -> str:
    r"""What is marked as the answer: a number behind "####", or in \boxed{}, the later one; or what follows "####"; or all.

    >>> final_part("2 + 3 = 5\n#### 5"), final_part("#### Result\nIt is \\boxed{\\frac{1}{2}}."), final_part("It is 5.")
    ('5', '\\frac{1}{2}', 'It is 5.')
    """
    marked = [match for match in re.finditer(r"####([^\n]*)", text) if numbers(match[1])]
    hashes = (marked[-1].start(), marked[-1][1].strip(" \t\r#")) if marked else (-1, "")
    begin, depth = text.rfind("\\boxed{"), 0
    for end in range(begin, len(text)) if begin > hashes[0] else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] == "}":
            return text[begin + len("\\boxed{") : end].strip()
    return hashes[1] if marked else text.rpartition("####")[2].strip()


def numbers(text: str) -> list[Fraction]:
    r"""The values of all numbers in the text, exactly.

    >>> [str(x) for x in numbers(r"$1,234.50 is -3 and 1/2, \frac{3}{4}; 10-3 = 7.")]
    ['2469/2', '-3', '1/2', '3/4', '10', '3', '7']
    """
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", plain(text))
    found = [x.replace(",", "").partition("/") for x in NUMBER.findall(text) if len(x) < DIGITS]
    return [Fraction(over) / Fraction(under or 1) for over, _, under in found]


def plain(text: str) -> str:
    """Without LaTeX's thin spaces and escapes, signs of currency, and typographers' minus signs."""
    text = text.replace("\u2212", "-").replace("\\!", "").replace("\\$", "$")
    return re.sub(rf"(-?)[{CURRENCY}]\s*", r"\1", text)


def as_number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else (a unit of currency, % and a full stop aside).

    >>> as_number("$5.00"), as_number("1,234."), as_number("50 %"), as_number("5 apples")
    (Fraction(5, 1), Fraction(1234, 1), Fraction(50, 1), None)
    """
    text = re.sub(
        r"\s*\\?%?\s*\.?\s*\Z", "", re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", plain(text).strip())
    )
    return next(iter(numbers(text)), None) if NUMBER.fullmatch(text) else None


def normalised(text: str) -> str:
    """
    >>> normalised(" (B) ."), normalised("New   York!")
    ('b', 'new york')
    """
    return " ".join(unicodedata.normalize("NFKC", plain(text)).casefold().split()).strip(" .,;:!?\"'()[]{}*")


def verdict(answer: str, reference: str) -> tuple[str, bool]:
    """(what was taken from the answer, whether it is right). Nothing found, "", is wrong."""
    said, right = final_part(answer), as_number(final_part(reference))
    if right is None:
        return normalised(said), normalised(said) == normalised(final_part(reference)) != ""
    found = numbers(said)
    return (str(found[-1]), found[-1] == right) if found else ("", False)


# ---- asking ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    reference: str


def read_questions(path: Path, question: str, answer: str, limit: int) -> list[Question]:
    """The questions of a jsonl, json, csv or parquet file. Columns may be "a.b" or several, "a,b": the first with text."""
    rows = read_table(path)[: limit or None]
    for place, row in enumerate(rows, start=1):
        for flag, column in (("--question-column", question), ("--answer-column", answer)):
            if not first_text(row, column):
                raise UserError(
                    f"{flag}: given {column}, which is empty in row {place} of {path}; its columns: {', '.join(row)}"
                )
    return [
        Question(str(i), first_text(row, question), first_text(row, answer)) for i, row in enumerate(rows)
    ]


def ask(
    name: str, folder: str, reasoning: bool, questions: Sequence[Question], given: Any, path: Path
) -> list[dict]:
    """The model's lines of answers.jsonl: those that are there, and the new ones, saved AT_ONCE at a time."""
    done = {line["id"]: line for line in resume_log(path) if line["model"] == name}
    missing = [q for q in questions if q.id not in done]
    if missing:
        tokenizer, model = load_tokenizer(folder), load_policy(folder, device=given.device, dtype=given.dtype)
        check_tokenizer(model, tokenizer, [q.text for q in questions[:8]], reasoning=reasoning)
        eos = eos_token_ids(model, tokenizer)
    with tqdm(
        total=len(questions), initial=len(done), desc=name, unit="question", disable=not missing
    ) as bar:
        for begin in range(0, len(missing), AT_ONCE):
            block = missing[begin : begin + AT_ONCE]
            texts = [f"{q.text}\n{given.instruction}".strip() for q in block]
            prompts = [encode_prompt(tokenizer, text, reasoning=reasoning) for text in texts]
            limits = {"max_new_tokens": given.max_new_tokens, "max_batch_tokens": given.max_batch_tokens}
            try:
                completions = sample(model, prompts, temperature=0.0, eos_token_ids=eos, **limits)
            except (ValueError, FloatingPointError) as error:  # a prompt that is too long, or a broken model
                raise UserError(f"{name}: {error}") from error
            for q, completion in zip(block, completions, strict=True):
                text, cut = decode(tokenizer, completion.token_ids), completion.finish_reason == "length"
                parsed = (parse_completion if reasoning else parse_direct)(text)
                unfinished = reasoning and cut and "</think>" not in text  # has not come to an answer
                extracted, right = ("", False) if unfinished else verdict(parsed.answer, q.reference)
                line: dict[str, Any] = {
                    "model": name,
                    "id": q.id,
                    "question": q.text,
                    "reference": q.reference,
                    "completion": text,
                }
                line |= {
                    "extracted": extracted,
                    "right": right,
                    "tokens": len(completion.token_ids),
                    "cut": cut,
                }
                append_jsonl(path, line)
                done[q.id] = line
            bar.update(len(block))
    return [done[q.id] for q in questions]


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(lines: Sequence[dict]) -> dict[str, Any]:
    """Shares of right answers, of answers from which something was taken, and of those that the budget cut off."""
    return {
        "exact_match": wilson([x["right"] for x in lines]),
        "answered": wilson([x["extracted"] != "" for x in lines]),
        "cut": wilson([x["cut"] for x in lines]),
        "tokens": bootstrap([x["tokens"] for x in lines], 0),
    }


def differences(answers: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Exact match, a - b, of every two models, paired by question: [{"figure", "a", "b", "ci"}, ...]."""
    found = []
    for a, b in itertools.combinations(answers, 2):
        gaps = [x["right"] - y["right"] for x, y in zip(answers[a], answers[b], strict=True)]
        found.append({"figure": "exact match", "a": a, "b": b, "ci": bootstrap(gaps, 0)})
    return found


def table(results: dict[str, Any]) -> str:
    """What main prints: a line for each model and for each pair."""
    show = lambda ci: f"{ci['mean']:.3f} [{ci['low']:.3f}, {ci['high']:.3f}]"  # noqa: E731
    lines = [f"{'model':20} {'exact match':22} {'answered':>9} {'cut':>6} {'tokens':>7}"]
    for name, x in results["models"].items():
        rest = f"{x['answered']['mean']:9.2f} {x['cut']['mean']:6.2f} {x['tokens']['mean']:7.1f}"
        lines.append(f"{name:20} {show(x['exact_match']):22} {rest}")
    lines += [f"{d['a']} - {d['b']}: {show(d['ci'])}" for d in results["differences"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    flags = Flags("lib.tools.capability", __doc__)
    flags.add_argument(
        "--models", nargs="+", required=True, metavar="NAME=FOLDER", help="folders or hub names"
    )
    flags.add_argument(
        "--direct",
        nargs="*",
        default=[],
        help="models without reasoning, by name; runs of ours say it themselves",
    )
    flags.add_argument("--file", required=True, help="questions: .jsonl, .json, .csv or .parquet")
    flags.add_argument("--question-column", default="question", help="(default: question)")
    flags.add_argument("--answer-column", default="answer", help="the reference's (default: answer)")
    flags.add_argument(
        "--instruction", default="", help="said behind each question, e.g. how to mark the answer"
    )
    flags.add_argument(
        "--limit", type=number(int, 0), default=0, help="questions to ask, the first ones; 0: all (default)"
    )
    flags.add_argument(
        "--max-new-tokens", type=number(int, 1), default=1024, help="of each answer (default: 1024)"
    )
    flags.add_argument(
        "--max-batch-tokens",
        type=number(int, 1, TOKENS),
        default=16384,
        help="rows x tokens at once (default: 16384)",
    )
    flags.add_argument("--out", required=True, help="folder for the results")
    flags.add_argument(
        "--overwrite", action="store_true", help="empty OUT first if it holds results of other settings"
    )
    flags.add_argument(
        "--date", default="", help="day that chat templates are told; none: that of the run in OUT, or today"
    )
    flags.add_device("float32")
    given = flags.parse_args(argv)
    models = named("--models", given.models)
    if unknown := [name for name in given.direct if name not in models]:
        raise UserError(f"--direct: given {unknown[0]}; allowed the names in --models: {', '.join(models)}")
    given.date = date_of_run(given.out, given.date)
    set_date(given.date)
    questions = read_questions(Path(given.file), given.question_column, given.answer_column, given.limit)
    reasoning = {}
    for name, folder in models.items():  # all inputs are looked at before OUT is
        load_tokenizer(folder)
        reasoning[name] = reasons(name, folder, given.direct)
    config = {**vars(given), "reasoning_by_model": reasoning, **checksums(given.file, *models.values())}
    out, path = Path(given.out), Path(given.out) / "answers.jsonl"
    read = [given.file, *models.values()]
    claim_folder(given.out, config, overwrite=given.overwrite, inputs=read)
    print(f"{len(questions)} questions from {given.file} for {', '.join(models)}; writing to {out}")
    answers = {
        name: ask(name, folder, reasoning[name], questions, given, path) for name, folder in models.items()
    }
    figures = {name: {"reasoning": reasoning[name], **measure(lines)} for name, lines in answers.items()}
    results = {"models": figures, "differences": differences(answers), "config": config}
    write_json(out / "results.json", results)
    print(table(results))


if __name__ == "__main__":
    from lib.run.command import run_main

    run_main(main)
