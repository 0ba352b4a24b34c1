"""Exercise `format`: lib/chat.py, parse_completion."""

from grading import ensure, near

from lib.chat import parse_completion


def test_a_completion_is_taken_apart():
    found = parse_completion("They ask for a poem.\n</think>\n\nRoses are red.")
    parts = (found.reasoning, found.answer)
    bare = tuple(part.strip() for part in parts)
    ensure(parts == bare, "spaces or line breaks are left around reasoning or answer")
    ensure(bare == ("They ask for a poem.", "Roses are red."), "reasoning and answer are not those written")
    near(found.well_formed, True, "a completion that keeps the format is called malformed")


def test_without_an_end_of_reasoning():
    found = parse_completion("Roses are red.")
    ensure(found.answer == "Roses are red.", "without </think> the whole text is the answer")
    ensure(found.reasoning == "", "without </think> there is no reasoning to be sure of: it is empty")
    near(found.well_formed, False, "a completion that never closes its reasoning is malformed")


### BEGIN HIDDEN
def test_closed_twice():
    found = parse_completion("Hm.\n</think>\n\nRoses.</think> Violets.")
    ensure(found.reasoning == "Hm.", "closed twice: the reasoning ends at the first </think>")
    behind = found.answer == "Roses.</think> Violets."
    ensure(behind, "closed twice: all behind the first </think> is the answer")
    near(found.well_formed, False, "closed twice is malformed: the model must close its reasoning once")


def test_opened_again():
    for text in ("<think>\nHm.\n</think>\n\nRoses.", "Hm.\n</think>\n\nRoses. <think>"):
        hint = "the prompt has opened <think> already: a completion that opens it again is malformed"
        near(parse_completion(text).well_formed, False, hint)


def test_nothing_raises():
    found = [parse_completion(text) for text in ("", "</think>", "\n\n")]
    ensure(all(x.reasoning == x.answer == "" for x in found), "there is nothing in it, so nothing comes out")
    near([x.well_formed for x in found], [False, True, False], "empty parts do not break the format")


### END HIDDEN
