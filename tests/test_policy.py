"""Log-probabilities against plain passes; loading and saving a model."""

from __future__ import annotations

import pytest
import reference
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib import UserError
from lib.batches import masked_batch
from lib.policy import k3, shares_prompts, token_logprobs
from lib.run.checkpoint import save_policy
from lib.run.hub import load_policy, load_tokenizer

LENGTHS = [9, 23, 14]  # tokens of the rows; the first four of each are prompt


def batch(side: str):
    """ids, attention_mask, completion_mask, each (3, 23), padded with a token that is a word elsewhere."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((3, 23), 7)
    attention, completion = torch.zeros(3, 23, dtype=torch.bool), torch.zeros(3, 23, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        begin = 23 - length if side == "left" else 0
        ids[row, begin : begin + length] = torch.randint(97, (length,), generator=generator)
        attention[row, begin : begin + length] = True
        completion[row, begin + 4 : begin + length] = True
    return ids, attention, completion


def plain(function, model, ids, attention, temperature: float = 1.0) -> torch.Tensor:
    """A function of tests/reference.py for each row alone, without padding: (tokens of all rows,)."""
    rows = [row[real].tolist() for row, real in zip(ids, attention, strict=True)]
    return torch.stack([value for row in rows for value in function(model, row, 4, temperature)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk_size", [2048, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_entropies_and_their_gradients_are_those_of_plain_passes(
    tiny_model, side, chunk_size, temperature
):
    ids, attention, completion = batch(side)
    weights = torch.randn(2, int(completion.sum()), generator=torch.Generator().manual_seed(2))
    expected = [
        plain(f, tiny_model, ids, attention, temperature) for f in (reference.logprobs, reference.entropies)
    ]
    loss = (expected[0] * weights[0] + expected[1] * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(tiny_model.parameters()))

    how = dict(temperature=temperature, chunk_size=chunk_size, with_entropy=True)
    found = token_logprobs(tiny_model, ids, attention, completion, entropy_gradient=True, **how)
    for values, plain_values in zip(found, expected, strict=True):
        assert values.shape == ids.shape and values.dtype == torch.float32 and not values[~completion].any()
        torch.testing.assert_close(values[completion], plain_values, atol=1e-5, rtol=1e-5)
    (found[0][completion] * weights[0] + found[1][completion] * weights[1]).sum().backward()
    for parameter, gradient in zip(tiny_model.parameters(), gradients, strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * scale, rtol=1e-4)
    logprobs, entropy = token_logprobs(tiny_model, ids, attention, completion, **how)
    assert logprobs.requires_grad and not entropy.requires_grad


def windowed(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """One layer of two sees seven tokens."""
    kinds = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    config = Qwen2Config(**{**model.config.to_dict(), **kinds, "sliding_window": 7})
    other = Qwen2ForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", ["shared", "long prompt", "checkpointing", "window"])
def test_completions_of_a_prompt_compute_it_once_and_are_as_in_plain_rows(tiny_model, kind):
    model, seen = windowed(tiny_model) if kind == "window" else tiny_model, []
    if kind == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    generator, new = torch.Generator().manual_seed(3), (9, 11, 3, 10, 1)
    tokens = torch.randint(97, (200,), generator=generator).tolist()
    prompts = [tokens[: (40 if kind == "long prompt" else 6)]] * 4 + [tokens[:5] + tokens[60:64]]
    rows = [p + tokens[100 + 9 * i :][:n] for i, (p, n) in enumerate(zip(prompts, new, strict=True))]
    masks = [[i >= len(p) for i in range(len(row))] for p, row in zip(prompts, rows, strict=True)]
    inputs = masked_batch(rows, masks, 7, torch.device("cpu"))
    starts = zip(rows, map(len, prompts), strict=True)
    expected = torch.stack([x for row, start in starts for x in reference.logprobs(model, row, start)])
    weights = torch.randn(len(expected), generator=generator)
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))

    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    found = token_logprobs(model, *inputs)
    torch.testing.assert_close(found[inputs[2]], expected, atol=1e-5, rtol=1e-5)
    (found[inputs[2]] * weights).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, atol=5e-5 * scale, rtol=1e-4)
    whole, once = inputs[0].numel(), len(prompts[0]) + sum(new) + 4  # the last prompt begins as the others
    assert shares_prompts(model) == (kind != "window") and seen == [whole if kind == "window" else once]


def test_logits_never_exceed_a_chunk(tiny_model):
    rows, saved = [], []
    tiny_model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // 97))
    inputs, total = batch("right"), sum(LENGTHS) - 12
    token_logprobs(tiny_model, *inputs, chunk_size=5).sum().backward()
    assert max(rows) == 5 and sum(rows) == 2 * total  # in the backward pass each chunk is computed anew
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        token_logprobs(tiny_model, *inputs, chunk_size=5)
    assert not [s for s in saved if len(s) == 2 and s[-1] == 97 and s[0] > 5]  # no logits are kept for it
    rows.clear()
    with torch.no_grad():
        token_logprobs(tiny_model, *inputs)
    assert rows == [total]


def test_masked_positions_and_padding_do_not_matter(tiny_model):
    ids, attention, completion = batch("left")
    with torch.no_grad():
        first = token_logprobs(tiny_model, ids, attention, completion)
        ids[~attention] = 50
        assert torch.equal(first, token_logprobs(tiny_model, ids, attention, completion))
        sparse = completion & (torch.arange(23) % 3 == 0)
        picked = token_logprobs(tiny_model, ids, attention, sparse)
    torch.testing.assert_close(picked[sparse], first[sparse])


def test_a_fully_padded_row_and_an_empty_mask_are_harmless(tiny_model):
    ids, attention, completion = batch("left")
    attention[0] = completion[0] = False
    token_logprobs(tiny_model, ids, attention, completion).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tiny_model.parameters())
    tiny_model.zero_grad()
    nothing = token_logprobs(tiny_model, ids, attention, torch.zeros_like(completion))
    nothing.sum().backward()
    assert not nothing.any() and not any(p.grad.any() for p in tiny_model.parameters() if p.grad is not None)


def test_what_has_no_probability_is_an_error(tiny_model):
    for side in ("left", "right"):
        ids, attention, completion = batch(side)
        for rows in (slice(0, 1), slice(1, 2)):  # with and without padding
            with pytest.raises(ValueError, match="none before it"):
                token_logprobs(tiny_model, ids[rows], attention[rows], attention[rows])
    with pytest.raises(ValueError, match="temperature 0"):
        token_logprobs(tiny_model, ids, attention, completion, temperature=0)


def test_a_model_in_shards_is_asked_to_gather_them_around_the_pass(tiny_model):
    calls, inputs = [], batch("right")
    expected = token_logprobs(tiny_model, *inputs)
    tiny_model.within_forward = lambda function: calls.append(1) or function(tiny_model)
    assert torch.equal(token_logprobs(tiny_model, *inputs), expected) and calls == [1]


def test_k3_is_clamped_as_in_verl_with_no_gradient_beyond():
    gap = torch.tensor([0.0, 0.5, -3.0, 15.5, 40.0, -15.5, -200.0, 200.0], requires_grad=True)
    values = k3(gap)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0, 0.148721, 2.049787, 10, 10, 10, 10, 10], rel=1e-5)
    assert gap.grad.tolist() == pytest.approx([0, 0.648721, -0.950213, 0, 0, 0, 0, 0], rel=1e-5)


# ---- loading and saving


def test_a_saved_policy_is_the_same_and_quiet(tiny_model, word_tokenizer, tmp_path, capfd):
    (tmp_path / "settings.json").write_text("{}")
    save_policy(tiny_model, word_tokenizer, tmp_path)
    save_policy(tiny_model, word_tokenizer, tmp_path)  # over an older one
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "settings.json"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith((".bin", ".pt"))]
    loaded = load_policy(tmp_path, device="cpu")
    assert isinstance(loaded, Qwen2ForCausalLM) and not loaded.training
    assert loaded.config._attn_implementation == "sdpa"
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert load_policy(tmp_path, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load_policy(tmp_path, device="cpu", dtype="auto").dtype == torch.float32
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_is_whole_or_not_there(tiny_model, word_tokenizer, tmp_path, monkeypatch):
    moved = []

    def killed(source, target) -> None:
        moved.append(target.name)
        if len(moved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_policy(tiny_model, word_tokenizer, tmp_path)
    moved.clear()
    monkeypatch.setattr("os.replace", lambda source, target: moved.append(target.name))
    save_policy(tiny_model, word_tokenizer, tmp_path)
    assert moved[-1] == "config.json" and not list(tmp_path.iterdir())


def test_gradient_checkpointing_gives_the_same_gradient_without_dropout(tiny_model, word_tokenizer, tmp_path):
    tiny_model.config.attention_dropout = 0.5
    save_policy(tiny_model, word_tokenizer, tmp_path)
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = load_policy(tmp_path, device="cpu", gradient_checkpointing=checkpointing)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
        token_logprobs(model, *batch("right")).sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*gradients)
    assert len(calls) == 3  # the layer ran once without, twice with checkpointing


def pickled(folder):
    torch.save(load_policy(folder, device="cpu").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def incomplete(folder):
    model = load_policy(folder, device="cpu")
    model.save_pretrained(
        folder, state_dict={k: v for k, v in model.state_dict().items() if "1.mlp" not in k}
    )


def not_finite(folder):
    model = load_policy(folder, device="cpu")
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(folder)


BROKEN = {"safetensors": pickled, "safetensors weights: Error": cut_short, "tensors are missing": incomplete}
BROKEN |= {"logits are not finite": not_finite}


@pytest.mark.parametrize("cause", BROKEN)
def test_broken_weights_are_one_line(tiny_model, word_tokenizer, tmp_path, cause):
    save_policy(tiny_model, word_tokenizer, tmp_path)
    BROKEN[cause](tmp_path)
    with pytest.raises(UserError, match=cause) as error:
        load_policy(tmp_path, device="cpu")
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
def test_what_is_not_there_is_one_line(tmp_path, monkeypatch, load):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (tmp_path, tmp_path / "none", "no-such/model", "not a name"):
        with pytest.raises(UserError) as error:
            load(name)
        assert str(error.value).startswith(str(name)) and "\n" not in str(error.value)


def test_a_head_that_is_not_known_is_refused(word_tokenizer, tiny_model, tmp_path, monkeypatch):
    save_policy(tiny_model, word_tokenizer, tmp_path)
    forward = Qwen2ForCausalLM.forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", doubled)
    with pytest.raises(UserError, match="cannot be used here: its log-probabilities in training"):
        load_policy(tmp_path, device="cpu")


def test_a_tokenizer_pads_with_eos_and_needs_a_chat_template(tmp_path, word_tokenizer):
    word_tokenizer.pad_token = None
    word_tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == load_tokenizer(tmp_path).eos_token_id == 2
    word_tokenizer.chat_template = None
    word_tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path / "bare")
