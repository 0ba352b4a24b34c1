"""Exercise `update_policy`: 03_rl_train.py.

Policy and reference are tables of log-probabilities, one for each token; the loss is a stand-in, linear in
them. So what is handed on, and what a step does, can be counted by hand.
"""

import importlib

import pytest
import torch
from grading import ensure, flat, near

from lib.chat import Parsed
from lib.run.plumbing import Run
from lib.sampler import Completion

stage = importlib.import_module("03_rl_train")
START = [0.0, -1.0, -2.0, -4.0]


class Table(torch.nn.Module):
    def __init__(self, shift=0.0):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(START) + shift)


def rollout(prompt, new, advantage):
    mask = [False] * len(prompt) + [True] * len(new)
    completion = Completion(new, [START[token] - 0.5 for token in new], "eos")
    made = stage.Rollout({}, prompt + new, mask, completion, "", Parsed("", "", True), 0, "none")
    made.advantage = advantage
    return made


class Step:
    """An update, and what it handed to `token_logprobs` and `grpo_loss`."""

    def __init__(self, monkeypatch):
        self.asked, self.handed = [], []
        monkeypatch.setattr(stage, "token_logprobs", self.looked_up)
        monkeypatch.setattr(stage, "grpo_loss", self.loss)
        monkeypatch.setattr(stage, "kl_estimate", self.kl)
        self.policy, self.reference = Table(), Table(shift=-0.5)
        self.rollouts = [rollout([3, 3], [1], 0.5), rollout([3], [2, 2, 1], -1.0)]

    # These have the names of what they stand for: it may be called by them.
    def kl(self, logprobs, reference_logprobs, estimator):
        return 0 * logprobs + 0.25

    def looked_up(
        self, model, input_ids, attention_mask, completion_mask, temperature=1.0, with_entropy=False, **_
    ):
        self.asked.append((model, temperature, torch.is_grad_enabled()))
        values = model.table[input_ids] * completion_mask
        return (values, -0.5 * values) if with_entropy else values

    def loss(
        self, logprobs, old_logprobs, reference_logprobs, advantages, completion_mask, weights, settings
    ):
        given = (logprobs, old_logprobs, reference_logprobs, advantages, completion_mask, weights)
        self.handed.append([x.detach().clone() for x in given])
        return (logprobs * completion_mask * weights[:, None]).sum()

    def __call__(self, **changes):
        usual = {"max_grad_norm": 0.0, "max_new_tokens": 8, "temperature": 0.7}
        settings = stage.Settings(**usual | changes)
        before = self.policy.table.detach().clone()
        sgd = torch.optim.SGD([*self.policy.parameters(), *self.reference.parameters()], lr=1.0)
        models, run = (self.policy, self.reference), Run(settings)
        found = stage.update_policy(*models, sgd, self.rollouts, 0, settings, run)
        return found, (before - self.policy.table.detach()).tolist()


@pytest.fixture
def step(monkeypatch):
    return Step(monkeypatch)


def test_the_policy_learns_and_the_reference_does_not(step):
    _, moved = step()
    ensure(any(moved), "the policy has not moved")
    near(moved, [0, 0.5, 0.5, 0], "the step is not that of grpo_loss's gradient")
    still = step.reference.table.tolist() == [x - 0.5 for x in START]
    ensure(still, "the reference has moved: it is frozen")


def test_what_the_loss_is_handed(step):
    step()
    new, old, reference, advantages, mask, weights = step.handed[0]
    ensure(new.shape == mask.shape == old.shape == reference.shape, "not all tensors have the shape (B, T)")
    near(old, new, "at the first update the old log-probabilities are the policy's own: the ratio is 1")
    near(reference[mask], new[mask] - 0.5, "the reference's log-probabilities are not handed on")
    near(sorted(flat(advantages)), [-1.0, 0.5], "the advantages are not handed on, one a completion")
    near(weights, [0.25, 0.25], "the weights are not those of `sequence_weights` over the batch")


### BEGIN HIDDEN
def test_a_second_update(step):
    step(), step()
    new, old, _, _, mask, _ = step.handed[-1]
    hint = "a second update forgets pi_old: it stays that of the first one, or the ratio is always 1"
    ensure((new - old)[mask].abs().min() > 0.1, hint)
    near(old[mask], step.handed[0][1][mask], "at a second update pi_old is not that of the first")


def test_micro_batches_add_up(step):
    found, moved = step(max_batch_tokens=4)  # one completion at a time
    ensure(len(step.handed) == 2, "the micro-batches are not those of run.micro_batches")
    slips = {"a micro-batch is weighed by its own tokens: totals are the batch's": [0, 4 / 3, 2 / 3, 0]}
    near(moved, [0, 0.5, 0.5, 0], "two micro-batches have another gradient than one", slips)
    near(found["loss"], -1.5, "two micro-batches have another loss than one")


def test_temperature(step):
    step()
    by_model = {model: (temperature, grad) for model, temperature, grad in step.asked}
    hint = "log-probabilities are at another temperature than the samples"
    near(by_model[step.policy][0], 0.7, f"the policy's {hint}")
    near(by_model[step.reference][0], 0.7, f"the reference's {hint}")
    ensure(not by_model[step.reference][1], "the reference keeps a graph for a gradient that it never takes")


def test_entropy_bonus(step):
    found, moved = step(entropy_coef=0.4)
    slips = {
        "the entropy bonus has the wrong sign: it shall keep samples diverse": [0, 0.4, 0.4, 0],
        "there is no entropy bonus": [0, 0.5, 0.5, 0],
    }
    near(moved, [0, 0.6, 0.6, 0], "the gradient with an entropy bonus is wrong", slips)


def test_statistics(step):
    found, _ = step()
    slips = {"these are sums, not means per token": [-1.5, 1.0, 3.0, 2.0]}
    right = [-1.5, 0.25, 0.75, 0.5]
    names = ("loss", "kl", "entropy", "sampler_gap")
    near([found[name] for name in names], right, "loss, kl, entropy or sampler_gap is wrong", slips)
    near(found["grad_norm"], 0.70711, "grad_norm is not the norm of the gradient")


### END HIDDEN
