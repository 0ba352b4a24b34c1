"""Exercise `no_leak`: 01_build_mixture.py, Taken.take."""

import importlib

from grading import ensure, near

stage = importlib.import_module("01_build_mixture")


def records(*prompts):
    return [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]


def prompts_of(found):
    return [record["prompt"] for record in found]


def test_who_comes_first_has_it():
    taken = stage.Taken()
    first = prompts_of(taken.take(records("a bed", "a cake"), "evaluation"))
    ensure(first == ["a bed", "a cake"], "prompts that nobody has are not taken")
    second = prompts_of(taken.take(records("a cake", "a boat"), "RL"))
    ensure("a cake" not in second, "a prompt of the evaluation is taken by RL, too: it leaks")
    ensure(second == ["a boat"], "a prompt that nobody has is left out")


def test_two_spellings_are_one_prompt():
    taken = stage.Taken()
    taken.take(records("What's a bed?"), "evaluation")
    found = taken.take(records("  what\u2019s a BED"), "RL")
    ensure(not found, "two spellings of one prompt pass for two: compare what is the same to a reader")


### BEGIN HIDDEN
def test_once_in_a_set():
    taken = stage.Taken()
    found = prompts_of(taken.take(records("a bed", "a bed", "a cake"), "RL"))
    ensure(found == ["a bed", "a cake"], "a prompt is twice in one set")
    ensure(not stage.Taken().take(records("", "  "), "RL"), "an empty prompt is taken")


def test_at_most():
    taken = stage.Taken()
    found = taken.take(records("a bed", "a cake", "a boat"), "evaluation", most=2)
    near(len(found), 2, "more or fewer prompts are taken than `most` says")
    rest = prompts_of(taken.take(records("a boat"), "RL"))
    ensure(rest == ["a boat"], "what was over `most` is owned, though nobody uses it")
    ensure(not stage.Taken().take(records("a bed"), "RL", most=0), "most=0 takes a prompt")


def test_what_was_left_out_is_counted():
    taken = stage.Taken()
    taken.take(records("a bed", "A bed", "", "a cake", "a boat"), "evaluation", most=2)
    taken.take(records("a bed", "a boat", "a boat"), "RL")
    counts = {"duplicate": 2, "empty": 1, "in evaluation": 1}
    ensure(dict(taken.dropped) == counts, "`dropped` does not count what was left out by its reason")


### END HIDDEN
