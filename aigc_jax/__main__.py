"""`python -m aigc_jax sample | evaluate | export | info | replay | plan | compare`: uses a run."""

import os  # imported by Python itself already
import sys

# Python looks in the current directory first. That may be a run folder, and no file of a run folder
# is ever imported.
if HERE := __name__ == "__main__":
    here = os.path.realpath(".")
    others = [p for p in sys.path if os.path.realpath(p or ".") != here]
    HERE = others != sys.path
    checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if here != checkout:
        sys.path[:] = others

from . import interrupt

if __name__ == "__main__":
    interrupt.on_command_line(main=True)  # before JAX, whose import takes seconds

import tyro

from . import train
from .commands import shared
from .commands.compare import compare
from .commands.plan import plan
from .commands.runs import evaluate, export, info, replay
from .commands.sample import sample
from .commands.shared import quiet_pipe, write_traceback
from .train.engine import compilation_cache

if __name__ == "__main__":  # not where experiments import it again as a module
    shared.LEFT_CURRENT_FOLDER = HERE


@quiet_pipe()
def main() -> None:
    """The command line: one line and exit code 2 for a user's mistake."""
    compilation_cache()
    try:
        commands = [sample, evaluate, export, info, replay, plan, compare]
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in commands},
            prog="python -m aigc_jax",
            description=__doc__,
        )
    except KeyboardInterrupt as e:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from e
    except BrokenPipeError:
        raise
    except (train.Refused, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e
    except Exception as e:  # nobody's mistake but ours, or no memory
        words = " ".join(f"{type(e).__name__}: {e}"[:500].split())
        print(f"error: {words} (its traceback is in {write_traceback([e])})", file=sys.stderr)
        raise SystemExit(1) from e


if __name__ == "__main__":
    main()
