"""Workers in processes of their own, timed in turn, so that neither side's threads or luck with the machine decide.

A benchmark gives `main` its workers, each a function that returns {task: a call to be timed}, and what a task holds.
Every worker has a task `product` too: PRODUCTS products of its own library's, of SIDE x SIDE float32 matrices.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

SIDE, PRODUCTS = 1024, 20
PRODUCT_FLOP = PRODUCTS * 2 * SIDE**3


class Task(NamedTuple):
    """What one timed call does."""

    updates: int
    batch: int
    flop: float  # of its matrix products and convolutions


def serve(tasks: dict) -> None:
    """A worker's loop: reads a task's name, runs it, answers with its seconds."""
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        tasks[line.strip()]()
        print(time.perf_counter() - begin, flush=True)


class Worker:
    """`python SCRIPT --worker NAME` with two threads."""

    def __init__(self, script: str, name: str, threads: int = 2):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, script, "--worker", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        assert self.process.stdout.readline().strip() == "ready", f"the worker {name} did not start"

    def time(self, task: str) -> float:
        """Seconds of one run of a task."""
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def alternate(workers: dict[str, Worker], tasks: tuple[str, ...], repeats: int) -> dict:
    """{(worker, task): median seconds} after one run that is not counted."""
    seconds: dict = {(name, task): [] for name in workers for task in tasks}
    for repeat in range(repeats + 1):
        for task in tasks:
            for name, worker in workers.items():
                taken = worker.time(task)
                if repeat:
                    seconds[name, task].append(taken)
    return {key: statistics.median(values) for key, values in seconds.items()}


def main(
    script: str, about: str, workers: dict[str, Callable[[], dict]], tasks: dict[str, Task]
) -> None:
    """Times all workers in turn and prints a table a task; ours is the first worker."""
    p = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--tasks", nargs="+", choices=tuple(tasks), default=tuple(tasks))
    p.add_argument("--worker", choices=tuple(workers))
    args = p.parse_args()
    if args.worker:
        if hasattr(
            os, "sched_setaffinity"
        ):  # XLA has no flag for its threads: it takes the cores that it may run on
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        serve(workers[args.worker]())
        return
    running = {name: Worker(script, name) for name in workers}
    medians = alternate(running, ("product", *args.tasks), args.repeats)
    for worker in running.values():
        worker.close()

    print(f"median of {args.repeats}, {os.cpu_count()} cores, Python {platform.python_version()}")
    ours, *peers = workers
    for name in args.tasks:
        task = tasks[name]
        print(f"\n{name}: {task.updates} updates of {task.batch} examples\n")
        print("| side | ms per update | GFLOP/s | own product, GFLOP/s | share of it |")
        print("| --- | --- | --- | --- | --- |")
        for side in workers:
            speed, product = (
                task.flop / medians[side, name] / 1e9,
                PRODUCT_FLOP / medians[side, "product"] / 1e9,
            )
            a_step = 1e3 * medians[side, name] / task.updates
            print(
                f"| {side} | {a_step:.2f} | {speed:.0f} | {product:.0f} | {speed / product:.2f} |"
            )
        best = min(peers, key=lambda side: medians[side, name])
        print(
            f"\n{ours} / {best}: {medians[ours, name] / medians[best, name]:.2f} of the time;",
            end=" ",
        )
        print(
            f"matrix products: XLA at {medians[best, 'product'] / medians[ours, 'product']:.2f}x PyTorch's speed"
        )
