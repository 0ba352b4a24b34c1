"""Exercise `mixture`: 01_build_mixture.py, prompts_needed."""

import importlib

from grading import ensure, near

stage = importlib.import_module("01_build_mixture")


def needed(lam, count, share=0.5):
    settings = stage.Settings(lambda_harmful=lam, rl_prompts=count, ambiguous_share=share)
    found, kinds = stage.prompts_needed(settings), ("harmful", "harmless", "ambiguous")
    ensure(found.keys() == {*kinds}, "the result has a count for each kind: harmful, harmless, ambiguous")
    return [found[kind] for kind in kinds]


def test_the_sandbox():
    slips = {"ambiguous_share is a share of the prompts that are not harmful, not of all": [640, 0, 640]}
    split = "lambda is the share of harmful prompts: all others are split between the other two kinds"
    slips[split] = [320, 640, 320]
    near(needed(0.5, 1280), [640, 320, 320], "lambda 0.5 of 1280 prompts: the counts are wrong", slips)


def test_they_are_as_many_as_asked_for():
    for lam, count in ((0.5, 1280), (0.3, 7), (0.9, 11), (0.5, 1)):
        right = sum(needed(lam, count)) == count
        ensure(right, f"lambda {lam} of {count} prompts: the three counts do not add up to {count}")


### BEGIN HIDDEN
def test_all_and_none():
    near(needed(1, 9), [9, 0, 0], "lambda 1 leaves no room for other prompts")
    near(needed(0, 8, 0.25), [0, 6, 2], "lambda 0: no prompt is harmful")


def test_shares_are_rounded():
    slips = {"a share is cut off, not rounded: as a float, 0.29 of 100 is 28.999...": [28, 54, 18]}
    near(needed(0.29, 100, 0.25), [29, 53, 18], "lambda 0.29 of 100 prompts: the counts are wrong", slips)
    near(needed(0.1, 2000, 0.5), [200, 900, 900], "the paper's mixture, lambda 0.1: the counts are wrong")


### END HIDDEN
