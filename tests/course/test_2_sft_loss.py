"""Exercise `sft_loss`: 02_sft_warmstart.py, train_step.

The model is a table of log-probabilities, one for each token; what a step does is counted by hand.
"""

import importlib

import pytest
import torch
from grading import ensure, near

from lib.run.plumbing import Run

stage = importlib.import_module("02_sft_warmstart")


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor([0.0, -1.0, -2.0, -4.0]))


def looked_up(model, input_ids, attention_mask, completion_mask, **_):
    """In the place of `token_logprobs`, with its names: it may be called by them."""
    return model.table[input_ids] * completion_mask


class Counting(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


@pytest.fixture
def step(monkeypatch):
    """step(most): statistics, the table after one step at rate 1, and the number of steps."""
    monkeypatch.setattr(stage, "token_logprobs", looked_up)

    def take(most):
        model, run = Table(), Run(stage.Settings(max_grad_norm=0.0))
        short = stage.Example({}, [3, 3, 1], [False, False, True])
        long = stage.Example({}, [2, 2, 3, 3], [False, True, True, True])
        optimizer = Counting(model.parameters(), lr=1.0)
        stats = stage.train_step(model, optimizer, [short, long], 0, most, run)
        return stats, (model.table.detach() - torch.tensor([0.0, -1.0, -2.0, -4.0])).tolist(), optimizer.steps

    return take


def test_loss(step):
    stats, _, _ = step(1000)
    slips = {
        "the sign: a likely text has a low loss": -2.75,
        "this is the sum over tokens, not their mean": 11.0,
        "each trace counts alike: the mean is over the tokens of the batch": 13 / 6,
        "the prompt is in the loss, too": 23 / 7,
        "the sum is divided by the number of traces, not of learned tokens": 5.5,
    }
    near(stats["loss"], 2.75, "the loss is not the mean over the learned tokens", slips)


def test_the_step_goes_down(step):
    _, moved, _ = step(1000)
    ensure(any(moved), "the weights have not moved")
    ensure(max(moved) > 0, "the step makes the learned tokens less likely: the sign of the loss")


### BEGIN HIDDEN
def test_gradient(step):
    stats, moved, _ = step(1000)
    slips = {
        "the gradient is divided by the number of traces, not of learned tokens": [0, 0.5, 0.5, 1],
        "the gradient is that of the sum over tokens, not of their mean": [0, 1, 1, 2],
    }
    near(moved, [0, 0.25, 0.25, 0.5], "the gradient is not that of the loss", slips)
    near(stats["grad_norm"], 0.61237, "grad_norm is not the norm of the gradient")


def test_micro_batches_add_up(step):
    stats, moved, steps = step(4)  # one trace at a time
    ensure(steps == 1, "a batch is one step of the optimizer, however many micro-batches it has")
    slips = {"each micro-batch is divided by its own tokens: the batch's count": [0, 1, 1 / 3, 2 / 3]}
    near(moved, [0, 0.25, 0.25, 0.5], "two micro-batches have another gradient than one", slips)
    near(stats["loss"], 2.75, "two micro-batches have another loss than one")


### END HIDDEN
