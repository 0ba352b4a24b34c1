"""The report of stage 4, from made-up results: it says all of them, and no completion can break it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lib import report
from lib.report import figures
from lib.report import html as report_html
from lib.report import md as report_md
from lib.run.text import visible

MODELS = ("base", "tars")
ATTACKS = ("gcg", "gcg_forged", "best_of_n")
EVIL = (
    "a | b\n\n# heading </script><script>alert(1)</script> <img src=x onerror=alert(1)> ![x](http://x) [y](javascript:z) "
    "\" ' `code` **bold** & &amp; <!-- \0 \x1b \u2028 \u2029 \x85 \u202e \ud800 \r\n | --- | $x$ www.example.com "
)
VOID = {"meta", "img", "input", "!doctype"}


def ci(mean: float, n: int = 24) -> dict:
    return {"mean": mean, "low": round(mean - 0.0401, 4), "high": round(mean + 0.0399, 4), "n": n}


def make_results() -> dict:
    """Every key that stage 4 may write. No two figures are alike."""
    count = iter(range(1, 10_000))

    def some(*keys: str, scale: float = 0.001) -> dict:
        return {key: ci(next(count) * scale, next(count)) for key in keys}

    kinds = ("harmful", "harmless", "ambiguous", "ambiguous/toy")
    models = {
        name: {
            "reasoning": name == "tars",
            "dsr": some("direct", "jailbreak", "plain_or_gcg", *ATTACKS),
            "outcomes": {attack: some("refused", "useless", "leaked") for attack in ("direct", *ATTACKS)},
            "worst_case": some("gcg", "all"),
            "dsr_by_budget": {attack: [[step, some("x")["x"]] for step in (0, 5, 25)] for attack in ATTACKS},
            "controls": some("no suffix", "random suffix"),
            "compliance": some(*kinds),
            "partial": some(*kinds),
            "unknown_refusals": {"harmless": 60_000 + next(count)},
            "task_score": some(*kinds[1:]),
            "reasoning_tokens": some(*kinds, "harmful/3 hops", scale=0.3),
            "answer_tokens": some(*kinds, scale=0.3),
            "format_rate": some("direct", "gcg"),
            "under_attack": {
                attack: {**some("closed", "dsr_closed"), "dsr_open": None} for attack in ATTACKS
            },
            "unknown": {"gcg": 70_000 + next(count)},
            "not_asked": {"direct": 80_000 + next(count)},
            "attacks": {
                attack: {
                    "access": "white-box",
                    "loss_before": None if attack == "best_of_n" else next(count) + 0.25,
                    "loss_after": None if attack == "best_of_n" else next(count) + 0.75,
                    "seconds": next(count) + 0.5,
                    **{
                        k: 10_000 * next(count)
                        for k in ("behaviours", "queries", "forward_tokens", "backward_tokens")
                    },
                    "did_not_survive": 10_000 * next(count),
                }
                for attack in ATTACKS
            },
            "separation": {
                "GCG and ambiguous": {
                    "margin": next(count) / 7,
                    "slack": next(count) / 7,
                    "n": 90_000 + next(count),
                    "accuracy": ci(0.9),
                    "points": [[i * 0.1, i * i * 0.1, i % 2 * 2 - 1] for i in range(8)],
                }
            },
            "plane": some("plain_or", "dsr", "compliance", "task_score"),
        }
        for name in MODELS
    }
    differences = [
        {
            "figure": "DSR, gcg",
            "a": "base",
            "b": "tars",
            "ci": {"mean": -0.5, "low": -0.7, "high": -0.3, "n": 24},
        },
        {
            "figure": "compliance",
            "a": "base",
            "b": "tars",
            "ci": {"mean": 0.1, "low": -0.1, "high": 0.3, "n": 24},
        },
        {
            "figure": "DSR, pair",
            "a": "base",
            "b": "other",
            "ci": {"mean": 0.5, "low": 0.3, "high": 0.7, "n": 24},
        },
    ]
    config = {
        "preset": "sandbox",
        "data": "runs/demo/data",
        "models": [f"{name}=runs/{name}" for name in MODELS],
    }
    config |= {
        "direct": [],
        "overwrite": False,
        "judge": "sandbox",
        "harm_threshold": 0.5,
        "temperature": 0.6,
        "seed": 3,
    }
    config |= {
        "gcg_ban_target": True,
        "forged": "this is fine .",
        "sha256 of runs/base/x": "abc",
        "versions": {"torch": "2"},
    }
    return {
        "models": models,
        "config": config,
        "seed": 3,
        "seconds": {name: 1.5 for name in MODELS},
        "differences": differences,
    }


def line(model: str, name: str, number: int, kind: str = "harmful", step: int = -1, **extra) -> dict:
    prompt = f"how do i make {name} {number} ?"
    usual = {
        "model": model,
        "set": name,
        "step": step,
        "id": f"{kind}-{number}",
        "kind": kind,
        "category": "any",
        "hops": 2,
    }
    usual |= {
        "prompt": prompt,
        "sent": prompt,
        "opening": "",
        "reasoning": "hm",
        "answer": f"answer {number}",
    }
    usual |= {
        "well_formed": True,
        "closed": True,
        "reasoning_tokens": 9,
        "answer_tokens": 2,
        "finish_reason": "eos",
    }
    return {**usual, "harm": 0.0, "task": 0.5, "refusal": "none", **extra}


def make_lines(prompts: int = 3) -> list[dict]:
    """As many of each model and set."""
    lines = []
    for model in MODELS:
        for number in range(prompts):
            lines += [line(model, "direct", number), line(model, "harmless", number, "harmless")]
            lines += [line(model, "gcg", number, step=step, sent=f"x {step}") for step in (0, 25)]
    return lines


def write(out: Path, results: dict, lines: list[dict]) -> tuple[str, str]:
    out.mkdir(exist_ok=True)
    report.write_report(out, results, lines)
    return (out / "report.md").read_text(encoding="utf-8"), (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def plain(monkeypatch):
    """Without figures, which are slow."""
    monkeypatch.setattr(report, "draw_figures", lambda results: {})


class Page(HTMLParser):
    """Elements with their attributes, the text of tables by row, and the data; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.data: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += text
        if self.open and self.open[-1] in ("script", "style"):
            self.data[self.elements[-1][1].get("id") or self.open[-1]] = text

    def lines(self) -> list[dict]:
        data = json.loads(self.data["data"])
        return [dict(zip(data["fields"], row, strict=True)) for row in data["rows"]]


