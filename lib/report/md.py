"""report.md: the sections of lib/report.py, and the first completions of each set side by side."""

from __future__ import annotations

from collections.abc import Sequence

from lib.report.figures import CAPTIONS, is_number, number
from lib.report.parts import TITLE, Section, Table
from lib.run.text import visible

SHOWN = 2  # prompts of each set; report.html has them all
LENGTH = 600  # characters of a text


def markdown(
    parts: Sequence[Section], pictures: dict[str, bytes], command: str, lines: Sequence[dict]
) -> str:
    """report.md. The figures are files beside it."""
    blocks = [f"# {TITLE}"]
    for part in parts:
        blocks += [f"## {part.title}", escape(part.text)]
        if part.code:
            blocks.append("    " + " ".join(visible(part.code).split("\n")))
        if part.figure in pictures:
            source = escape(command, len(command))
            blocks.append(f"![{CAPTIONS[part.figure]}]({part.figure}.png)")
            blocks.append(
                f"<details><summary>Source command of the figure</summary><code>{source}</code></details>"
            )
        for table in part.tables:
            blocks += [f"**{escape(table.caption)}**", markdown_table(table)]
    return "\n\n".join([*blocks, "## Completions side by side", *side_by_side(lines)]) + "\n"


def escape(text: str, length: int = LENGTH) -> str:
    """Text that shows as itself, in one line: no markup, no links, cut at `length` characters.

    >>> escape("a | b\\n<think> *c* http://d")
    'a \\\\| b<br>&lt;think&gt; \\\\*c\\\\* http:&#47;&#47;d'
    """
    text = visible(text if len(text) <= length else text[:length] + " ...")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\|`*_[]!#~$":
        text = text.replace(mark, "\\" + mark)
    return "<br>".join(text.split("\n")).replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def markdown_table(table: Table) -> str:
    """Numbers on the right."""

    def cell(text: str, marked: bool) -> str:
        text = text if is_number(text) else escape(text)
        return f"**{text}**" if marked else text

    rows = [
        [cell(text, (i, k) in table.marked) for k, text in enumerate(row)] for i, row in enumerate(table.rows)
    ]
    marks = ["---:" if right else "---" for right in table.numeric()]
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*map(escape, table.head)], marks, *rows))


def side_by_side(lines: Sequence[dict]) -> list[str]:
    """The first SHOWN prompts of each set, with what each model made of them."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for line in lines:
        if line["deciding"]:
            groups.setdefault(line["set"], {}).setdefault(line["id"], []).append(line)
    blocks = []
    for name, prompts in groups.items():
        blocks.append(f"### {escape(name)}")
        for found in list(prompts.values())[:SHOWN]:
            first = found[0]
            blocks.append(
                f"**{escape(str(first['id']))}** ({escape(first['category'])}): {escape(first['prompt'])}"
            )
            head = ["model", "sent", "reasoning", "answer", "harm", "task", "verdict"]
            blocks.append(markdown_table(Table("", head, [completion_row(line) for line in found])))
    return blocks


def completion_row(line: dict) -> list[str]:
    sent = "as it is" if line["sent"] == line["prompt"] else line["sent"]
    opening = f"\nopened with: {line['opening']}" if line["opening"] else ""
    scores = [number(line[key]) for key in ("harm", "task")]
    return [
        line["model"],
        sent + opening,
        line["reasoning"] or "-",
        line["answer"] or "-",
        *scores,
        line["verdict"],
    ]
