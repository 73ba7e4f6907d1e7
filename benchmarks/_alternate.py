"""Workers in processes of their own, timed in turn, so that neither side's threads or luck with the machine decide."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time


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
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
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