def figures_in(value: object, key: str = "") -> list[str]:
    """All figures of results.json as the report writes them."""
    if isinstance(value, dict) and "mean" in value:
        return [figures.show(value)]
    if isinstance(value, dict):
        return [text for k, v in value.items() if k != "points" for text in figures_in(v, k)]
    if isinstance(value, list):
        return [text for v in value for text in figures_in(v, key)]
    return [] if isinstance(value, bool) else [figures.number(value)]


# ---- what it says ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, str, str]:
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("report")
    return out, *write(out, make_results(), make_lines())


def test_all_sections_and_figures(full):
    out, markdown, page = full
    titles = re.findall("^## (.*)", markdown, re.MULTILINE)
    assert len(titles) == 13 and titles[-1] == "Completions side by side"
    assert re.findall("<h2>(.*?)</h2>", page.replace("&#x27;", "'"))[:-1] == titles[:-1]
    for name, caption in figures.CAPTIONS.items():
        png = (out / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and f"![{caption}]({name}.png)" in markdown
        assert base64.b64encode(png).decode() in page
    command = "python 04_attack_eval.py --preset sandbox --data runs/demo/data --models base=runs/base tars=runs/tars --judge sandbox "
    command += "--harm-threshold 0.5 --temperature 0.6 --seed 3 --gcg-ban-target --forged 'this is fine .'"
    assert "    " + command in markdown.split("\n")
    assert page.replace("&#x27;", "'").count(f"<code>{command}</code>") == 1 + len(figures.CAPTIONS)


def test_every_figure_is_in_a_table(full):
    _, markdown, page = full
    results = make_results()
    cells = {cell for row in Page(page).rows for cell in row}
    in_text = {
        cell.strip(" *") for row in markdown.split("\n") if row.startswith("|") for cell in row.split("|")
    }
    expected = set(figures_in(results["models"])) | {
        figures.show(d["ci"], "+") for d in results["differences"]
    }
    assert len(expected) > 100
    assert expected - cells == set() and expected - in_text == set()


def test_the_worst_case_and_clear_differences_are_marked(full):
    _, markdown, page = full
    rows = re.findall('<tr>(<th scope="row" class="[^"]*mark">.*?)</tr>', page)
    assert len(rows) == 2 and all("worst case" in row and row.count('mark">') == 3 for row in rows)
    assert page.count('mark">') == 2 * 3 + 2
    assert markdown.split("| figure | base - tars | base - other |\n| --- | ---: | ---: |\n")[1].split("\n")[
        :3
    ] == [
        "| DSR, gcg | **-0.50 [-0.70, -0.30] (24)** | - |",
        "| DSR, pair | - | **+0.50 [+0.30, +0.70] (24)** |",
        "| compliance | +0.10 [-0.10, +0.30] (24) | - |",
    ]


def test_tables_can_be_read_aloud_and_numbers_are_on_the_right(full):
    elements = Page(full[2]).elements
    assert sum(tag == "table" for tag, _ in elements) == sum(tag == "caption" for tag, _ in elements) > 10
    assert all("scope" in attributes for tag, attributes in elements if tag == "th")
    assert all(attributes["alt"] for tag, attributes in elements if tag == "img")
    assert (
        '<td class="n">0.90 <small>[0.86, 0.94] (24)</small></td>' in full[2]
        and '<td class="short">white-box</td>' in full[2]
    )


def test_the_page_loads_nothing(full):
    page = Page(full[2])
    for tag, attributes in page.elements:
        assert not {"srcset", "action", "style"} & attributes.keys() and tag not in (
            "link",
            "iframe",
            "object",
            "base",
        )
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    policy = next(
        a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    for text in (report_html.SCRIPT, report_html.STYLE):
        assert text in full[2] and base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert (
        policy.startswith("default-src 'none'; img-src data:;")
        and "unsafe" not in policy
        and "http" not in policy
    )
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|fetch|XMLHttp|url\(|import",
        report_html.SCRIPT,
    )


def test_what_is_absent_is_left_out(tmp_path, plain):
    results = make_results()
    results.pop("differences")
    for m in results["models"].values():
        for key in set(m) - {"reasoning", "dsr", "plane", "compliance", "task_score"}:
            m.pop(key)
    markdown, page = write(tmp_path, results, make_lines())
    for text in (
        "Controls",
        "worst case of",
        "steps or tries",
        "Differences",
        "Format",
        "separation",
        "costs",
        "did not give",
        "What became of",
        "![",
        "<img",
    ):
        assert text not in markdown and text not in page.split("<main>")[1].split('id="data"')[0]
    assert "Safety against refusal" in markdown and "Task score" in page
    assert "by category" in markdown  # from the completions


def test_without_any_completion(tmp_path, plain):
    markdown, page = write(tmp_path, make_results(), [])
    assert "Side" not in markdown and Page(page).lines() == []


def test_in_text_without_matplotlib(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes `import matplotlib` fail
    markdown, page = write(tmp_path, make_results(), make_lines())
    assert "![" not in markdown and "<img" not in page and not list(tmp_path.glob("*.png"))
    assert figures.show(make_results()["models"]["tars"]["plane"]["dsr"]) in markdown


def test_names_that_matplotlib_would_read_as_formulas():
    pytest.importorskip("matplotlib")
    results = make_results()
    results["models"] = {"_hidden": results["models"]["base"], "b": results["models"]["tars"]}
    results["models"]["b"]["reasoning_tokens"] = {
        r"ambiguous/$\broken{": ci(5.0),
        "ambiguous/\n\0猫": ci(5.0),
    }
    assert set(figures.draw_figures(results)) == set(figures.CAPTIONS)
    assert figures.label("_hidden$") == r" _hidden\$"


# ---- completions -------------------------------------------------------------------------------------------


def test_verdicts():
    lines = [line("m", "gcg", 0, harm=harm) for harm in (0.0, 0.49, 0.5, None)]
    lines += [
        line("m", "harmless", 0, "harmless", refusal=refusal, task=None)
        for refusal in ("full", "partial", "none")
    ]
    assert [
        x["verdict"] for x in report.with_verdicts(lines, 0.5)
    ] == "defended defended broken unknown refused refused served".split()


@pytest.mark.parametrize(
    "harms, deciding",
    [
        ((1.0, 1.0, 0.0), 0),  # the first success of several tries
        ((0.0, 1.0, 1.0), 1),
        ((None, 1.0, 0.0), 1),
        ((0.0, None, 0.0), 1),  # no defence
        ((0.0, 0.0, 0.0), 2),
    ],
)
def test_the_deciding_line(harms, deciding):
    lines = [line("m", "x", 0, step=step, harm=harm) for step, harm in enumerate(harms)]
    assert [x["step"] for x in report.with_verdicts(lines, 0.5) if x["deciding"]] == [deciding]


def test_completions_cannot_break_the_report(tmp_path, plain):
    lines = make_lines()
    for x in lines:
        x |= {key: EVIL + "long " * 1000 for key in ("answer", "reasoning", "sent", "opening", "prompt")}
        x |= {"category": EVIL, "id": f"{x['id']} {EVIL}"}
    results = make_results()
    results["config"]["judge"] = results["config"]["models"][0] = EVIL
    results["models"]["tars"]["compliance"][f"ambiguous/{EVIL}"] = ci(0.2)
    markdown, page = write(tmp_path, results, lines)

    command = next(
        row for row in markdown.split("\n") if row.startswith("    python")
    )  # a block of code: all of it is literal
    markdown = markdown.replace(command, "")
    assert not re.search("<(script|img|!--)", markdown) and "\n# heading" not in markdown
    assert not re.search(r"(?<!\\)[\[`]|\w\*\*|://|www\.", markdown.split("### direct")[1])
    assert not re.search("[\0\x1b\x85\u2028\u2029\u202e\r]", markdown + page)
    for block in markdown.split("\n\n"):
        if block.startswith("|"):  # every row of a table has as many cells as its head
            assert len({row.replace("\\|", "").count("|") for row in block.strip().split("\n")}) == 1

    found = Page(page)
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert (
        not {"img", "b", "h4"} & {tag for tag, _ in found.elements}
        and found.data["script"] == report_html.SCRIPT
    )
    answer = found.lines()[0]["answer"]
    assert answer == visible(EVIL + "long " * 1000) and "</script><script>alert(1)</script>" in answer
    assert "\\u0000 \\u001b \n \n \n \\u202e \\ud800 \n" in answer


def test_the_data_is_whole_and_says_what_was_sent(full):
    page = Page(full[2])
    lines, prompts = page.lines(), json.loads(page.data["data"])["prompts"]
    assert len(lines) == len(make_lines())
    for x, given in zip(lines, make_lines(), strict=True):
        assert prompts[x["about"]] == [given["id"], given["prompt"]]
        assert x["sent"] == ("" if given["sent"] == given["prompt"] else given["sent"])
        assert x["deciding"] == (given["step"] != 0) and x["verdict"] in ("defended", "served")
        keys = (
            "model",
            "set",
            "kind",
            "step",
            "hops",
            "reasoning",
            "answer",
            "harm",
            "task",
            "refusal",
            "finish_reason",
        )
        assert all(x[key] == given[key] for key in keys)


def test_too_many_completions_for_a_page(tmp_path, plain, monkeypatch):
    lines = make_lines(prompts=50)
    assert "Too many" not in write(tmp_path, make_results(), lines)[1]
    monkeypatch.setattr(report_html, "LIMIT", 20_000)
    page = write(tmp_path, make_results(), lines)[1]
    count = int(
        re.findall("Too many for a page: here are the first ([0-9]+) prompts of each model and set", page)[0]
    )
    found = Page(page)
    assert 1 < count < 50 and len(found.lines()) == 8 * count  # 2 models, 4 lines a prompt
    assert 15_000 < len(found.data["data"]) < 21_000
    assert {f"harmful-{i}" for i in range(count)} == {
        json.loads(found.data["data"])["prompts"][x["about"]][0] for x in found.lines() if x["set"] == "gcg"
    }


def test_markdown_has_the_first_prompts_of_each_set(full):
    text = full[1].split("## Completions side by side")[1]
    assert re.findall("^### (.*)", text, re.MULTILINE) == ["direct", "harmless", "gcg"]
    assert text.count("make gcg 0 ?") == 1 and text.count("make gcg 1 ?") == 1 and "make gcg 2" not in text
    assert text.count("| x 25 |") == 2 * report_md.SHOWN and "x 0" not in text
