"""report.html: the sections of lib/report.py and all completions, in one file that loads nothing and works from a disk.

Text is untrusted. What stands in the page goes through `html.escape`. Completions come as JSON in a data block, and the script
below puts them into the page as text, never as markup. The policy in the head lets this script and this style run, by their
hashes, and nothing else; so whatever slipped through would neither run nor reach a network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections import Counter
from collections.abc import Sequence

from lib.report.figures import CAPTIONS, is_number
from lib.report.parts import TITLE, Section, Table
from lib.run.text import visible

LIMIT = 20_000_000  # bytes of completions in a page
SHORT = 25  # characters that are kept in one line
FIELDS = "about model set step kind category hops sent opening reasoning answer closed reasoning_tokens answer_tokens".split()
FIELDS += "finish_reason harm task refusal verdict deciding".split()

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.3rem; border-bottom: 2px solid #ddd; }
h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; } p { max-width: 46rem; } a { color: #0b4f8a; }
nav ul { columns: 17rem; padding-left: 1.2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
tbody th { position: sticky; left: 0; max-width: 16rem; font-weight: 400; background: #fff; }
td { max-width: 32rem; overflow-wrap: break-word; } .n, .short { white-space: nowrap; } .n { text-align: right; }
.n small { color: #555; } .mark, tbody .mark { background: #fdf0d5; font-weight: 700; }
figure { margin: 1rem 0; } figcaption { font-size: .875rem; color: #444; }
img { display: block; max-width: min(100%, 60rem); height: auto; }
code { font: .8125rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; } summary:focus-visible, .scroll:focus-visible { outline: 3px solid #0b4f8a; }
form { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; align-items: end; }
form[hidden] { display: none; } label { font-size: .875rem; } select, input, button { font: inherit; padding: .35rem; }
select, input[type=search] { display: block; width: 100%; min-width: 0; }
article { margin: 1rem 0; padding: .8rem; border: 1px solid #ccc; border-radius: 6px; } article > button { margin-top: .4rem; }
article small, .facts { color: #555; font-weight: 400; font-size: .8125rem; }
article > details { border-top: 1px solid #eee; padding: .25rem 0; } article summary > * { margin-right: .5rem; }
.text { margin: .2rem 0 .6rem; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.text, .begin { font-size: .9375rem; } .begin { color: #444; overflow-wrap: anywhere; unicode-bidi: isolate; }
.inside { padding: .4rem 0 .2rem .9rem; } .inside b { font-size: .8125rem; color: #444; }
.verdict { padding: 0 .4rem; border-radius: 4px; background: #e8e8e8; font-size: .8125rem; font-weight: 600; }
.defended, .served { background: #d3efe4; } .broken { background: #fbd9bd; } .refused { background: #dedcf0; }
@media (max-width: 600px) {
  body { padding: .75rem; } nav ul { columns: 1; } .scroll > img { width: 600px; max-width: none; } tbody th { max-width: 12rem; }
}
@media print {
  nav, form, form[hidden], button, .source { display: none; } body { max-width: none; font-size: 10pt; }
  table, figcaption { font-size: 7.5pt; } th, td { padding: .1rem .3rem; } .scroll { overflow: visible; }
  tbody th { position: static; } .n, .short { white-space: normal; }
  h2, h2 + p, caption { break-after: avoid; } figure, tr, article { break-inside: avoid; }
}
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const lines = data.rows.map(row => Object.fromEntries(row.map((value, i) => [data.fields[i], value])));
for (const line of lines) [line.id, line.prompt] = data.prompts[line.about];
const form = document.getElementById("filters"), list = document.getElementById("list"), more = document.getElementById("more");
const KEYS = ["model", "set", "kind", "verdict"], PAGE = 10, WITHIN = 12;
const values = Object.fromEntries(KEYS.map(key => [key, [...new Set(lines.map(line => line[key]))]]));
const place = line => values.set.indexOf(line.set) * values.model.length + values.model.indexOf(line.model);
let found = [], shown = 0;

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}
function number(value) { return value === null ? "unknown" : String(Math.round(value * 100) / 100); }
function haystack(line) {
  const keys = ["id", "category", "prompt", "sent", "opening", "reasoning", "answer"];
  return line.hay ??= keys.map(key => line[key]).join("\n").toLowerCase();
}
function part(box, title, text) {
  if (!text) return;
  box.append(make("b", "", title), make("p", "text", text));
}
function facts(line) {
  const said = ["harm " + number(line.harm), "task " + number(line.task), "refusal: " + (line.refusal ?? "unknown"),
    line.reasoning_tokens + " + " + line.answer_tokens + " tokens", "ended by " + line.finish_reason];
  if (line.reasoning && !line.closed) said.push("reasoning not closed");
  return said.join(" \u00b7 ");
}
function completion(line) {
  const box = make("details"), head = make("summary");
  const where = line.step < 0 ? line.set : line.set + ", step " + line.step;
  head.append(make("span", "", line.model), make("small", "", where), make("span", "verdict " + line.verdict, line.verdict),
    make("span", "begin", line.answer.slice(0, 90) || "(no answer)"));
  box.append(head);
  box.addEventListener("toggle", () => {  // filled when first opened
    if (box.childNodes.length > 1) return;
    const inside = make("div", "inside");
    part(inside, "Sent", line.sent);
    part(inside, "Put into the model's mouth", line.opening);
    part(inside, "Reasoning", line.reasoning);
    part(inside, "Answer", line.answer || "(none)");
    inside.append(make("p", "facts", facts(line)));
    box.append(inside);
  });
  return box;
}
function behaviour(group) {
  const box = make("article"), first = group[0], title = make("h3", "", first.id + " ");
  const about = first.kind + ", " + first.category + (first.hops === null ? "" : ", " + first.hops + " hops");
  title.append(make("small", "", about));
  box.append(title, make("p", "text", first.prompt));
  function add(begin) {
    box.append(...group.slice(begin, begin + WITHIN).map(completion));
    const left = group.length - begin - WITHIN;
    if (left <= 0) return;
    const button = make("button", "", "show " + Math.min(left, WITHIN) + " more of " + group.length);
    button.type = "button";
    button.addEventListener("click", () => { button.remove(); add(begin + WITHIN); });
    box.append(button);
  }
  add(0);
  return box;
}
function extend() {
  const next = found.slice(shown, shown + PAGE);
  list.append(...next.map(behaviour));
  shown += next.length;
  more.hidden = shown >= found.length;
  more.textContent = "show " + Math.min(PAGE, found.length - shown) + " more of " + found.length;
}
function filter() {
  const words = form.text.value.toLowerCase().trim(), groups = new Map();
  let count = 0;
  for (const line of lines) {
    if (!line.deciding && !form.every.checked) continue;
    if (KEYS.some(key => form[key].value && form[key].value !== line[key])) continue;
    if (words && !haystack(line).includes(words)) continue;
    if (!groups.has(line.about)) groups.set(line.about, []);
    groups.get(line.about).push(line);
    count += 1;
  }
  found = [...groups.values()].map(group => group.sort((a, b) => place(a) - place(b) || a.step - b.step));
  shown = 0;
  list.replaceChildren();
  document.getElementById("count").textContent = found.length + " prompts, " + count + " completions";
  extend();
}
for (const key of KEYS) form[key].append(...values[key].map(value => new Option(value, value)));
let timer = 0;
form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 150); });
form.addEventListener("submit", event => event.preventDefault());
more.addEventListener("click", extend);
form.hidden = false;
filter();
"""


