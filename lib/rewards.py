"""What the policy is rewarded for, and who judges it (paper, section 4.3).

    r_total(x, z, y) = r_f(z, y) * r_s(x, y)   if x is harmful                (equations 1 and 2)
    r_total(x, z, y) = r_f(z, y) * r_n(x, y)   if x is harmless or ambiguous

r_f in {0, 1} is the format (`lib.chat.Parsed.well_formed`), r_s the safety and r_n the task completion of the
answer. One of the two alone would be gamed: refusing everything is safe, complying with everything is
helpful. With both, it depends on the prompt which one pays, and so the policy has to work that out in its
reasoning.

A judge scores the harm of an answer and how far it does what was asked (`load_judge`, in lib/judges), each in [0, 1], or
None where it gave no verdict: unknown, which is neither harmless nor useless. It does not see the reasoning, which is
free to consider what an answer must not say.
"""

from __future__ import annotations

KINDS = ("harmful", "harmless", "ambiguous")


def safety_reward(harm: float, slack: float = 0.1) -> float:
    """r_s for an answer of `harm` in [0, 1]: s = 1 - harm, and full reward from s = 1 - slack on.

    The slack leaves room to explore: a judge's last few per cent are noise, and would punish every answer but
    a curt refusal.

    >>> [safety_reward(harm) for harm in (0.0, 0.1, 0.25, 1.0)]
    [1.0, 1.0, 0.75, 0.0]
    """
    return 1.0 if harm <= slack else 1.0 - harm


def total_reward(
    kind: str, harm: float | None, task: float | None, well_formed: bool, one_reward: bool = False
) -> float | None:
    """Equations 1 and 2, in [0, 1]; None (unknown) where the judge had no verdict on what they need.

    What breaks the format earns nothing, whatever the judge says or does not say: r_f = 0.

    >>> total_reward("harmful", harm=0.0, task=0.0, well_formed=True)  # refused, rightly
    1.0
    >>> total_reward("ambiguous", harm=0.0, task=0.0, well_formed=True)  # refused, needlessly
    0.0
    >>> total_reward("harmless", harm=0.0, task=0.8, well_formed=True)
    0.8
    >>> total_reward("harmless", harm=0.0, task=0.8, well_formed=False)  # did not close its reasoning
    0.0
    >>> total_reward("harmful", harm=None, task=0.8, well_formed=False), total_reward("harmful", None, 0.8, True)
    (0.0, None)

    `one_reward`: r_n for harmful prompts, too. Finding F7 of the paper says that this gives a narrower frontier.

    >>> total_reward("harmful", harm=0.0, task=0.3, well_formed=True, one_reward=True)
    0.3

    Raises ValueError for an unknown kind and for a score that is no number in [0, 1]: these are faults of the
    data or of the judge, and training on them must stop.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: one of {', '.join(KINDS)}")
    for score in (harm, task):
        if score is not None and not 0 <= score <= 1:  # not a number fails this, too
            raise ValueError(f"the judge gave harm {harm} and task {task}: scores must be numbers in [0, 1]")
    if not well_formed:
        return 0.0
    if kind == "harmful" and not one_reward:
        return None if harm is None else safety_reward(harm)
    return task
