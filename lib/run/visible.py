"""Text of models and of strangers, on a screen or in a report: nothing in it hides, reorders or steers."""

from __future__ import annotations

import re

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)  # control, bidi
BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")


def visible(text: str) -> str:
    """Text whose every character shows, with one way to break lines; what would hide or reorder is named.

    >>> visible("a\\0b\\u2028c")
    'a\\\\u0000b\\nc'
    """
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", BREAK.sub("\n", text))