def page(parts: Sequence[Section], pictures: dict[str, bytes], command: str, lines: Sequence[dict]) -> str:
    """The page. `pictures`: name -> PNG; `lines`: completions with their verdicts."""
    policy = f"default-src 'none'; img-src data:; style-src {digest(STYLE)}; script-src {digest(SCRIPT)}; "
    policy += "base-uri 'none'; form-action 'none'"
    titles = [*(part.title for part in parts), "Completions"]
    links = "".join(f'<li><a href="#s{i}">{html.escape(title)}</a></li>' for i, title in enumerate(titles))
    body = "".join(section_html(i, part, pictures, command) for i, part in enumerate(parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title><style>{STYLE}</style></head><body>\n<header><h1>{TITLE}</h1></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>{body}{explorer(len(parts), lines)}</main>\n'
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def section_html(number: int, part: Section, pictures: dict[str, bytes], command: str) -> str:
    blocks = [f'<section id="s{number}"><h2>{html.escape(part.title)}</h2>', f"<p>{escape(part.text)}</p>"]
    if part.code:
        blocks.append(f"<p><code>{escape(part.code)}</code></p>")
    if part.figure in pictures:
        blocks.append(figure_html(pictures[part.figure], CAPTIONS[part.figure], command))
    return "\n".join([*blocks, *map(table_html, part.tables), "</section>\n"])


def escape(text: str) -> str:
    return html.escape(visible(text), quote=True)


def figure_html(png: bytes, caption: str, command: str) -> str:
    source = (
        f'<details class="source"><summary>Source command</summary><code>{escape(command)}</code></details>'
    )
    data = base64.b64encode(png).decode()
    image = f'<img alt="{escape(caption)} The numbers are in the tables below." src="data:image/png;base64,{data}">'
    return f'<figure><div class="scroll" tabindex="0">{image}</div><figcaption>{escape(caption)} {source}</figcaption></figure>'


def table_html(table: Table) -> str:
    """A table in a box of its own that scrolls. The first cell of a row is its head; numbers stand on the right."""
    right = table.numeric()

    def cell(text: str, row: int, column: int) -> str:
        names = ["n"] if right[column] else ["short"] if len(text) < SHORT else []
        names += ["mark"] * ((row, column) in table.marked)
        mean, space, interval = escape(text).partition(" [" if is_number(text) else "\0")
        content = f"{mean} <small>[{interval}</small>" if space else mean
        return element("td", names, content) if column else element('th scope="row"', names, content)

    head = "".join(
        element('th scope="col"', ["n"] * r, escape(text)) for text, r in zip(table.head, right, strict=True)
    )
    rows = "\n".join(
        f"<tr>{''.join(cell(text, i, k) for k, text in enumerate(row))}</tr>"
        for i, row in enumerate(table.rows)
    )
    caption = escape(table.caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def element(start: str, names: Sequence[str], content: str) -> str:
    classes = f' class="{" ".join(names)}"' if names else ""
    return f"<{start}{classes}>{content}</{start[:2]}>"


# ---- completions -------------------------------------------------------------------------------------------


def explorer(number: int, lines: Sequence[dict]) -> str:
    """Controls, an empty list, and the data; the script does the rest."""
    kept, count = within(lines, LIMIT)
    cut = (
        f" Too many for a page: here are the first {count} prompts of each model and set."
        if len(kept) < len(lines)
        else ""
    )
    choose = '<label>{0}<select name="{0}"><option value="">all</option></select></label>'
    choices = "".join(choose.format(name) for name in ("model", "set", "kind", "verdict"))
    return f"""<section id="s{number}"><h2>Completions</h2>
<p>Of a harmful prompt: defended, broken, or unknown where the judge gave no verdict. Of another: refused or served.
All of them are in completions.jsonl.{cut}</p>
<noscript><p>This list needs JavaScript; report.md, beside this page, has examples without it.</p></noscript>
<form id="filters" hidden>{choices}
<label>text<input type="search" name="text" placeholder="search"></label>
<label><input type="checkbox" name="every"> also tries and budgets that did not decide</label></form>
<p id="count" role="status"></p><div id="list"></div><button id="more" type="button" hidden>show more</button>
<script type="application/json" id="data">{payload(kept)}</script></section>"""


def within(lines: Sequence[dict], limit: int) -> tuple[list[dict], int]:
    """The first N prompts of every model and set, N as large as `limit` bytes allow; and N."""
    ranks: dict[tuple[str, str], dict[str, int]] = {}
    sizes: Counter[int] = Counter()
    met: set[str] = set()
    placed = []
    for line in lines:
        seen = ranks.setdefault((line["model"], line["set"]), {})
        rank = seen.setdefault(line["id"], len(seen))
        new = "" if line["prompt"] in met else line["prompt"]  # a prompt is written once
        met.add(line["prompt"])
        placed.append((rank, line))
        sizes[rank] += len(to_json([*row(line), new]).encode(errors="backslashreplace")) + len(",")
    count, total = 0, 0
    while count in sizes and (total := total + sizes[count]) <= limit:
        count += 1
    return [line for rank, line in placed if rank < count], count


def payload(lines: Sequence[dict]) -> str:
    """{"fields": names, "rows": [[index of its prompt, values of the other fields], ...], "prompts": [[id, prompt], ...]}"""
    places: dict[tuple[str, str], int] = {}
    rows = [
        [places.setdefault((visible(str(line["id"])), visible(line["prompt"])), len(places)), *row(line)]
        for line in lines
    ]
    return to_json({"fields": FIELDS, "rows": rows, "prompts": list(places)})


def row(line: dict) -> list:
    """The values of FIELDS, without the first. A text that was sent as it is is not repeated."""
    values = [line.get(key) for key in FIELDS[1:]]
    values[FIELDS.index("sent") - 1] = "" if line["sent"] == line["prompt"] else line["sent"]
    return [visible(value) if isinstance(value, str) else value for value in values]


def to_json(value: object) -> str:
    """JSON that cannot end the element it stands in: no <, > or &."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
