"""What stage 1 has from --trace-files: prompts, each with its traces."""

from __future__ import annotations

from collections import defaultdict

from lib.sources import parse_word, read_traces, same_prompt, source_names
from lib.sources.manifest import words_of

Traced = tuple[dict[str, dict], dict[str, list[tuple[str, str]]], int]


def traced_prompts(settings) -> Traced:
    """Each prompt, by `same_prompt`: its record, and its (reasoning, answer) pairs; and how many pairs were empty.

    `settings` are those of stage 1. A pair without reasoning or answer is left out (paper, stage I), and a prompt that
    has no other.
    """
    records: dict[str, dict] = {}
    pairs, empty, names = defaultdict(list), 0, source_names(words_of(settings))
    for word in settings.trace_files:
        source = {"source": names[parse_word(word).text]}
        for record, pair in read_traces(word, settings):
            if all(text.strip() for text in pair):
                records.setdefault(same_prompt(record["prompt"]), record | source)
                pairs[same_prompt(record["prompt"])].append(pair)
            else:
                empty += 1
    return records, pairs, empty
