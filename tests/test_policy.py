from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GraniteConfig, GraniteForCausalLM, Qwen2ForCausalLM

from lib import UserError
from lib.judges.language_model import existing_device
from lib.policy import token_logprobs
from lib.run.checkpoint import save_policy
from lib.run.hub import load_policy
from lib.run.processes import Processes, gather_objects, pick_device, start_processes, sum_gradients
from lib.run.state import load_state, save_state

ROOT = Path(__file__).parents[1]
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


def plain_logprobs(model, ids, attention, completion, temperature=1.0):
    """Each row alone, without padding, full logits: (tokens of all rows,) log-probabilities and entropies."""
    values, entropies = [], []
    for row in range(len(ids)):
        real = ids[row][attention[row]]
        logprobs = (model(real[None]).logits[0] / temperature).log_softmax(-1)
        wanted = completion[row][attention[row]].nonzero()[:, 0]
        values.append(logprobs[wanted - 1, real[wanted]])
        entropies.append(-(logprobs.exp() * logprobs).sum(-1)[wanted - 1])
    return torch.cat(values), torch.cat(entropies)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk_size", [2048, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_and_gradient_equal_plain_softmax(tiny_model, side, chunk_size, temperature):
    ids, attention, completion = batch(side)
    weights = torch.randn(int(completion.sum()), generator=torch.Generator().manual_seed(2))
    expected, expected_entropy = plain_logprobs(tiny_model, ids, attention, completion, temperature)
    gradients = torch.autograd.grad((expected * weights).sum(), list(tiny_model.parameters()))

    logprobs, entropy = token_logprobs(
        tiny_model,
        ids,
        attention,
        completion,
        temperature=temperature,
        chunk_size=chunk_size,
        with_entropy=True,
    )
    assert logprobs.shape == entropy.shape == ids.shape and logprobs.dtype == torch.float32
    assert not logprobs[~completion].any() and not entropy[~completion].any()
    torch.testing.assert_close(logprobs[completion], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy[completion], expected_entropy, atol=1e-5, rtol=1e-5)
    (logprobs[completion] * weights).sum().backward()
    for parameter, gradient in zip(tiny_model.parameters(), gradients, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4
        )


def test_logits_never_exceed_a_chunk(tiny_model):
    rows = []
    tiny_model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // 97))
    ids, attention, completion = batch("right")
    token_logprobs(tiny_model, ids, attention, completion, chunk_size=5).sum().backward()
    total = int(completion.sum())
    assert max(rows) == 5 and sum(rows) == 2 * total, "in the backward pass each chunk is computed anew"
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        token_logprobs(tiny_model, ids, attention, completion, chunk_size=5)
    assert not [s for s in saved if len(s) == 2 and s[-1] == 97 and s[0] > 5], "no logits are kept for it"
    rows.clear()
    with torch.no_grad():
        token_logprobs(tiny_model, ids, attention, completion)
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


def test_a_token_without_a_past_has_no_probability(tiny_model):
    for side in ("left", "right"):
        ids, attention, completion = batch(side)
        with pytest.raises(ValueError, match="none before it"):
            token_logprobs(tiny_model, ids, attention, attention)


def test_scaled_logits_are_honoured_and_unknown_heads_refused(tmp_path, monkeypatch, word_tokenizer):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = GraniteConfig(
        vocab_size=97, num_key_value_heads=2, logits_scaling=4.0, initializer_range=0.3, **sizes
    )
    model = GraniteForCausalLM(config).eval()
    ids, attention, completion = batch("right")
    expected, _ = plain_logprobs(model, ids, attention, completion)
    torch.testing.assert_close(token_logprobs(model, ids, attention, completion)[completion], expected)

    save_policy(model, word_tokenizer, tmp_path)
    load_policy(tmp_path, device="cpu")
    forward = GraniteForCausalLM.forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(GraniteForCausalLM, "forward", doubled)
    with pytest.raises(UserError, match="treats its logits"):
        load_policy(tmp_path, device="cpu")


