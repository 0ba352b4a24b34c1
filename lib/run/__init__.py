"""The plumbing of all chapters behind one object, `run`: what is not a chapter's lesson.

    settings, run = start(Settings, "rl")    flags and preset; OUT claimed or resumed; processes, device
    run.model(path)                          loaded, maybe in shards, maybe recomputing activations
    run.usable(items, model, ...)            those that fit the context; says what is left out
    run.rehearse(policy, reference, ...)     the largest batch once: what does not fit memory ends now
    run.begin(), stop()                      takes OUT, where no `steps` does; leaves the other processes
    run.share(items), gather(x), total(x)    this process's part; lists and sums over all processes
    run.micro_batches(items, ...)            padded tensors under a budget of tokens
    run.sampling(policy)                     while it lasts, shards are gathered
    run.backward(loss)                       adds the gradient; the whole loss is the sum over all processes
    run.clip_and_step(optimizer, loss)       summed over processes, clipped; stops at what is not finite
    run.steps(total, policy, optimizer)      the loop: resumes, sets the rate, shows a bar, saves
    run.lap(name), say(text)                 the time of a part of the step; a line, once for all processes
    run.weights(model)                       a copy of all weights, for `run.state`, which resume points keep
    run.log(step, metrics, rollouts)         metrics.jsonl, rollouts.jsonl
    run.finish(policy, tokenizer, draw)      the checkpoint, and the next command

On one device each is a line or nothing. You may skip this room: a chapter reads the same without it. Inside:
plumbing (`Run`, rate, rehearsal), settings and presets (one module a preset), command (flags, ends in one
line), folder (claims, locks), files (atomic writes, logs), text, hub (opening a model), writing (what it
writes), processes (several GPUs, shards), checkpoint (resuming; what others need of it), data (chapter
3's prompts and rollouts).
Tests: tests/test_run.py, and runs of whole stages in tests/test_rl.py and tests/test_sft.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from lib import UserError
from lib.run.command import run_main
from lib.run.settings import parse_settings

__all__ = ["run_main", "start"]
S = TypeVar("S")


def start(
    cls: type[S], *stages: str, argv: Sequence[str] | None = None, alone: bool = False
) -> tuple[S, Any]:
    """The settings of a stage, and its `Run`: what can be refused is refused here, before anything is loaded.

    `stages` are those of `parse_settings`. `alone`: it knows no torchrun. A run that is finished says so, and
    ends. Raises UserError.
    """
    settings = parse_settings(cls, *stages, argv=argv)
    from lib.run.plumbing import Run  # torch: not before the command line is understood

    run = Run(settings, stages)
    run.join()
    if alone and run.size > 1:
        raise UserError("torchrun: this command runs as one process; start it with python")
    return settings, run
