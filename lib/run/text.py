"""Text of models and of strangers: made visible, made readable, compared as a reader would."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# controls, and what reorders text
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
UNREADABLE = re.compile("[\x00\ud800-\udfff]")  # null bytes and lone surrogates
QUOTES = '"`\u00b4\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2039\u203a\u00ab\u00bb'
WIDTHLESS = "\u034f\u115f\u1160\u3164" + "".join(map(chr, range(0xFE00, 0xFE10)))  # though of no format
BEHIND = "\n\n---\n\n"  # a context
MARKS = " '.,:;!?\u00a1\u00bf\u3001\u3002"  # around a prompt; "C#" and "C++" keep theirs


def visible(text: str) -> str:
    """Text whose every character shows, with one way to break lines; what would hide or reorder is named.

    >>> visible("a\\0b\\u2028c")
    'a\\\\u0000b\\nc'
    """
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", BREAK.sub("\n", text))


def readable(value: Any) -> Any:
    """A JSON value in whose texts U+FFFD stands for null bytes and lone surrogates: no tokenizer takes these.

    >>> readable({"prompt": ["a\\ud800b", 7]}) == {"prompt": ["a\\ufffdb", 7]}
    True
    """
    if isinstance(value, str):
        return UNREADABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [readable(item) for item in value]
    if isinstance(value, dict):
        return {readable(key): readable(item) for key, item in value.items()}
    return value


def same_prompt(prompt: str) -> str:
    """What prompts share that are the same to a reader: duplicates, which may not be in two sets either.

    That is, apart from capitals, spaces, what has no width, forms that Unicode calls compatible (full width,
    ligatures, one sign or two for an accent), kinds of quotes and dashes, and the marks before and behind.
    Letters of two scripts that look alike stay apart.

    >>> [same_prompt(text) for text in ("\uff37hat\u2019s  a b\u200bed?", "\u201cwhat's a bed\u201d")]
    ["what's a bed", "what's a bed"]
    >>> same_prompt("12*4") == same_prompt("12/4")
    False
    """
    text = prompt.translate(dict.fromkeys(map(ord, QUOTES), "'"))  # before NFKC, which takes some apart
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kinds = {"Cf": "", "Cc": " ", "Pd": "-"}
    signs = dict.fromkeys(WIDTHLESS, "") | {"\u2212": "-"} | dict.fromkeys(QUOTES, "'")
    words = "".join(signs.get(sign, kinds.get(unicodedata.category(sign), sign)) for sign in text).split()
    return " ".join(words).strip(MARKS) or " ".join(words)


def with_context(prompt: str, context: str) -> str:
    """The prompt behind the text that it is about, as HarmBench's own pipeline joins them."""
    return context.strip() + BEHIND + prompt if prompt and context.strip() else prompt


def without_context(prompt: str, context: str) -> str:
    """The prompt that `with_context` was given.

    >>> without_context(with_context("Sum it up.", " A text. "), " A text. ")
    'Sum it up.'
    """
    return prompt.removeprefix(context.strip() + BEHIND)
