"""Exercise `grpo_loss`: 03_rl_train.py. Two completions, the second with one token of padding."""

import importlib

import pytest
import torch
from grading import near

stage = importlib.import_module("03_rl_train")
MASK = torch.tensor([[True, True], [True, False]])
ZEROS = torch.zeros(2, 2)


@pytest.fixture(autouse=True)
def constant_kl(monkeypatch):
    """In the place of `kl_estimate`: 0.5 for every token, with a slope of 1."""

    def kl(logprobs, reference_logprobs, estimator):  # the names of `kl_estimate`: it may be called by them
        return 0.5 + logprobs - logprobs.detach()

    monkeypatch.setattr(stage, "kl_estimate", kl)


def loss_of(change, advantages=(1.0, -1.0), kl_coef=0.0, weights=(0.25, 0.25)):
    """Loss and its gradient where log pi - log pi_old is `change`, of four tokens."""
    logprobs = torch.tensor(change).view(2, 2).requires_grad_()
    settings = stage.Settings(kl_coef=kl_coef, clip_range=0.2)
    per_row = torch.tensor(advantages), MASK, torch.tensor(weights)
    loss = stage.grpo_loss(logprobs, ZEROS, ZEROS, *per_row, settings)
    loss.backward()
    return loss.item(), logprobs.grad.flatten().tolist()


def test_on_policy():
    """The ratio is 1, its slope that of log pi."""
    loss, slope = loss_of([0.0] * 4)
    slips = {
        "the sign: a step goes down the loss, so the loss must fall where the advantage is gained": 0.25,
        "padding is in the loss: completion_mask": 0.0,
        "the weights are not used": -1.0,
    }
    near(loss, -0.25, "the loss of two completions is wrong", slips)
    slips = {"padding has a gradient: completion_mask": [-0.25, -0.25, 0.25, 0.25]}
    near(slope, [-0.25, -0.25, 0.25, 0.0], "the gradient at ratio 1 is wrong", slips)


def test_the_kl_term():
    loss, _ = loss_of([0.0] * 4, advantages=(0.0, 0.0), kl_coef=0.4)
    slips = {
        "the sign of the KL term: to be far from the reference must cost": -0.15,
        "kl_coef is not used": 0.375,
        "padding is in the KL term: completion_mask": 0.2,
    }
    near(loss, 0.15, "the KL term is wrong", slips)


### BEGIN HIDDEN
def test_clipping():
    """A ratio of e^0.5 is over 1.2, one of e^-0.5 is under 0.8."""
    loss, slope = loss_of([0.5, -0.5, -0.5, 0.0])
    slips = {"max for min: clipping is there to forgo gains, not losses": [-0.41218, 0.0, 0.15163, 0.0]}
    slips["nothing is clipped: clip_range"] = [-0.41218, -0.15163, 0.15163, 0.0]
    slips["clipped without the minimum: a ratio that went the wrong way must still be mended"] = [0.0] * 4
    near(slope, [0.0, -0.15163, 0.0, 0.0], "the gradient of clipped tokens is wrong", slips)
    near(loss, -0.25163, "the loss of clipped tokens is wrong")
    _, slope = loss_of([-0.5, 0.5, 0.5, 0.0])
    near(slope, [-0.15163, 0.0, 0.41218, 0.0], "the gradient of what went the wrong way is wrong", slips)


def test_weights():
    loss, _ = loss_of([0.0] * 4, weights=(0.1, 0.3), kl_coef=0.4)
    slips = {"the KL term is not weighed": 0.7, "only the KL term is weighed": -0.9}
    near(loss, 0.2, "each completion's sum over tokens has its own weight", slips)


def test_kl_has_a_gradient():
    _, slope = loss_of([0.0] * 4, advantages=(0.0, 0.0), kl_coef=0.4)
    near(slope, [0.1, 0.1, 0.1, 0.0], "the gradient of the KL term is wrong")


### END HIDDEN
