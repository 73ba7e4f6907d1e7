"""Ctrl-C on the command lines: outside of training it ends the process at once, in one line, with exit code 130.

Nothing is unwound: a KeyboardInterrupt in an import is a traceback of 200 lines, and one that falls into a callback of
JAX is swallowed. What lies on disk is what a kill leaves, from which every run resumes. This imports no JAX, so that it
is in force while JAX is imported.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading

_once = threading.Lock()


def leave(number: int = signal.SIGINT, frame=None) -> None:
    """Ends the process with one line; a handler of SIGINT."""
    if _once.acquire(blocking=False):
        try:
            shown = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides the cursor
            os.write(2, shown + b"interrupted\n")
        finally:  # nobody may read stderr any more
            os._exit(130)


def _watch(pipe: int) -> None:
    """Ends the process also while the main thread compiles: its handlers wait for the end of that."""
    asked = 0
    while True:
        for number in os.read(pipe, 64):
            if number == signal.SIGINT:
                asked += 1
                # Training has a handler of its own, for which the first is a request.
                if asked > 1 or signal.getsignal(number) is leave:
                    leave()


def _module(words: list[str]) -> str:
    """NAME of `python -m NAME`, `python -mNAME` or `python -um NAME`; empty where there is none."""
    for word, after in zip(words[1:], [*words[2:], ""], strict=True):
        if found := re.fullmatch("-[a-zA-VY]*?m(.*)", word):
            return found[1] or after
    return ""


def on_command_line(main: bool = False) -> None:
    """Takes over Ctrl-C where this process is `python -m aigc_jax` or `python -m experiments.NAME`, and only there.

    main: the caller is the module `__main__` itself. In a package above it argv[0] is still "-m".
    """
    ours = main or (sys.argv[:1] == ["-m"] and _module(sys.orig_argv).split(".")[0] in ("aigc_jax", "experiments"))
    if not ours or os.name != "posix" or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    signal.signal(signal.SIGINT, leave)
