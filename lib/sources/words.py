"""The words of --files, --eval-files and --trace-files: [KIND=]SOURCE[:N | :S+R]."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib import UserError
from lib.rewards import KINDS
from lib.sources.known import SOURCES

SETS = (*KINDS, "jailbreak")  # of evaluation; a jailbreak is of kind harmful


@dataclass(frozen=True)
class Given:
    """A word taken apart."""

    text: str  # SOURCE, without KIND= and quota
    source: str  # what records call it
    kind: str = ""  # of SETS, or "" for what the source itself says
    name: str = ""  # of a known source
    path: Path | None = None  # a file, of a known source or not
    hub: tuple[str, str, str] | None = None  # (data set, configuration or "", split)
    sft: int = 0  # prompts for SFT
    rl: int | None = None  # prompts for RL's pool; None: no quota


def parse_word(word: str, flag: str = "--files") -> Given:
    """What a word says; only --files may have a quota. Reads nothing. UserError for a word that says nothing.

    >>> given = parse_word("harmful=wildjailbreak:400+800")
    >>> given.kind, given.name, given.sft, given.rl
    ('harmful', 'wildjailbreak', 400, 800)
    >>> parse_word("hub:me/prompts:train").hub
    ('me/prompts', '', 'train')
    """
    kind, equals, text = word.partition("=")
    if equals and kind not in SETS and re.fullmatch(r"\w[\w-]*", kind) and not Path(word).exists():
        raise UserError(
            f"{flag}: given {word}; unknown KIND {kind}: allowed {' | '.join(SETS)} (a file of that name: ./{word})"
        )
    kind, text = (kind, text) if kind in SETS else ("", word)
    quota = re.fullmatch(r"(.+?):(?:(\d{1,9})\+)?(\d{1,9})", text)
    sft, rl = 0, None
    if quota:
        text, sft, rl = quota[1], int(quota[2] or 0), int(quota[3])
        if flag != "--files":
            raise UserError(f"{flag}: given {word}; a quota is for --files only")
        if not kind:
            raise UserError(f"{flag}: given {word}; a quota needs KIND= before it")
        if sft and kind not in ("harmful", "jailbreak"):
            raise UserError(f"{flag}: given {word}; SFT has harmful prompts only: allowed {kind}={text}:{rl}")
    if flag == "--trace-files" and kind not in ("", "harmful"):
        raise UserError(f"{flag}: given {word}; SFT has harmful prompts only: allowed {text}")
    if text.startswith("hub:"):
        parts = text.removeprefix("hub:").split(":")
        if len(parts) not in (2, 3) or not all(parts) or parts[0].count("/") != 1:
            raise UserError(
                f"{flag}: given {word}; allowed hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT"
            )
        config = parts[1] if len(parts) == 3 else ""
        return Given(text, text.removeprefix("hub:"), kind, hub=(parts[0], config, parts[-1]), sft=sft, rl=rl)
    name, at, path = text.partition("@")
    if name in SOURCES:
        if at and not path:
            raise UserError(f"{flag}: given {word}; allowed {name} or {name}@FILE")
        return Given(text, name, kind, name=name, path=Path(path) if path else None, sft=sft, rl=rl)
    if not Path(text).suffix:
        raise UserError(
            f"{flag}: given {word}; allowed a file, hub:OWNER/NAME:SPLIT, or {' | '.join(SOURCES)}"
        )
    return Given(text, Path(text).name, kind, path=Path(text), sft=sft, rl=rl)


def source_names(words: Iterable[str]) -> dict[str, str]:
    """{SOURCE as given: what records call it}: its name, or, if it shares that with another of `words`, all that was given.

    >>> source_names(["harmful=a/x.jsonl", "harmless=b/x.jsonl:9", "xstest", "ambiguous=xstest"])
    {'a/x.jsonl': 'a/x.jsonl', 'b/x.jsonl': 'b/x.jsonl', 'xstest': 'xstest'}
    """
    given = {one.text: one.source for one in (parse_word(word) for word in words)}
    shared = Counter(given.values())
    return {text: text if shared[source] > 1 else source for text, source in given.items()}
