"""Log-probabilities against plain passes; loading and saving a model."""

from __future__ import annotations

import pytest
import reference
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib import UserError
from lib.batches import masked_batch
from lib.policy import shares_prompts, token_logprobs
from lib.run.checkpoint import save_policy
from lib.run.hub import load_policy, load_tokenizer

LENGTHS = [9, 23, 14]  # tokens of the rows; the first four of each are prompt


def batch():
    """ids, attention_mask, completion_mask, each (3, 23), padded with a token that is a word elsewhere."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]
    masks = [[i >= 4 for i in range(length)] for length in LENGTHS]
    return masked_batch(rows, masks, 7, torch.device("cpu"))


def plain(function, model, ids, attention, temperature: float = 1.0) -> torch.Tensor:
    """A function of tests/reference.py for each row alone, without padding: (tokens of all rows,)."""
    rows = [row[real].tolist() for row, real in zip(ids, attention, strict=True)]
    return torch.stack([value for row in rows for value in function(model, row, 4, temperature)])


def same(model, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two tensors (n,), and the gradients of a weighted sum of each."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    (found * weights).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("chunk_size, temperature", [(2048, 1.0), (2048, 0.6), (5, 0.6)])
def test_logprobs_entropies_and_their_gradients_are_those_of_plain_passes(
    tiny_model, chunk_size, temperature
):
    ids, attention, completion = batch()
    both = (reference.logprobs, reference.entropies)
    expected = [plain(function, tiny_model, ids, attention, temperature) for function in both]
    how = dict(temperature=temperature, chunk_size=chunk_size, with_entropy=True)
    found = token_logprobs(tiny_model, ids, attention, completion, entropy_gradient=True, **how)
    for values in found:
        assert values.shape == ids.shape and values.dtype == torch.float32 and not values[~completion].any()
    same(tiny_model, torch.cat([values[completion] for values in found]), torch.cat(expected))
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
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    same(model, token_logprobs(model, *inputs)[inputs[2]], expected)
    whole, once = inputs[0].numel(), len(prompts[0]) + sum(new) + 4  # the last prompt begins as the others
    assert shares_prompts(model) == (kind != "window") and seen == [whole if kind == "window" else once]


def test_logits_never_exceed_a_chunk(tiny_model):
    rows, saved = [], []
    tiny_model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // 97))
    inputs, total = batch(), sum(LENGTHS) - 12
    token_logprobs(tiny_model, *inputs, chunk_size=5).sum().backward()
    assert max(rows) == 5 and sum(rows) == 2 * total  # in the backward pass each chunk is computed anew
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        token_logprobs(tiny_model, *inputs, chunk_size=5)
    assert not [s for s in saved if len(s) == 2 and s[-1] == 97 and s[0] > 5]  # no logits are kept for it
    rows.clear()
    with torch.no_grad():
        token_logprobs(tiny_model, *inputs)
    assert rows == [total]


def test_an_empty_mask_is_harmless(tiny_model):
    """A process that has no rows left computes one, under shards."""
    ids, attention, completion = batch()
    nothing = token_logprobs(tiny_model, ids, attention, torch.zeros_like(completion))
    nothing.sum().backward()
    assert not nothing.any() and not any(p.grad.any() for p in tiny_model.parameters() if p.grad is not None)


def test_padding_on_the_left_is_an_error(tiny_model):
    ids, attention, completion = (x.flip(1) for x in batch())
    with pytest.raises(ValueError, match="padded on the right"):
        token_logprobs(tiny_model, ids, attention, torch.zeros_like(completion))


def test_a_model_in_shards_is_asked_to_gather_them_around_the_pass(tiny_model):
    calls, inputs = [], batch()
    expected = token_logprobs(tiny_model, *inputs)
    tiny_model.within_forward = lambda function: calls.append(1) or function(tiny_model)
    assert torch.equal(token_logprobs(tiny_model, *inputs), expected) and calls == [1]


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


@pytest.mark.parametrize("cause", ["safetensors weights: Error", "tensors are missing"])
def test_broken_weights_are_one_line(tiny_model, word_tokenizer, tmp_path, cause):
    save_policy(tiny_model, word_tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    if cause == "tensors are missing":
        weights = tiny_model.state_dict().items()
        tiny_model.save_pretrained(tmp_path, state_dict={k: v for k, v in weights if "1.mlp" not in k})
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=cause) as error:
        load_policy(tmp_path, device="cpu")
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


def test_a_tokenizer_without_a_padding_token_pads_with_eos(tmp_path, word_tokenizer):
    word_tokenizer.pad_token = None
    word_tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == load_tokenizer(tmp_path).eos_token_id == 2
