"""The plan before a run: memory by the formula against what autograd really keeps, and the rehearsal."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from stages import RL, SFT, rl_flags, run_here, sft_flags, write_data
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lib import UserError
from lib.policy import token_logprobs
from lib.run import plan
from lib.run import rehearsal as dry_run
from lib.run.hub import load_policy
from lib.run.plan import Need, Shape
from lib.run.presets import paper
from lib.run.processes import Processes
from lib.sandbox import world

SIZES = dict(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=512,
)
# Qwen2.5-1.5B and -7B, by their published configurations
QWEN_1_5B = Shape(1_543_714_304, 28, 1536, 1536, 256, 8960, 12, 151936)
QWEN_7B = Shape(7_615_616_512, 28, 3584, 3584, 512, 18944, 28, 152064)
PAPER = Need(
    16384, longest=4608, sample_tokens=65536, reference=True, dtype="bfloat16"
)  # without checkpoints


def kept_bytes(model, ids: torch.Tensor, dtype: str) -> int:
    """What the backward pass of a micro-batch keeps, but for weights and logits: each memory once."""
    seen: dict[int, int] = {}
    alive = []
    skip = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        weight_copy = t.ndim == 2 and t.dtype == torch.bfloat16 and t.shape[0] != ids.numel()
        if (
            t.untyped_storage().data_ptr() not in skip
            and t.shape[-1] != model.config.vocab_size
            and not weight_copy
        ):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)  # so that no later tensor gets its memory
        return t

    mask = torch.ones_like(ids, dtype=torch.bool)
    completion = mask.clone()
    completion[:, 0] = False
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            token_logprobs(model, ids, mask, completion, with_entropy=True)
    return sum(seen.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_activations_are_what_autograd_keeps(tmp_path, kind, dtype, checkpointing):
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES))
    )
    model.save_pretrained(tmp_path)
    shape = plan.shape_of(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    model = load_policy(tmp_path, device="cpu", gradient_checkpointing=checkpointing)
    ids = torch.randint(97, (4, 200))
    expected = plan.activation_bytes(shape, Need(ids.numel(), dtype=dtype, checkpointing=checkpointing))
    if checkpointing:  # beside it, one layer in full, when its turn in the backward pass comes
        one, none = (
            plan.activation_bytes(dataclasses.replace(shape, layers=n), Need(ids.numel(), dtype=dtype))
            for n in (1, 0)
        )
        expected -= one - none
    assert kept_bytes(model, ids, dtype) == pytest.approx(expected, rel=0.08)


def test_more_gpus_shards_and_checkpoints_take_less():
    base = plan.memory(QWEN_7B, PAPER)
    assert base["weights"] == base["gradients"] == 4 * QWEN_7B.parameters and base["peak"] == max(
        base["sampling"], base["training"]
    )
    sharded = plan.memory(QWEN_7B, dataclasses.replace(PAPER, processes=4, shard=True))
    assert sharded["AdamW"] == base["AdamW"] / 4 and sharded["peak"] < base["peak"]
    light = plan.memory(QWEN_7B, dataclasses.replace(PAPER, checkpointing=True))
    assert light["activations"] < base["activations"] / 4 and light["KV cache"] == base["KV cache"]
    away = plan.memory(QWEN_7B, dataclasses.replace(PAPER, processes=4, shard=True, offload=True))
    assert away["weights"] == away["AdamW"] == away["reference"] == 0


@pytest.mark.parametrize(
    "shape, gpus, size, change",
    [
        (QWEN_1_5B, 1, 80, "--max-batch-tokens 8192"),
        (QWEN_1_5B, 4, 48, "--gradient-checkpointing"),
        (QWEN_7B, 4, 80, "--gradient-checkpointing --shard"),
        (QWEN_7B, 1, 24, "nothing does: take more or larger GPUs, or a smaller model"),
    ],
)
def test_the_smallest_change_that_fits(shape, gpus, size, change):
    need, limit = dataclasses.replace(PAPER, processes=gpus), (1 - plan.SPARE) * size * plan.GB
    assert plan.memory(shape, need)["peak"] > limit
    assert plan.smallest_change(shape, need, limit) == change


@pytest.mark.parametrize(
    "shape, gpus, size, change",  # what README says of `03 --preset paper --dry-run`
    [
        (QWEN_1_5B, 1, 80, "fits"),
        (QWEN_1_5B, 4, 48, "--shard"),  # for the sake of the judges
        (QWEN_7B, 4, 80, "--shard --offload"),
    ],
)
def test_the_papers_settings_on_the_papers_machines(shape, gpus, size, change):
    stage = importlib.import_module(RL)
    names = {field.name for field in dataclasses.fields(stage.Settings)}
    settings = stage.Settings(**{key: value for key, value in paper.RL.items() if key in names})
    need = settings.need(settings.max_prompt_tokens + settings.max_new_tokens, gpus)
    need, limit = (
        dataclasses.replace(need, beside=2 * 8.6e9),
        (1 - plan.SPARE) * size * plan.GB,
    )  # Qwen3Guard, GRM of 8 B
    if plan.memory(shape, need)["peak"] <= limit:
        assert change == "fits"
    else:
        assert plan.smallest_change(shape, need, limit) == change


def test_machines_are_read():
    assert plan.read_machine("4x48") == (4, 48e9)
    for text in ("4", "x80", "0x80", "4x", "4xbig", "4x-1", "4xnan", "4xinf", "4x1e300"):
        with pytest.raises(UserError, match="GPUSxGIGABYTES"):
            plan.read_machine(text)


def test_a_plan_is_printed_for_a_folder(capsys):
    def need(gpus: int) -> Need:
        return Need(1024, sample_tokens=2048, reference=True, processes=gpus)

    dry_run.plan("2x1", str(world.BASE), need, [str(world.BASE), "no-such-judge"], disk=4)
    out = capsys.readouterr().out
    assert "on 2 x 1 GB" in out and "fits, with 0.9" in out and "a folder here" in out
    assert "no-such-judge: its configuration cannot be read here, so it is not counted" in out


def test_the_rehearsal_changes_nothing():
    model, reference = load_policy(world.BASE, device="cpu"), load_policy(world.BASE, device="cpu")
    before, numbers = [p.clone() for p in model.parameters()], torch.get_rng_state()
    need = Need(256, longest=64, sample_tokens=512, reference=True)
    dry_run.rehearse(model, reference, need, prompt_tokens=10, processes=Processes(0, 1, 0))
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(numbers, torch.get_rng_state())


@pytest.mark.parametrize(
    "stage, words, seen",
    [
        (
            "01_build_mixture",
            ["--preset", "paper", "--trace-model", str(world.BASE)],
            ["allenai/wildjailbreak", "gated", "KV cache"],
        ),
        ("02_sft_warmstart", ["--dry-run", "1x1"], ["peak of training", "fits"]),
        (
            "03_rl_train",
            ["--model", str(world.BASE), "--dry-run", "4x1"],
            ["peak of sampling", "peak of training", "fits"],
        ),
        ("04_attack_eval", ["--models", f"base={world.BASE}"], ["KV cache", "fits"]),
    ],
)
def test_every_stage_plans_without_data_or_output(tmp_path, monkeypatch, capsys, stage, words, seen):
    words = [*words, "--out", str(tmp_path / "out"), *([] if "--dry-run" in words else ["--dry-run", "1x1"])]
    run_here(stage, words, monkeypatch)
    out = capsys.readouterr().out
    assert all(text in out for text in seen) and not (tmp_path / "out").exists()


def test_one_step_is_measured_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    data = write_data(tmp_path / "data")
    for stage, flags, seen in ((SFT, sft_flags, "one update: "), (RL, rl_flags, "one step: sampling ")):
        run_here(stage, flags(data, tmp_path / stage, dry_run="here"), monkeypatch)
        out = capsys.readouterr().out
        assert seen in out and " hours" in out and not (tmp_path / stage).exists()
