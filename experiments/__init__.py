"""One script per paper result; `python -m experiments` names them."""

from aigc_jax import interrupt

interrupt.on_command_line()  # before JAX, whose import takes seconds
