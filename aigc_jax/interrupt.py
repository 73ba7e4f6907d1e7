"""Ctrl-C on the command lines: outside of training it ends the process at once, with exit code 130.

It prints one line and unwinds nothing. A KeyboardInterrupt during an import would print a
traceback of 200 lines, and one in a callback of JAX would be swallowed. The disk is left as after a
kill, from which every run resumes. This module imports no JAX, so that it works while JAX is
imported.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading

_exiting = threading.Lock()


def leave(number: int = signal.SIGINT, frame=None) -> None:
    """Ends the process with one line on stderr. This is the handler of SIGINT."""
    if _exiting.acquire(blocking=False):
        try:
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
            os.write(2, show_cursor + b"interrupted\n")
        finally:  # also if stderr is closed
            os._exit(130)


def _watch(pipe: int) -> None:
    """Ends the process also while the main thread compiles.

    Python runs signal handlers in the main thread, after the compilation. The pipe gets the
    signals at once.
    """
    interrupts = 0
    while True:
        for number in os.read(pipe, 64):
            if number == signal.SIGINT:
                interrupts += 1
                # Training has its own handler. It takes the first Ctrl-C as a request to stop.
                if interrupts > 1 or signal.getsignal(number) is leave:
                    leave()


def _module(arguments: list[str]) -> str:
    """Returns NAME of `python -m NAME`, `python -mNAME` or `python -um NAME`, else ""."""
    for argument, following in zip(arguments[1:], [*arguments[2:], ""], strict=True):
        if match := re.fullmatch("-[a-zA-VY]*?m(.*)", argument):
            return match[1] or following
    return ""


def on_command_line(main: bool = False) -> None:
    """Handles Ctrl-C if this process is `python -m aigc_jax` or `python -m experiments.NAME`.

    main: whether the caller is the module `__main__`. While a package above it is imported,
        argv[0] is still "-m".
    """
    if not main and sys.argv[:1] == ["-m"]:
        main = _module(sys.orig_argv).split(".")[0] in ("aigc_jax", "experiments")
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not main or os.name != "posix" or not default:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    signal.signal(signal.SIGINT, leave)