def test_saved_and_loaded_policy_is_the_same_and_quiet(tiny_model, word_tokenizer, tmp_path, capfd):
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
    assert len(calls) == 3, "the layer ran once without, twice with checkpointing"


def test_load_errors_are_one_line(tiny_model, word_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    tiny_model.config.save_pretrained(pickled)
    torch.save(tiny_model.state_dict(), pickled / "pytorch_model.bin")
    cut = tmp_path / "cut"
    save_policy(tiny_model, word_tokenizer, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    for name in (tmp_path / "empty", tmp_path / "none", "no-such/model", pickled, cut):
        with pytest.raises(UserError) as error:
            load_policy(name, device="cpu")
        assert str(error.value).startswith(str(name)) and "\n" not in str(error.value)
    assert "model.safetensors is damaged or cut short" in str(error.value) and "has none" not in str(
        error.value
    )
    with pytest.raises(UserError, match="--dtype: given int8"):
        load_policy(cut, dtype="int8")


def test_missing_weights_are_an_error(tiny_model, word_tokenizer, tmp_path):
    state = {k: v for k, v in tiny_model.state_dict().items() if "layers.1.mlp" not in k}
    word_tokenizer.save_pretrained(tmp_path)
    tiny_model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match="tensors are missing"):
        load_policy(tmp_path, device="cpu")


def test_pick_device():
    assert pick_device("cpu", 3) == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="allowed auto"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="0 GPUs"):
            pick_device("cuda")


def test_the_attention_of_cudnn_is_off_wherever_a_gpu_is_chosen(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    try:
        for choose in (lambda: pick_device("cuda", 1), lambda: existing_device("cuda:1")):
            torch.backends.cuda.enable_cudnn_sdp(True)
            assert choose() == torch.device("cuda:1") and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_an_old_transformers_is_one_line_when_it_is_imported():
    """Before 5.24 `cache=` is ignored without a word. requirements.txt asks for as much."""
    code = "import transformers; transformers.__version__ = '5.23.4'; import lib.chat"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = "error: transformers 5.23.4 is too old: pip install 'transformers>=5.24'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    assert "transformers>=5.24\n" in (ROOT / "requirements.txt").read_text()


# ---- resuming ----


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        ids, attention, completion = batch("right")
        loss = -(token_logprobs(model, ids, attention, completion) * torch.rand(ids.shape)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def new(tiny_model):
    model = Qwen2ForCausalLM(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}]
    groups += [{"params": [p for p in model.parameters() if p.ndim == 1], "lr": 1e-2}]
    return model, torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


def test_resumed_adamw_training_is_bit_exact(tiny_model, tmp_path):
    straight, optimizer = new(tiny_model)
    train(straight, optimizer, range(6))

    model, optimizer = new(tiny_model)
    train(model, optimizer, range(3))
    path = tmp_path / "state" / "s.safetensors"
    save_state(path, {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()})

    resumed, optimizer = new(tiny_model)
    state = load_state(path)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, range(state["step"], 6))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_any_nesting_comes_back(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "numbers": {"pi": 0.1 + 0.2, "inf": float("inf"), "yes": True, "none": None, 3: "integer key"},
        "a.b/c": [shared, shared.T, shared[1:], (torch.tensor(5), [])],
        "a": {"b/c": torch.tensor([], dtype=torch.int64)},
        "half": torch.randn(3).bfloat16(),
        "tied": shared,
        "gradient": torch.ones(2, requires_grad=True),
        "text": "é",
    }
    save_state(tmp_path / "s", state)
    loaded = load_state(tmp_path / "s")
    assert loaded["numbers"] == state["numbers"] and loaded["text"] == "é" and list(loaded) == list(state)
    first, transposed, tail, (five, empty) = loaded["a.b/c"]
    assert torch.equal(first, shared) and torch.equal(transposed, shared.T) and torch.equal(tail, shared[1:])
    assert five.item() == 5 and empty == [] and isinstance(loaded["a.b/c"][3], tuple)
    assert torch.equal(loaded["half"], state["half"]) and loaded["half"].dtype == torch.bfloat16
    assert loaded["a"]["b/c"].dtype == torch.int64 and len(loaded["a"]["b/c"]) == 0
    assert torch.equal(loaded["tied"], shared)
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert sum(file.get_tensor(k).shape == (2, 3) for k in file.keys()) == 1, "tied: stored once"


