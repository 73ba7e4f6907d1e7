"""What the commands share: paths, whose code may be imported, the output, the seed."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from .. import train
from ..train import record as records

# A path on the command line. ~ is the user's home, even if the shell left it (--out=~/x).
Place = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(words[0]).expanduser(),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
Folder = tyro.conf.Positional[Place]


# True if `python -m aigc_jax` found the current directory on sys.path. Then modules that --import
# names may be taken from it. Set by `__main__`.
LEFT_CURRENT_FOLDER = False


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Ends quietly where nobody reads the output any more (`... | head`)."""
    if sys.stdout is None:  # `>&-`
        print("error: the standard output is closed: redirect it to /dev/null", file=sys.stderr)
        raise SystemExit(2)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                os.dup2(nowhere, stream.fileno())
        raise SystemExit(128 + 13) from None  # the exit code of SIGPIPE
    except OSError as e:  # a full disk
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e.__context__, SystemExit) and e.__context__.code:  # said already
            raise SystemExit(e.__context__.code) from None
        print(f"error: the output cannot be written: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def write_traceback(errors: Sequence[BaseException], file: Path | None = None) -> Path:
    """Writes tracebacks into a file, by default a new temporary one, and returns its path."""
    text = "\n".join("".join(traceback.format_exception(e)) for e in errors)
    if file is None:
        handle, name = tempfile.mkstemp("-error.txt", "aigc_jax-")
        os.close(handle)
        file = Path(name)
    file.write_text(text, errors="backslashreplace")
    return file


Trust = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="import", metavar="MODULE")
]


def load_run(run_folder: Path, trust: tuple[str, ...]) -> train.Result:
    """Loads a run; `trust` are the modules that the user named with --import."""
    return train.load(run_folder, trust=trusted(trust))


def trusted(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the modules, and lets them be imported from the current directory."""
    records.BESIDE[:] = [os.getcwd()] if modules and LEFT_CURRENT_FOLDER else []
    return modules


def check_seed(seed: int) -> None:
    """Raises Refused for a seed that JAX would not take."""
    if not 0 <= seed < 2**32:
        raise train.Refused(f"seed must lie in 0..2**32 - 1, got {seed}")
