"""Exercise `kl`: 03_rl_train.py, kl_estimate, and lib/policy.py, k3."""

import importlib

import torch
from grading import ensure, near

stage = importlib.import_module("03_rl_train")
POLICY, REFERENCE = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5]


def estimate(kind, policy=POLICY, reference=REFERENCE):
    return stage.kl_estimate(torch.tensor(policy), torch.tensor(reference), kind)


def test_k1():
    slips = {"k1 has the wrong sign: a policy likelier than its reference is positive": [-0.5, 1, 0]}
    near(estimate("k1"), [0.5, -1.0, 0.0], "k1 is wrong", slips)


def test_k2():
    slips = {"k2 is half a square": [0.25, 1.0, 0.0]}
    near(estimate("k2"), [0.125, 0.5, 0.0], "k2 is wrong", slips)


def test_k3():
    slips = {
        "k3 is that of the other gap: its ratio is reference over policy": [0.14872, 0.36788, 0.0],
        "k3 lacks its linear part": [-0.39347, 1.71828, 0.0],
    }
    near(estimate("k3"), [0.10653, 0.71828, 0.0], "k3 is wrong", slips)


### BEGIN HIDDEN
def test_a_large_gap():
    found = estimate("k3", [-3.0, -900.0, -16.0], [-0.5, -1.0, -0.5])
    ensure(found.isfinite().all(), "k3 of a large gap is not finite")
    ensure(found.max() <= 10.0001, "k3 is not clamped: one token of a large gap would drown all others")
    near(found, [8.68249, 10.0, 10.0], "k3 of a large gap is wrong")
    near(estimate("k3", [-1.0], [-900.0]), [10.0], "k3 of a very unlikely reference is wrong")


def test_gradient():
    for kind, slope in (("k1", [1.0, 1.0, 1.0]), ("k2", [0.5, -1.0, 0.0]), ("k3", [0.39347, -1.71828, 0.0])):
        policy = torch.tensor(POLICY, requires_grad=True)
        found = stage.kl_estimate(policy, torch.tensor(REFERENCE), kind)
        found.sum().backward()
        near(policy.grad, slope, f"the gradient of {kind} is wrong")
    policy = torch.tensor([-16.0, -900.0], requires_grad=True)
    stage.kl_estimate(policy, torch.tensor([-0.5, -1.0]), "k3").sum().backward()
    near(policy.grad, [0.0, 0.0], "where k3 is clamped it has a gradient")


### END HIDDEN
