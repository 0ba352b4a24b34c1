"""Exercise `advantages`: 03_rl_train.py, group_advantages."""

import importlib

import torch
from grading import ensure, near

stage = importlib.import_module("03_rl_train")
NAN = float("nan")


def of(rewards, std=True):
    found = stage.group_advantages(torch.tensor(rewards, dtype=torch.float64), std)
    ensure(found.shape == (len(rewards), len(rewards[0])), "the result has not the shape of the rewards")
    return found


def test_one_group():
    slips = {
        "the population's std: take n - 1": [1.73205, -0.57735, -0.57735, -0.57735],
        "the variance stands where the std belongs": [3.0, -1.0, -1.0, -1.0],
        "the std is there, but the mean was not taken off": [2.0, 0.0, 0.0, 0.0],
        "the sign: what is better than its rivals has a positive advantage": [-1.5, 0.5, 0.5, 0.5],
    }
    near(of([[1.0, 0.0, 0.0, 0.0]]), [1.5, -0.5, -0.5, -0.5], "the advantages of 1, 0, 0, 0 are wrong", slips)


def test_without_std():
    slips = {"it is divided by the std, though std_normalisation is off": [0.8660, 0.8660, -0.8660, -0.8660]}
    near(of([[1, 1, 0, 0]], std=False), [0.5, 0.5, -0.5, -0.5], "without std the advantages are wrong", slips)


def test_each_group_for_itself():
    found, low, high = of([[1, 0, 0, 0], [0, 1, 1, 1]], std=False), [-0.5] * 4, [0.5] * 3
    slips = {"the baseline is the mean of all rewards: each group has its own": [0.5, *low, *high]}
    right = [0.75, -0.25, -0.25, -0.25, -0.75, 0.25, 0.25, 0.25]
    near(found, right, "with two groups the advantages are wrong", slips)
    slips = {"one std for all groups: each group has its own": [1.04447, -1.04447, 0.52223, -0.52223]}
    near(of([[1, 0], [0.5, 0]]), [0.7071, -0.7071] * 2, "with two groups the advantages are wrong", slips)


### BEGIN HIDDEN
def test_a_group_of_equals():
    for reward in (0.0, 1.0, 1 / 3, 0.1):
        found = of([[reward] * 8])
        ensure(not found.isnan().any(), "a group whose rewards are equal gives NaN: 0 / 0")
        near(found, [0.0] * 8, f"eight times {reward:.3g}: none is better, yet they are not 0 (rounding)")


def test_an_unknown_reward():
    found = of([[1.0, 0.0, 0.0, 0.0, NAN]])
    ensure(not found.isnan().any(), "an unknown reward (NaN) makes advantages NaN")
    slips = {
        "an unknown reward counts as 0": [1.78885, -0.44721, -0.44721, -0.44721, -0.44721],
        "an unknown reward is in the count of the std": [1.73205, -0.57735, -0.57735, -0.57735, 0.0],
        "an unknown reward is in the count of the mean": [1.6, -0.4, -0.4, -0.4, 0.0],
    }
    right = [1.5, -0.5, -0.5, -0.5, 0.0]
    near(found, right, "a group with an unknown reward: the advantages are wrong", slips)
    near(of([[1.0, NAN, NAN]]), [0, 0, 0], "one known reward alone has nothing to be compared with")


def test_precision():
    ensure(of([[1.0, 0.0]]).dtype == torch.float32, "the result is not fp32")


### END HIDDEN
