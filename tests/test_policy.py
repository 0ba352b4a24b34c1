"""Data order, micro-batches, log-probabilities against plain passes; loading and saving a model."""

from __future__ import annotations

import random

import pytest
import reference
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib import UserError
from lib.batches import epoch_order, items_of_step, masked_batch, micro_batches
from lib.policy import shares_prompts, token_logprobs
from lib.run.checkpoint import save_policy
from lib.run.hub import load_policy, load_tokenizer

# ---- batches


def test_steps_go_on_through_epochs_shuffled_by_seed_and_number():
    stream = [x for step in range(5) for x in items_of_step(range(10), step, 4, seed=3)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == [*range(10)]
    assert len({tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(-1, 3)}) == 12


def test_micro_batches_hold_every_sequence_once_within_the_budget_longest_first():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 40))]
        budget = rng.randint(max(lengths), 400)
        batches = micro_batches(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        longest = [max(lengths[i] for i in batch) for batch in batches]
        assert all(len(batch) * most <= budget for batch, most in zip(batches, longest, strict=True))
        assert longest == sorted(longest, reverse=True) and longest[0] == max(lengths)
    assert micro_batches([], 10) == [] and micro_batches([5, 5], 10) == [[0, 1]]
    with pytest.raises(UserError, match="11 tokens .*--max-batch-tokens 10"):
        micro_batches([3, 11], 10)


# ---- log-probabilities

NEW = (9, 11, 3, 10, 1)  # tokens of the completions


def batch(prompt_tokens: int = 6) -> tuple[list, list[int], tuple]:
    """Five rows, where the prompt of each begins its completion, and what `token_logprobs` takes of them.

    Four complete one prompt, the last one another that begins alike. Padding is a token that is a word, too.
    """
    tokens = torch.randint(97, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [tokens[:prompt_tokens]] * 4 + [tokens[:5] + tokens[60:64]]
    rows = [p + tokens[100 + 9 * i :][:n] for i, (p, n) in enumerate(zip(prompts, NEW, strict=True))]
    rows[1][prompt_tokens + 2] = rows[0][prompt_tokens + 2]  # alike once more, behind a difference
    masks = [[i >= len(p) for i in range(len(row))] for p, row in zip(prompts, rows, strict=True)]
    return rows, [len(prompt) for prompt in prompts], masked_batch(rows, masks, 7, torch.device("cpu"))


def windowed(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """One layer of two sees seven tokens."""
    kinds = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    config = Qwen2Config(**{**model.config.to_dict(), **kinds, "sliding_window": 7})
    other = Qwen2ForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other


HOW = [("shared", 1.0, 2048), ("shared", 0.6, 5), ("long prompt", 0.6, 2048), ("window", 1.0, 2048)]


@pytest.mark.parametrize("kind, temperature, chunk_size", [*HOW, ("checkpointing", 1.0, 2048)])
def test_logprobs_entropies_and_their_gradients_are_those_of_plain_passes_and_prompts_are_computed_once(
    tiny_model, kind, temperature, chunk_size
):
    model, seen = windowed(tiny_model) if kind == "window" else tiny_model, []
    if kind == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    rows, starts, inputs = batch(40 if kind == "long prompt" else 6)
    expected = torch.stack(
        [
            value
            for function in (reference.logprobs, reference.entropies)
            for row, start in zip(rows, starts, strict=True)
            for value in function(model, row, start, temperature)
        ]
    )
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    how = dict(temperature=temperature, chunk_size=chunk_size, with_entropy=True)
    pair = token_logprobs(model, *inputs, entropy_gradient=True, **how)
    for values in pair:
        assert values.shape == inputs[0].shape and not values[~inputs[2]].any()
    found = torch.cat([values[inputs[2]] for values in pair])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (found * weights).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * scale, rtol=1e-4)
    once = starts[0] + sum(NEW) + 4  # of the last prompt, which begins as the others
    assert seen == [inputs[0].numel() if kind == "window" else once]
    assert shares_prompts(model) == (kind != "window")


def test_logits_never_exceed_a_chunk_and_none_are_kept_for_the_backward_pass(tiny_model):
    rows, saved, (_, _, inputs) = [], [], batch()
    tiny_model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // 97))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        logprobs = token_logprobs(tiny_model, *inputs, chunk_size=5)
    assert not [s for s in saved if len(s) == 2 and s[-1] == 97 and s[0] > 5]
    logprobs.sum().backward()
    assert max(rows) == 5 and sum(rows) == 2 * sum(NEW)  # in the backward pass each chunk is computed anew


def test_an_empty_mask_is_harmless_and_padding_on_the_left_an_error(tiny_model):
    """A process that has no rows left computes one, under shards."""
    _, _, (ids, attention, completion) = batch()
    nothing = torch.zeros_like(completion)
    found = token_logprobs(tiny_model, ids, attention, nothing)
    found.sum().backward()
    assert not found.any() and not any(p.grad.any() for p in tiny_model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="padded on the right"):
        token_logprobs(tiny_model, ids.flip(1), attention.flip(1), nothing)


# ---- loading and saving


def test_a_saved_policy_is_the_same_and_quiet(tiny_model, word_tokenizer, tmp_path, capfd):
    (tmp_path / "settings.json").write_text("{}")
    for _ in range(2):  # the second time over an older one
        save_policy(tiny_model, word_tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "settings.json"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith((".bin", ".pt"))]
    loaded = load_policy(tmp_path, device="cpu")
    assert isinstance(loaded, Qwen2ForCausalLM) and not loaded.training
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert load_policy(tmp_path, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load_policy(tmp_path, device="cpu", dtype="auto").dtype == torch.float32
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_is_whole_or_not_there(tiny_model, word_tokenizer, tmp_path, monkeypatch):
    moved = []
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


def test_of_several_chat_templates_the_default_is_read_and_saved(tiny_model, word_tokenizer, tmp_path):
    """Command R and Hermes have others, for tools: transformers writes them to a folder."""
    template, base, out = word_tokenizer.chat_template, tmp_path / "base", tmp_path / "out"
    word_tokenizer.chat_template = {"default": template, "tool_use": "{{ tools }}"}
    word_tokenizer.save_pretrained(base)
    save_policy(tiny_model, load_tokenizer(base), out)
    assert load_tokenizer(out).chat_template == template
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(base)
