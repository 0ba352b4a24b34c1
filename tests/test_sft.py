"""Stage 2: what is learned and what is not, the early stop, processes, and resume."""

from __future__ import annotations

import importlib
import random
import time

import pytest
import stages
import torch
from stages import (
    SFT,
    kill_9,
    launch,
    metrics_of,
    run_group,
    run_here,
    run_process,
    same_run,
    sft_flags,
    wait_for_lines,
)

from lib.chat import encode_prompt
from lib.run import shards as sharding
from lib.run.files import read_jsonl, write_jsonl
from lib.run.hub import load_policy, load_tokenizer
from lib.run.processes import Processes
from lib.sandbox import world

stage = importlib.import_module(SFT)
ALONE = Processes(0, 1, 0)


def random_examples(count: int = 6) -> list:
    """Prompts of 2 to 9 tokens, 1 to 12 tokens to learn."""
    rng, examples = random.Random(0), []
    for _ in range(count):
        prompt, completion = rng.randint(2, 9), rng.randint(1, 12)
        ids = [rng.randrange(3, 97) for _ in range(prompt + completion)]
        examples.append(stage.Example(ids, [False] * prompt + [True] * completion))
    return examples


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_loss_is_cross_entropy_of_reasoning_and_answer_without_the_prompts_labels(tiny_model):
    """transformers' own loss with the label -100 on each prompt token: what such a label says cannot matter."""
    examples, settings = random_examples(), stage.Settings(max_batch_tokens=48, max_grad_norm=0.0)
    total = torch.zeros(())
    for example in examples:
        labels = torch.tensor(
            [[i if learned else -100 for i, learned in zip(example.ids, example.mask, strict=True)]]
        )
        total = total + tiny_model(torch.tensor([example.ids]), labels=labels).loss * sum(example.mask)
    expected_loss = total / sum(sum(e.mask) for e in examples)
    expected_loss.backward()
    expected = gradient(tiny_model)
    optimizer = torch.optim.SGD(tiny_model.parameters())
    loss, norm = stage.train_step(tiny_model, optimizer, examples, 0, settings, ALONE)
    assert loss == pytest.approx(expected_loss.item(), abs=1e-5)
    assert norm == pytest.approx(float(expected.norm()), rel=1e-4)
    assert (gradient(tiny_model) - expected).abs().max() < 1e-5


def test_neither_batch_mates_nor_padding_change_loss_or_gradient(tiny_model):
    examples, results = random_examples(), []
    for budget, pad_id, order in (
        (32, 0, examples),
        (4096, 0, examples),
        (4096, 5, examples),
        (64, 1, examples[::-1]),
    ):
        settings = stage.Settings(max_batch_tokens=budget, max_grad_norm=0.0)
        loss, _ = stage.train_step(
            tiny_model, torch.optim.SGD(tiny_model.parameters()), order, pad_id, settings, ALONE
        )
        results.append((loss, gradient(tiny_model)))
    assert all(loss == pytest.approx(results[0][0], abs=1e-5) for loss, _ in results)
    assert all((g - results[0][1]).abs().max() < 1e-5 for _, g in results)


def test_shares_of_processes_add_up_to_the_whole_batch(tiny_model, monkeypatch):
    examples, settings = random_examples(7), stage.Settings(max_grad_norm=0.0)
    optimizer = torch.optim.SGD(tiny_model.parameters())
    stage.train_step(tiny_model, optimizer, examples, 0, settings, ALONE)
    whole, total = gradient(tiny_model), torch.zeros(())
    monkeypatch.setattr(stage, "gather_objects", lambda obj, processes: [obj])
    monkeypatch.setattr(sharding, "sum_gradients", lambda model, processes: None)
    for rank in range(3):
        stage.train_step(tiny_model, optimizer, examples, 0, settings, Processes(rank, 3, rank))
        total = total + gradient(tiny_model)
    assert (total - whole).abs().max() < 1e-5


def test_examples_split_by_prompt_and_mask_all_but_the_prompt(data):
    tokenizer = load_tokenizer(world.BASE)
    records = read_jsonl(data / "sft.jsonl")
    train, held_out = stage.load_examples(stage.Settings(data=str(data), held_out_share=0.2), tokenizer, 512)
    assert (len(train), len(held_out)) == (32, 8)

    def prompts(examples) -> set[tuple]:
        return {tuple(e.ids[: e.mask.index(True)]) for e in examples}

    assert (
        len(prompts(train)) == 16 and len(prompts(held_out)) == 4 and not prompts(train) & prompts(held_out)
    )
    by_prompt = {tuple(encode_prompt(tokenizer, r["prompt"], reasoning=False)) for r in records}
    assert prompts(train) | prompts(held_out) == by_prompt
    learned = [tokenizer.decode([i for i, m in zip(e.ids, e.mask, strict=True) if m]) for e in train]
    assert all(
        text.startswith("<think>") and text.count("</think>") == 1 and "is" in text for text in learned
    )
    assert all(e.ids[-1] == tokenizer.eos_token_id and e.mask[-1] for e in train)
    again, _ = stage.load_examples(stage.Settings(data=str(data), held_out_share=0.2), tokenizer, 512)
    other, _ = stage.load_examples(stage.Settings(data=str(data), held_out_share=0.2, seed=1), tokenizer, 512)
    assert prompts(again) == prompts(train) != prompts(other)


