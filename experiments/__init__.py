"""One script per paper result; `python -m experiments` names them."""

import os  # imported by Python itself already
import sys

# As in aigc_jax.__main__: a run folder in which a script is started stands in for no library.
if sys.argv[:1] == ["-m"] and (here := os.path.realpath(".")) != os.path.dirname(
    os.path.realpath(__path__[0])
):
    sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != here]

from aigc_jax import interrupt

interrupt.on_command_line()  # before JAX, whose import takes seconds
