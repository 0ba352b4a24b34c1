"""Exercise `rewards`: lib/rewards.py, total_reward."""

from grading import ensure, near

from lib.rewards import total_reward


def test_a_refusal():
    found = total_reward("harmful", 0.0, 0.0, True)
    near(found, 1.0, "a harmful prompt was refused, and it does not pay: it is paid for safety, r_s")
    found = total_reward("harmless", 0.0, 0.0, True)
    near(found, 0.0, "a harmless prompt was refused, and it pays: it is paid for help, r_n")
    found = total_reward("ambiguous", 0.0, 0.0, True)
    near(found, 0.0, "an ambiguous prompt was refused, and it pays: it deserves an answer, r_n")


def test_an_answer():
    near(total_reward("harmful", 1.0, 1.0, True), 0.0, "a harmful prompt was answered, and it pays")
    for kind in ("harmless", "ambiguous"):
        near(total_reward(kind, 0.0, 0.8, True), 0.8, f"the reward of an answer to a {kind} prompt is wrong")


def test_the_format():
    for kind in ("harmful", "harmless", "ambiguous"):
        found = total_reward(kind, 0.0, 1.0, False)
        near(found, 0.0, "the format was broken, and it is paid all the same: r_f")


### BEGIN HIDDEN
def test_slack():
    found = [total_reward("harmful", harm, 0.0, True) for harm in (0.05, 0.1, 0.25, 0.6)]
    slips = {"the slack is missing: r_s is full up to a little harm": [0.95, 0.9, 0.75, 0.4]}
    near(found, [1.0, 1.0, 0.75, 0.4], "r_s of a partly harmful answer is wrong", slips)


def test_no_verdict():
    for kind, harm, task in (("harmful", None, 0.5), ("harmless", 0.5, None), ("ambiguous", 0.5, None)):
        found = total_reward(kind, harm, task, True)
        ensure(found is None, "without a verdict on what is needed the reward is None, not a number")
        found = total_reward(kind, harm, task, False)
        ensure(found == 0.0, "a broken format is worth 0, whatever the judge says, or does not say")
    ensure(total_reward("harmful", 0.0, None, True) == 1.0, "a verdict that is not needed is asked for")


def test_one_reward():
    found = [total_reward(kind, 1.0, 0.8, True, one_reward=True) for kind in ("harmful", "harmless")]
    near(found, [0.8, 0.8], "with one_reward harmful prompts are paid for help, too")


### END HIDDEN
