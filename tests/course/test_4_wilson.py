"""Exercise `wilson`: lib/metrics.py."""

from grading import ensure, near

from lib.metrics import wilson


def bounds(hits, n):
    found = wilson([True] * hits + [False] * (n - hits))
    near([found["mean"], found["n"]], [round(hits / n, 4), n], "mean or n is wrong")
    return [found["low"], found["high"]]


def test_eight_of_ten():
    slips = {
        "this is the normal (Wald) interval: share +- z times its standard error": [0.5521, 1.0479],
        "this is the normal (Wald) interval, cut at 1": [0.5521, 1.0],
        "the centre is the share itself: Wilson's is drawn towards 1/2": [0.5734, 1.0],
        "the half width lacks a term: of 24 of 24 the interval has no width": [0.5376, 0.8959],
    }
    near(bounds(8, 10), [0.4902, 0.9433], "the interval of 8 of 10 is wrong", slips)


def test_it_stays_within_0_and_1():
    for hits, n in ((0, 1), (1, 1), (1, 10), (10, 10), (0, 400)):
        low, high = bounds(hits, n)
        ensure(0 <= low <= high <= 1, f"{hits} of {n}: the interval leaves [0, 1]")


### BEGIN HIDDEN
def test_all_and_none():
    low, high = bounds(24, 24)
    ensure(low < high, "24 of 24: the interval has no width, as if 24 were enough to be certain")
    near([low, high], [0.862, 1.0], "24 of 24: the interval is wrong")
    near(bounds(0, 10), [0.0, 0.2775], "0 of 10: the interval is wrong")


def test_more_are_surer():
    near(bounds(81, 263), [0.2553, 0.3662], "81 of 263: the interval is wrong")
    near(bounds(1, 2), [0.0945, 0.9055], "1 of 2: the interval is wrong")


### END HIDDEN
