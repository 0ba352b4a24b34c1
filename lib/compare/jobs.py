"""Many runs of the scripts, several at a time: each a process of its own, begun once what it needs is there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lib import UserError


@dataclass(frozen=True)
class Job:
    """A command for `python`; `check` looks at what it wrote. `name` is the folder that it writes, below OUT."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    check: Callable[[], None] = lambda: None


class Children:
    """Runs the command of a job as a process of its own, on one core; its output goes to OUT/NAME.log."""

    def __init__(self, root: Path) -> None:
        self.root, self.lock, self.stopped = root, threading.Lock(), False
        self.running: set[subprocess.Popen] = set()

    def __call__(self, job: Job) -> None:
        """Raises UserError with the command and the last lines of its output if it fails."""
        log = self.root / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            start = file.tell()
            with self.lock:
                if self.stopped:
                    return
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                child = subprocess.Popen(
                    [sys.executable, *job.command],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which then ends its children
                )
                self.running.add(child)
            code = child.wait()
        with self.lock:
            self.running.discard(child)
        if code and not self.stopped:
            said = log.read_bytes()[start:].decode("utf-8", "replace").strip().splitlines()[-5:]
            raise UserError(
                f"python {shlex.join(job.command)} failed (exit code {code}), see {log}:\n  "
                + "\n  ".join(said)
            )
        if not self.stopped:
            job.check()

    def stop(self, patience: float = 10.0) -> None:
        """End all children, and begin no others. A stage loses nothing that it had saved, whatever ends it."""
        with self.lock:
            self.stopped, children = True, list(self.running)
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                child.kill()


def run_jobs(
    jobs: Sequence[Job], run: Callable[[Job], None], stop: Callable[[], None], workers: int, bar: tqdm
) -> None:
    """Run each job after those that it names, `workers` at a time, the first ones first.

    What fails is told at once; jobs that do not need it go on, and at the end UserError says what to mend.
    """
    waiting, done = list(jobs), set[str]()
    running: dict[Future[None], Job] = {}
    failures: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                ready = [job for job in waiting if done.issuperset(job.after)]
                for job in ready[: workers - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(run, job)] = job
                if not running:
                    break  # all is done, or what is left needs what failed
                bar.set_postfix_str(", ".join(job.name for job in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        future.result()
                    except UserError as error:
                        failures.append(str(error))
                        bar.write(f"error: {error}")
                    else:
                        done.add(job.name)
                        bar.update()
        except BaseException:
            stop()
            raise
    if failures:
        left = (
            f"{len(failures)} failed, {len(waiting)} could not begin; run the same command again. The first:"
        )
        raise UserError(f"{left} {failures[0]}")
