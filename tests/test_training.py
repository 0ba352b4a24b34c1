"""Micro-batches, data order, learning rate, and progress that is saved and restored to the bit."""

from __future__ import annotations

import random

import pytest
import torch

from lib import UserError
from lib import batches as training
from lib.run import state as state_file
from lib.run.files import append_jsonl, read_jsonl
from lib.run.processes import Processes

ALONE = Processes(0, 1, 0)


def test_micro_batches_hold_every_sequence_once_within_the_budget_longest_first():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 40))]
        budget = rng.randint(max(lengths), 400)
        batches = training.micro_batches(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
        assert lengths[batches[0][0]] == max(lengths)
    assert training.micro_batches([], 10) == []
    with pytest.raises(UserError, match="11 tokens .*--max-batch-tokens 10"):
        training.micro_batches([3, 11], 10)


def test_epoch_order_is_a_shuffle_that_seed_and_epoch_decide():
    order = training.epoch_order(20, 0, 0)
    random.seed(5)  # no global generator has a say
    assert sorted(order) == list(range(20)) and training.epoch_order(20, 0, 0) == order
    assert (
        len({tuple(training.epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(-1, 3)})
        == 12
    )


@pytest.mark.parametrize(
    "warmup, decay, rates",
    [
        (0, False, [2.0, 2.0, 2.0, 2.0, 2.0]),
        (2, False, [1.0, 2.0, 2.0, 2.0, 2.0]),
        (0, True, [2.0, 1.6, 1.2, 0.8, 0.4]),
        (1, True, [2.0, 2.0, 1.5, 1.0, 0.5]),
        (8, True, [0.25, 0.5, 0.75, 1.0, 1.25]),  # it ends before it is warm
    ],
)
def test_learning_rate_of_each_step(warmup, decay, rates):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    given = [training.set_learning_rate(optimizer, 2.0, step, warmup, 5, decay) for step in range(5)]
    assert given == pytest.approx(rates)
    assert optimizer.param_groups[0]["lr"] == given[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stops_and_says_where(value, tmp_path):
    assert training.finite_or_stop("loss", 1.5, 3, tmp_path) == 1.5
    with pytest.raises(UserError, match="step 3: loss is .*before the update.*learning-rate"):
        training.finite_or_stop("loss", value, 3, tmp_path)


def test_progress_comes_back_to_the_bit_and_logs_lose_what_was_after_it(tmp_path):
    def fresh() -> tuple:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model, optimizer, steps: range) -> None:
        for step in steps:
            training.set_learning_rate(optimizer, 0.1, step, 2, 10, True)
            optimizer.zero_grad()
            model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            append_jsonl(tmp_path / "metrics.jsonl", {"step": step})

    model, optimizer = fresh()
    assert state_file.load_progress(tmp_path, model, optimizer, ALONE) == {"step": 0}
    train(model, optimizer, range(6))
    best = {name: value.clone() for name, value in model.state_dict().items()}
    state_file.save_progress(tmp_path, 6, model, optimizer, ALONE, best_loss=0.1, best=best)
    train(model, optimizer, range(6, 10))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "los')  # killed in mid-line

    other, other_optimizer = fresh()
    state = state_file.load_progress(
        tmp_path, other, other_optimizer, ALONE, ["metrics.jsonl", "absent.jsonl"]
    )
    assert state["step"] == 6 and state["best_loss"] == 0.1
    assert all(torch.equal(state["best"][name], value) for name, value in best.items())
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(6))
    train(other, other_optimizer, range(6, 10))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_folder_is_finished_once_its_resume_state_is_gone(tmp_path):
    model = torch.nn.Linear(2, 2)
    assert not state_file.is_finished(tmp_path)
    state_file.save_progress(tmp_path, 1, model, torch.optim.AdamW(model.parameters()), ALONE)
    (tmp_path / "config.json").write_text("{}")
    assert not state_file.is_finished(tmp_path)
    state_file.finish(tmp_path)
    assert state_file.is_finished(tmp_path)
    state_file.finish(tmp_path)  # again, as after a kill


def test_bfloat16_computes_in_it_and_leaves_weights_in_single_precision():
    layer, device = torch.nn.Linear(4, 4), torch.device("cpu")
    for dtype, computed in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with training.precision(device, dtype):
            out = layer(torch.ones(1, 4))
        assert out.dtype == computed and layer.weight.dtype == torch.float32
        out.sum().backward()
        assert layer.weight.grad.dtype == torch.float32
