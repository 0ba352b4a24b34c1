from __future__ import annotations

import json
import math

import pytest
import torch

from lib import UserError
from lib.chat import encode_prompt
from lib.report import separation as module
from lib.report.separation import fit_svm, project, prompt_embeddings, separation, standardise

PROMPTS = [
    "how ?",
    "maybe green soup cake please how are you ?",
    "green soup ?",
    "are you ?",
    6 * "please cake ",
    "soup ?",
]


@pytest.fixture
def model(tiny_model):
    return tiny_model


@pytest.fixture
def tokenizer(word_tokenizer):
    return word_tokenizer


def groups(
    n: int, d: int, distance: float, seed: int = 0, positive: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two round normal clouds `distance` apart along the first axis: x (n, d), y (n,)."""
    y = torch.where(torch.arange(n) < round(n * positive), 1.0, -1.0)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += distance / 2 * y
    return x, y


# ---- embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [16384, 32])
def test_embeddings_are_the_last_hidden_states_of_the_last_position(
    model, tokenizer, reasoning, max_batch_tokens
):
    logits = []
    model.lm_head.register_forward_hook(lambda *_: logits.append(1))
    together = prompt_embeddings(
        model, tokenizer, PROMPTS, reasoning=reasoning, max_batch_tokens=max_batch_tokens
    )
    assert not logits and not together.requires_grad
    assert (
        together.shape == (len(PROMPTS), 32)
        and together.dtype == torch.float32
        and together.device.type == "cpu"
    )
    for row, prompt in zip(together, PROMPTS, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, prompt, reasoning=reasoning)])
        plain = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(row, plain, atol=1e-5, rtol=1e-5)


def test_embeddings_do_not_depend_on_the_batch(model, tokenizer):
    together = prompt_embeddings(model, tokenizer, PROMPTS, reasoning=True)
    alone = torch.cat([prompt_embeddings(model, tokenizer, [prompt], reasoning=True) for prompt in PROMPTS])
    backwards = prompt_embeddings(model, tokenizer, PROMPTS[::-1], reasoning=True, max_batch_tokens=40).flip(
        0
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, backwards, atol=1e-5, rtol=1e-5)
    assert torch.pdist(together).min() > 0.1  # and the comparison means something: the prompts differ


def test_a_prompt_over_the_token_budget_is_a_user_error(model, tokenizer):
    with pytest.raises(UserError, match="raise it"):
        prompt_embeddings(model, tokenizer, PROMPTS, reasoning=True, max_batch_tokens=6)


# ---- the SVM -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 0.1])
@pytest.mark.parametrize("distance", [5.0, 0.8])
def test_svm_of_two_points(c, distance):
    """a = min(c, 2 / D^2), w = a D: the plane half-way, or a softer one where the points are close."""
    direction = torch.tensor([0.6, 0.0, -0.8]).double()
    middle = torch.tensor([1.0, 2.0, 3.0]).double()
    x = torch.stack([middle + distance / 2 * direction, middle - distance / 2 * direction])
    svm = fit_svm(x, torch.tensor([1, -1]), c)
    length = min(c * distance, 2 / distance)
    torch.testing.assert_close(svm.weight, length * direction, atol=1e-5, rtol=1e-5)
    assert svm.margin == pytest.approx(2 / length, rel=1e-5)
    assert svm.decision(x).sum() == pytest.approx(0, abs=1e-5)


def test_svm_of_a_rectangle_looks_along_its_separating_side_only():
    x = torch.tensor([[2.0, 7.0], [2.0, -7.0], [-1.0, 7.0], [-1.0, -7.0]])
    svm = fit_svm(x, torch.tensor([1.0, 1.0, -1.0, -1.0]))
    torch.testing.assert_close(svm.weight, torch.tensor([2 / 3, 0.0]).double(), atol=1e-6, rtol=0)
    assert svm.margin == pytest.approx(3) and svm.bias == pytest.approx(-1 / 3)  # half-way, x = 0.5


@pytest.mark.parametrize("c, length", [(0.25, 0.5), (1.0, 1.0)])
def test_svm_with_two_groups_in_one_place(c, length):
    """Points at -1 and 1, and one of each group at 0, which costs 2 c whatever w: min w^2 / 2 + 2 c max(0, 1 - w) + 2 c."""
    svm = fit_svm(torch.tensor([[1.0], [0.0], [-1.0], [0.0]]), torch.tensor([1.0, 1.0, -1.0, -1.0]), c)
    assert svm.weight.item() == pytest.approx(length, abs=1e-5) and svm.bias == pytest.approx(0, abs=1e-5)


def test_svm_of_a_small_group_inside_a_large_one_ignores_x():
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    svm = fit_svm(torch.cat([corners, torch.zeros(1, 2)]), torch.tensor([-1, -1, -1, -1, 1]))
    assert svm.margin > 1e4 and svm.bias == pytest.approx(-1, abs=1e-4)  # loss 2 of one point, 0 of four


@pytest.mark.parametrize("distance", [0.0, 2.0, 12.0])
@pytest.mark.parametrize("n, d, positive", [(60, 3, 0.5), (61, 4, 0.4), (30, 50, 0.3)])
@pytest.mark.parametrize("c", [1.0, 0.05])
def test_svm_is_optimal_by_its_kkt_conditions(n, d, distance, positive, c):
    """From w and b alone: the multipliers of points off the margin are known, 0 or c; w must leave those on it in [0, c]."""
    x, y = groups(n, d, distance, positive=positive)
    x, y = x.double(), y.double()
    svm = fit_svm(x, y, c)
    reach = y * svm.decision(x)  # (N,)
    on_margin = (reach - 1).abs() < 1e-4
    a = torch.where(reach < 1, c, 0.0).double() * ~on_margin
    signed = torch.cat([x * y[:, None], y[:, None]], 1)  # (N, d + 1): w = sum a_i y_i x_i and 0 = sum a_i y_i
    missing = torch.cat([svm.weight, torch.zeros(1).double()]) - a @ signed
    if on_margin.any():
        a[on_margin] = torch.linalg.lstsq(signed[on_margin].T, missing[:, None], driver="gelsd").solution[
            :, 0
        ]
    torch.testing.assert_close(
        a @ signed, torch.cat([svm.weight, torch.zeros(1).double()]), atol=1e-4, rtol=0
    )
    assert a.min() > -1e-4 and a.max() < c + 1e-4
    primal = svm.weight @ svm.weight / 2 + c * (1 - reach).clamp(min=0).sum()
    dual = (
        a.sum() - (a @ signed)[:d].square().sum() / 2
    )  # of a point that `fit_svm` has not seen: a lower bound
    assert primal.item() == pytest.approx(dual.item(), rel=1e-4)


def test_svm_says_so_when_it_has_not_converged():
    x, y = groups(40, 2, 0.0)
    with pytest.raises(ArithmeticError, match="duality gap"):
        fit_svm(1e6 * x, y, c=1e9)


@pytest.mark.parametrize("y", [torch.ones(4), torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([-1.0, 1.0])])
def test_svm_wants_a_label_of_either_sign_for_each_row(y):
    with pytest.raises(ValueError, match="-1 or"):
        fit_svm(torch.randn(4, 2), y)


# ---- scale and map -----------------------------------------------------------------------------------------


def test_standardise():
    x = groups(40, 5, 3.0)[0].double()
    z = standardise(7 * x + 100)
    torch.testing.assert_close(z.mean(0), torch.zeros(5).double(), atol=1e-9, rtol=0)
    assert z.square().sum(1).mean().item() == pytest.approx(1)
    torch.testing.assert_close(standardise(z), z)
    torch.testing.assert_close(
        torch.pdist(z) / torch.pdist(z)[0], torch.pdist(x) / torch.pdist(x)[0]
    )  # the same shape


@pytest.mark.parametrize(
    "x, what", [(torch.full((6, 3), 0.1), "equal"), (torch.tensor([[0.0], [math.nan]]), "finite")]
)
def test_embeddings_without_a_scale_are_a_user_error(x, what):
    with pytest.raises(UserError, match=what) as error:
        standardise(x)
    assert "\n" not in str(error.value)


def test_project_is_the_plane_of_greatest_variance_with_fixed_signs():
    x = groups(50, 6, 0.0)[0].double() * torch.tensor([1, 5, 1, 1, 3, 1])
    points = project(x)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    torch.testing.assert_close(torch.cov(points.T), torch.diag(values[[-1, -2]]))
    expected = (x - x.mean(0)) @ vectors[:, [-1, -2]]
    torch.testing.assert_close(points.abs(), expected.abs())
    assert (points.max(0).values == points.abs().max(0).values).all()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()).Q
    torch.testing.assert_close(
        project(-x @ rotation), project(x @ rotation) * project(-x @ rotation).sign() * points.sign()
    )


# ---- all of it ---------------------------------------------------------------------------------------------


def test_separated_groups():
    x, y = groups(60, 8, 12.0)
    result = separation(x, y)
    assert result["accuracy"] == {"mean": 1.0, "low": pytest.approx(0.94, abs=0.01), "high": 1.0, "n": 60}
    assert result["n"] == 60 and result["slack"] < 0.05 and 0.5 < result["margin"] < 2.0
    assert [point[2] for point in result["points"]] == y.int().tolist()
    sides = torch.tensor(result["points"])
    assert (sides[:, 0].sign() * sides[:, 2]).sum().abs() == 60  # the map's first axis is what separates them
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_random_labels_are_at_chance_and_have_a_wide_margin_that_slack_pays_for():
    x, y = groups(200, 3, 0.0)
    noise, signal = separation(x, y), separation(*groups(200, 3, 8.0))
    assert noise["accuracy"]["low"] < 0.5 < noise["accuracy"]["high"]
    assert noise["margin"] > signal["margin"] and noise["slack"] > 0.8 > 0.1 > signal["slack"]


def test_twins_without_a_difference_are_below_chance():
    """What the docstring of `separation` warns of."""
    base = groups(30, 40, 0.0)[0]
    x = torch.cat([base, base + 0.1 * groups(30, 40, 0.0, seed=1)[0]])
    assert separation(x, torch.tensor([1] * 30 + [-1] * 30))["accuracy"]["high"] < 0.5


def test_shift_scale_and_rotation_change_nothing():
    x, y = groups(60, 5, 2.0)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()).Q
    plain, moved = separation(x, y), separation(1000 * (x.double() @ rotation) + 50, y)
    assert 0.6 < plain["accuracy"]["mean"] < 1.0
    assert moved["accuracy"] == plain["accuracy"] and moved["n"] == plain["n"]
    assert moved["margin"] == pytest.approx(plain["margin"], abs=1e-4)
    assert moved["slack"] == pytest.approx(plain["slack"], abs=1e-4)
    torch.testing.assert_close(
        torch.tensor(moved["points"]), torch.tensor(plain["points"]), atol=2e-4, rtol=0
    )


def test_further_apart_is_a_wider_margin():
    margins = [separation(*groups(60, 5, distance))["margin"] for distance in (4.0, 8.0, 16.0)]
    assert margins == sorted(margins) and margins[2] > margins[0] + 0.2


def test_same_seed_same_result_and_the_seed_deals_the_folds_only():
    x, y = groups(80, 5, 1.5)
    first = separation(x, y, seed=3)
    assert first == separation(x.clone(), y.int(), seed=3)
    others = [separation(x, y, seed=seed) for seed in range(4, 8)]
    assert any(other["accuracy"] != first["accuracy"] for other in others)
    for other in others:
        assert other | {"accuracy": 0} == first | {"accuracy": 0}


def test_folds_are_stratified_and_hold_out_every_prompt_once(monkeypatch):
    x, y = groups(44, 2, 3.0, positive=6 / 44)
    fits = []
    monkeypatch.setattr(module, "fit_svm", lambda x, y: fits.append((x, y)) or fit_svm(x, y))
    separation(x, y, folds=3)
    assert [int((labels == 1).sum()) for _, labels in fits] == [4, 4, 4, 6]
    assert [len(labels) for _, labels in fits] == [29, 29, 30, 44]
    everything = standardise(x)
    times_fitted = sum((everything[:, None] == rows[None]).all(-1).sum(1) for rows, _ in fits[:3])
    assert (times_fitted == 2).all()


@pytest.mark.parametrize("flip", [1, -1])
def test_too_few_prompts_in_a_group_is_one_clear_line(flip):
    x, y = groups(20, 3, 1.0, positive=4 / 20)
    with pytest.raises(
        UserError, match=rf"4 prompts in group \{'-+'[flip > 0]}1 do not fill 5 folds"
    ) as error:
        separation(x, flip * y)
    assert "\n" not in str(error.value)
    assert separation(x, flip * y, folds=4)["n"] == 20


def test_one_fold_is_an_error():
    with pytest.raises(ValueError, match="at least 2"):
        separation(*groups(20, 3, 1.0), folds=1)