def test_a_failed_save_keeps_the_old_state(tmp_path):
    save_state(tmp_path / "s", {"step": 1})
    with pytest.raises(TypeError, match="a/b: a set"):
        save_state(tmp_path / "s", {"step": 2, "a": {"b": {1}}})
    assert load_state(tmp_path / "s") == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_state_is_a_user_error(tmp_path):
    (tmp_path / "s").write_bytes(b"nonsense")
    for path in (tmp_path / "s", tmp_path / "none"):
        with pytest.raises(UserError, match="not a saved state") as error:
            load_state(path)
        assert "\n" not in str(error.value)


# ---- several processes ----


WORKER = """
import json, os, torch
from lib.run.processes import gather_objects, start_processes, sum_gradients
from lib.run.command import run_main

def main():
    processes = start_processes("cpu", timeout_s=60)
    rank = processes.rank
    layers = {"a": torch.nn.Linear(2, 3), "b16": torch.nn.Linear(2, 1).bfloat16()}
    layers["frozen"] = torch.nn.Linear(1, 1)
    layers["frozen"].requires_grad_(False)
    model = torch.nn.ModuleDict(layers)
    layers["a"].weight.grad = torch.full((3, 2), 1.0 + rank)
    if rank == 1:  # only one process has a gradient here
        layers["b16"].bias.grad = torch.full((1,), 5.0, dtype=torch.bfloat16)
    sum_gradients(model, processes)
    objects = gather_objects({"rank": rank, "text": "é" * 1000 * rank, "x": 0.1 + 0.2}, processes)
    gradients = {name: p.grad if p.grad is None else p.grad.flatten().tolist()
                 for name, p in model.named_parameters()}
    print(json.dumps([objects, gradients]), flush=True)
    gather_objects(None, processes)
    if rank == 1:
        os._exit(1)
    gather_objects(None, processes)

run_main(main)
"""


def test_two_processes_sum_and_gather_and_notice_that_one_was_killed():
    port = 20_000 + os.getpid() % 20_000
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes
        )
        for r in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    for out, err in outputs:
        objects, gradients = json.loads(out or err)
        assert objects == [{"rank": r, "text": "é" * 1000 * r, "x": 0.1 + 0.2} for r in (0, 1)]
        assert gradients == {
            "a.weight": [3.0] * 6,
            "a.bias": [0.0] * 3,
            "b16.weight": [0.0] * 2,
            "b16.bias": [5.0],
            "frozen.weight": None,
            "frozen.bias": None,
        }
    survivor = outputs[0][1]
    assert [rank.returncode for rank in ranks] == [2, 1]
    assert [line for line in survivor.splitlines() if line.startswith("error: lost another process")]
    assert "Traceback" not in survivor


FAILING = """
import time
import torch.distributed as dist
from lib.run.processes import start_processes
from lib import UserError
from lib.run.command import run_main

def main():
    start_processes("cpu", timeout_s=60)
    dist.get_backend_config = lambda: "cpu:gloo,cuda:nccl"
    dist.destroy_process_group = lambda: time.sleep(600)  # as nccl's does, which waits for the others
    raise UserError("told before it leaves")

run_main(main)
"""


def test_a_failing_process_on_gpus_leaves_without_waiting_for_the_others():
    port = 20_000 + (os.getpid() + 7) % 20_000
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING],
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for r in (0, 1)
    ]
    for rank in ranks:
        assert "error: told before it leaves" in rank.communicate(timeout=120)[1] and rank.returncode == 1


def test_one_process_needs_no_torchrun(monkeypatch, tiny_model):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = start_processes("cpu")
    assert processes == Processes(0, 1, 0)
    assert gather_objects({"a": (1, 2)}, processes) == [{"a": [1, 2]}], (
        "as it would arrive from another process"
    )
    sum_gradients(tiny_model, processes)
    assert all(p.grad is None for p in tiny_model.parameters())
