"""Figure 4: embeddings against hidden states, the SVM against its optimality conditions, invariances."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lib import UserError
from lib.chat import encode_prompt
from lib.report import separation as sep
from lib.sampler import Completion

PROMPTS = ["how ?", "maybe green soup cake please how are you ?", "are you ?", 6 * "please cake ", "soup ?"]
close = torch.testing.assert_close


def groups(n: int, d: int, distance: float, seed: int = 0, positive: float = 0.5):
    """Two round normal clouds `distance` apart along the first axis: x (n, d), y (n,)."""
    y = torch.where(torch.arange(n) < round(n * positive), 1.0, -1.0)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += distance / 2 * y
    return x, y


def test_states_are_the_last_hidden_ones_where_each_row_ends(tiny_model, word_tokenizer):
    rows = [encode_prompt(word_tokenizer, prompt, reasoning=True) for prompt in PROMPTS]
    found = sep.last_states(tiny_model, rows)
    assert found.shape == (len(PROMPTS), 32) and found.dtype == torch.float32 and not found.requires_grad
    for state, row in zip(found, rows, strict=True):
        states = tiny_model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        close(state, states[-1][0, -1], atol=1e-5, rtol=1e-5)


@pytest.fixture
def victim(monkeypatch):
    """Who thinks a text that goes by the prompt, which is a number, token by token a letter."""
    thoughts: dict[int, str] = {}

    def sample(model, rows, **how):
        texts = [thoughts.get(row[0], "on and on") for row in rows]
        return [Completion([*map(ord, text)], [0.0] * len(text), "length") for text in texts]

    monkeypatch.setattr(sep, "sample", sample)
    monkeypatch.setattr(sep, "decode", lambda tokenizer, ids: "".join(map(chr, ids)))
    monkeypatch.setattr(sep, "eos_token_ids", lambda *args: [])
    found = SimpleNamespace(model=None, tokenizer=None, reasoning=True, progress=False, thoughts=thoughts)
    found.encode, found.fits = lambda prompt: [int(prompt)], lambda ids: ids[0] < 99
    found.max_new_tokens = found.max_batch_tokens = 9
    return found


def test_the_second_place_is_the_last_token_of_the_closing_marker(victim):
    """A marker in eight tokens; none, which is left out; a second one behind it; a prompt too long."""
    victim.thoughts.update({1: "hm</think>ok", 3: "</think></think>"})
    prompts = ["1", "2", "3", "99"]
    assert sep.rows_before(victim, prompts) == [[1], [2], [3]]
    assert sep.rows_after(victim, prompts) == [[1, *map(ord, "hm</think>")], [3, *map(ord, "</think>")]]
    victim.reasoning = False
    assert sep.rows_after(victim, prompts) == []


def test_a_decision_made_in_the_reasoning_is_seen_behind_it_alone(victim, monkeypatch):
    """Eleven prompts of each group, alike before; then the thought of a harmful one says so."""

    def states(model, rows):  # what was thought, and noise
        thoughts = torch.tensor([[float(row[1] - ord("0"))] if len(row) > 1 else [0.0] for row in rows])
        return torch.cat([thoughts, 0.1 * groups(len(rows), 4, 0.0)[0]], 1)

    monkeypatch.setattr(sep, "last_states", states)
    victim.thoughts.update({i: f"{i // 50}</think>" for i in range(1, 99) if i != 11})
    harmful, safe = [[str(i) for i in range(start, start + 11)] for start in (50, 1)]
    found = sep.separations(victim, {"": harmful, "GCG": harmful[:9]}, safe)
    figures, maps = found["separation"], found["separation_map"]
    assert {place: len(points) for place, points in maps.items()} == {"before": 22, "after": 20}
    assert figures["after/accuracy"]["mean"] == 1.0 and figures["after/slack"]["mean"] < 0.1
    assert figures["before/accuracy"]["low"] < 0.5 < figures["before/accuracy"]["high"]


# ---- the SVM -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 2.0, 12.0])
@pytest.mark.parametrize("n, d, positive, c", [(60, 3, 0.5, 1.0), (61, 4, 0.4, 0.05), (30, 50, 0.3, 1.0)])
def test_svm_is_optimal_by_its_kkt_conditions(n, d, distance, positive, c):
    """Multipliers of points off the margin are 0 or c; with the w found, those on it must be in [0, c]."""
    x, y = (part.double() for part in groups(n, d, distance, positive=positive))
    weight, bias = sep.fit_svm(x, y, c)
    reach = y * (x @ weight + bias)  # (N,)
    on_margin = (reach - 1).abs() < 1e-4
    a = torch.where(reach < 1, c, 0.0).double() * ~on_margin
    signed = torch.cat([x * y[:, None], y[:, None]], 1)  # (N, d + 1): w = sum a_i y_i x_i and 0 = sum a_i y_i
    target = torch.cat([weight, torch.zeros(1).double()])
    if on_margin.any():
        missing = (target - a @ signed)[:, None]
        a[on_margin] = torch.linalg.lstsq(signed[on_margin].T, missing, driver="gelsd").solution[:, 0]
    close(a @ signed, target, atol=1e-4, rtol=0)
    assert a.min() > -1e-4 and a.max() < c + 1e-4


@pytest.mark.parametrize("x", [[[0.1, 0.1]] * 6, [[0.0], [math.nan]], [[0.0], [math.inf]]])
def test_what_has_no_scale_stops(x):
    with pytest.raises(UserError, match="all equal, or not finite"):
        sep.standardise(torch.tensor(x))


# ---- all of it ---------------------------------------------------------------------------------------------


def means(x, y) -> dict[str, float]:
    return {name: ci["mean"] for name, ci in sep.separation(x, y)[0].items()}


def test_separated_groups_and_random_labels():
    x, y = groups(60, 8, 12.0)
    figures, points = sep.separation(x, y)
    accuracy = {"mean": 1.0, "low": pytest.approx(0.94, abs=0.01), "high": 1.0, "n": 60}
    assert figures["accuracy"] == accuracy and figures["margin"]["low"] is None
    sides = torch.tensor(points)
    assert sides[:, 2].tolist() == y.tolist()
    assert (sides[:, 0].sign() * y).sum().abs() == 60  # the map's first axis is what separates them
    noise, near, far = (means(*groups(200, 3, distance)) for distance in (0.0, 8.0, 16.0))
    assert far["margin"] > near["margin"] and abs(noise["accuracy"] - 0.5) < 0.1
    assert noise["margin"] > near["margin"] and noise["slack"] > 0.8 > 0.1 > near["slack"]  # its price


def test_every_prompt_is_held_out_once():
    """Twins without a difference: a fit that has seen the other one is mostly wrong."""
    base = groups(30, 40, 0.0)[0]
    x = torch.cat([base, base + 0.1 * groups(30, 40, 0.0, seed=1)[0]])
    accuracy = sep.separation(x, torch.tensor([1] * 30 + [-1] * 30))[0]["accuracy"]
    assert accuracy["high"] < 0.5 and accuracy["n"] == 60


def test_shift_scale_and_rotation_change_nothing():
    x, y = groups(60, 5, 1.5)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()).Q
    (plain, points), (moved, moved_points) = (
        sep.separation(rows, y) for rows in (x, 1000 * (x.double() @ rotation) + 50)
    )
    assert 0.6 < plain["accuracy"]["mean"] < 1.0 and moved["accuracy"] == plain["accuracy"]
    assert all(moved[key]["mean"] == pytest.approx(plain[key]["mean"], abs=1e-4) for key in plain)
    close(torch.tensor(moved_points), torch.tensor(points), atol=2e-4, rtol=0)
