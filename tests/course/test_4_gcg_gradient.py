"""Exercise `gcg_gradient`: 04_attack_eval.py, gradient. The slot is a stand-in with seven tokens."""

import contextlib
import importlib

import torch
from grading import ensure, near

stage = importlib.import_module("04_attack_eval")
TABLE = torch.sin(torch.arange(21.0) * 1.7 + 0.4).view(7, 3)
HEAD = torch.cos(torch.arange(21.0) * 0.9).view(3, 7)
SUFFIX = torch.tensor([2, 5])
FIRST = [-0.03393, -0.0251, 0.01495, 0.03641, 0.01257, -0.02691, -0.03291]
SECOND = [-0.02262, -0.01673, 0.00997, 0.02427, 0.00838, -0.01794, -0.02194]


class Slot:
    """Suffix, then two tokens of rest and target, as lib/attacks/gcg.py has it, and a model of one line."""

    def __init__(self):
        self.target, self.tail, self.seen = torch.tensor([1, 6, 3]), torch.tensor([4, 1, 6]), None

    @contextlib.contextmanager
    def watched_embeddings(self):
        self.seen = []
        try:
            yield self.seen
        finally:
            self.seen = None

    def logits(self, suffixes):
        embeds = TABLE[torch.cat([suffixes, self.tail.expand(len(suffixes), -1)], dim=1)]
        if self.seen is not None:
            self.seen.append(embeds.requires_grad_())
        weights = 1.0 / torch.arange(2.0, 2.0 + embeds.shape[-2])  # positions do not count alike
        return (torch.tanh((embeds * weights[:, None]).cumsum(-2)) @ HEAD)[:, -len(self.target) :]

    def by_token(self, slope):
        return slope @ TABLE.T


def test_shape():
    slopes = stage.gradient(Slot(), SUFFIX)
    rows = isinstance(slopes, torch.Tensor) and slopes.shape == (2, 7)
    ensure(rows, "the result has not a row for each token of the suffix alone, a column for each word")


def test_values():
    thrice = [3 * x for x in FIRST + SECOND]
    slips = {
        "the sign: where it is negative, that token lowers the loss": [-x for x in FIRST + SECOND],
        "the loss is the sum over the target's tokens: `losses` takes the mean": thrice,
    }
    near(stage.gradient(Slot(), SUFFIX), FIRST + SECOND, "the gradient is wrong", slips)


### BEGIN HIDDEN
def test_nothing_is_left_behind():
    slot = Slot()
    stage.gradient(slot, SUFFIX)
    ensure(slot.seen is None, "the embeddings are still watched afterwards: use `with`")
    again = stage.gradient(slot, SUFFIX.flip(0))
    near(stage.gradient(slot, SUFFIX.flip(0)), again, "two gradients at one place are not the same")
    ensure(not again.requires_grad, "the result still hangs on its graph")


### END HIDDEN