def test_traces_that_are_too_long_are_left_out_counted_and_said(data, tmp_path, capsys):
    records = read_jsonl(data / "sft.jsonl")
    long = [
        {**records[0], "id": f"long-{i}", "prompt": f"cake {i}", "answer": "cake " * 600} for i in range(4)
    ]
    write_jsonl(tmp_path / "sft.jsonl", [*long[:2], *records, *long[2:]])
    sets = []
    for folder in (data, tmp_path):
        settings = stage.Settings(data=str(folder), held_out_share=0.2)
        sets.append(stage.load_examples(settings, load_tokenizer(world.BASE), 512))
    assert sets[0] == sets[1]  # the same split, too
    (line,) = capsys.readouterr().out.splitlines()
    assert "sft.jsonl: traces: 4 of 44 have more than the 512 tokens that fit, such as long-0 (6" in line
    assert line.endswith("left out")


def test_no_prompt_is_learned_and_held_out_in_another_dress(tmp_path):
    """The split went by the text to the letter, and the early stop by a loss on prompts that were learned."""
    tokenizer = load_tokenizer(world.BASE)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())[:20]
    rows = [
        {"prompt": p, "reasoning": "so .", "answer": w}
        for w in words
        for p in (f"how {w} ?", f"How  {w}\u200b?")
    ]
    write_jsonl(tmp_path / "sft.jsonl", [{"id": f"{i}", **row} for i, row in enumerate(rows)])
    train, held_out = stage.load_examples(
        stage.Settings(data=str(tmp_path), held_out_share=0.5), tokenizer, 512
    )
    answers = [{e.ids[-2] for e in part} for part in (train, held_out)]  # before the end of the turn
    assert [len(part) for part in (train, held_out, *answers)] == [20, 20, 10, 10] and not answers[
        0
    ] & answers[1]


def test_without_reasoning_the_answers_alone_are_learned(data):
    tokenizer = load_tokenizer(world.BASE)
    settings = stage.Settings(data=str(data), reasoning=False, held_out_share=0.0)
    train, held_out = stage.load_examples(settings, tokenizer, 512)
    learned = [[i for i, m in zip(e.ids, e.mask, strict=True) if m] for e in train]
    answers = [r["answer"] for r in read_jsonl(data / "sft.jsonl")]
    assert not held_out and [tokenizer.decode(ids[:-1]) for ids in learned] == answers
    assert not any("<think>" in tokenizer.decode(e.ids) for e in train)


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_the_early_stop_keeps_the_best_weights_and_a_light_start_learns(data, tmp_path, monkeypatch):
    out = tmp_path / "sft"
    words = sft_flags(
        data, out, learning_rate=3e-3, epochs=16, patience=2, decay=False
    )  # too hot: it overfits
    run_here(SFT, words, monkeypatch)
    lines = metrics_of(out)
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    best = held_out.index(min(held_out))
    assert len(held_out) == best + 3 < 16 and len(lines) == 4 * len(
        held_out
    )  # stopped two epochs after the best
    assert lines[-1]["loss"] < lines[0]["loss"]
    tokenizer, model = load_tokenizer(out), load_policy(out, device="cpu")
    settings = stage.Settings(data=str(data), held_out_share=0.2, max_batch_tokens=1024)
    _, examples = stage.load_examples(settings, tokenizer, 512)
    assert stage.held_out_loss(model, examples, 0, settings, ALONE) == pytest.approx(min(held_out), abs=1e-4)


def test_kills_leave_no_trace_even_around_the_early_stop(data, tmp_path):
    one, other, log, rng = (
        tmp_path / "one",
        tmp_path / "other",
        tmp_path / "log",
        random.Random(time.time_ns()),
    )
    hot = {"learning_rate": 3e-3, "epochs": 16, "patience": 2, "decay": False}
    run_process(SFT, sft_flags(data, one, **hot, save_every=1), log)
    total = len(metrics_of(one))
    assert 8 <= total < 64
    for lines in (3, total - 3, total - 1):  # the second: between a bad epoch and the one that ends the run
        process = launch(SFT, sft_flags(data, other, **hot, save_every=3), log)
        wait_for_lines(other / "metrics.jsonl", lines, process)
        if lines == 3:
            time.sleep(rng.uniform(0, 0.2))
        kill_9(process)
    run_process(SFT, sft_flags(data, other, **hot, save_every=3), log)
    assert same_run(one, other)


@pytest.mark.parametrize("size, shard", [(2, False), (2, True), (4, True)])
def test_processes_and_shards_equal_one(data, tmp_path, monkeypatch, size, shard):
    one, two, rate = tmp_path / "one", tmp_path / "two", 3e-5
    lines = [r for r in read_jsonl(data / "sft.jsonl")][
        :18
    ]  # 9 prompts, 2 held out: a last batch of 6, in halves
    write_jsonl(tmp_path / "data" / "sft.jsonl", lines)
    words = sft_flags(tmp_path / "data", two, epochs=1, learning_rate=rate, shard=shard)
    for rank, process in enumerate(run_group(SFT, words, tmp_path / "log", size)):
        process.join(stages.PATIENCE)
        assert process.exitcode == 0, (tmp_path / f"log.{rank}").read_text()
    run_here(SFT, sft_flags(tmp_path / "data", one, epochs=1, learning_rate=rate), monkeypatch)
    assert stages.same_update(one, two, world.BASE)
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a == {key: pytest.approx(value, rel=1e-4) for key, value in b.items()}
