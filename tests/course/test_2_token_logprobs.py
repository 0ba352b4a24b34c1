"""Exercise `token_logprobs`: lib/policy.py."""

import torch
from grading import ensure, near

from lib.policy import token_logprobs

ROW = [3, 8, 5, 11, 4, 7]
VALUES = [-5.561, -5.6114, -7.20755, -1.89753]  # of ROW's last four tokens
OFF_BY_ONE = [-5.94278, -4.95495, -4.27494, -2.18495]


def rows(*given):
    """Ids of rows, padded on the right; attention mask; a mask of all but the first two tokens of each."""
    ids = torch.tensor([row + [0] * (6 - len(row)) for row in given])
    seen = torch.tensor([[k < len(row) for k in range(6)] for row in given])
    return ids, seen, seen & (torch.arange(6) >= 2)


def test_values(model):
    found = token_logprobs(model, *rows(ROW))
    ensure(found.shape == (1, 6), "the result has not the shape of the ids, (B, T)")
    slips = {
        "off by one: each token is predicted by what stands before it, not by itself": OFF_BY_ONE,
        "these are probabilities, not their logarithms": [2.718281828**x for x in VALUES],
    }
    near(found[0, 2:], VALUES, "the log-probabilities of one row are wrong", slips)


def test_zero_outside_the_mask(model):
    ids, attention, learned = rows(ROW)
    learned[0, 3] = False
    found = token_logprobs(model, ids, attention, learned)
    near(found[~learned], [0.0] * 3, "where completion_mask is False the result is not 0")
    near(found[learned], [VALUES[0], *VALUES[2:]], "one token less in the mask changes the others")


### BEGIN HIDDEN
COOLER = [-7.9078, -8.05888, -10.75429, -1.89971]  # at temperature 0.6
ENTROPIES = [2.35058, 2.29628, 2.21662, 2.20132]


def test_temperature(model):
    found = token_logprobs(model, *rows(ROW), temperature=0.6)[0, 2:]
    slips = {
        "the temperature is not used": VALUES,
        "log-probabilities are divided by the temperature: it is the logits'": [x / 0.6 for x in VALUES],
    }
    near(found, COOLER, "at temperature 0.6 the values are wrong", slips)


def test_padding_changes_nothing(model):
    ids, attention, learned = rows(ROW[:4], ROW)
    found = token_logprobs(model, ids, attention, learned)
    near(found[0][learned[0]], VALUES[:2], "padding changes the values of its row")
    near(found[1][learned[1]], VALUES, "padding changes the values of other rows")


def test_gradient(model):
    found = token_logprobs(model, *rows(ROW))
    ensure(found.requires_grad, "the result has no gradient: nothing could be learned from it")
    found.sum().backward()
    norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    ensure(norms and sum(norms) > 0, "no parameter of the model gets a gradient")
    model.zero_grad()


def test_few_logits_at_a_time(model):
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // 23))
    try:
        found = token_logprobs(model, *rows(ROW, ROW[::-1]), chunk_size=3)
    finally:
        hook.remove()
    near(found[0, 2:], VALUES, "with a small chunk_size the values are wrong")
    ensure(max(seen) <= 3, "more than chunk_size rows of logits exist at a time")
    ensure(sum(seen) <= 8, "logits are computed for tokens that are not in completion_mask")


def test_entropy(model):
    pair = token_logprobs(model, *rows(ROW), with_entropy=True)
    ensure(isinstance(pair, tuple) and len(pair) == 2, "with_entropy gives a pair: values, entropies")
    slips = {"the entropy has the wrong sign": [-x for x in ENTROPIES]}
    near(pair[1][0, 2:], ENTROPIES, "the entropies are wrong", slips)
    near(pair[1][0, :2], [0, 0], "where completion_mask is False the entropy is not 0")
    ensure(not pair[1].requires_grad, "the entropy has a gradient that nobody asked for: it costs memory")
    asked = token_logprobs(model, *rows(ROW), with_entropy=True, entropy_gradient=True)[1]
    ensure(asked.requires_grad, "the entropy has no gradient, though entropy_gradient asks for it")


### END HIDDEN
