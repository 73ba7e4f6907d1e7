"""Generative models as pure functions in JAX: one file a family."""

from . import interrupt

interrupt.on_command_line()  # before JAX, whose import takes seconds

from . import ddpm, gan, transformer, vae  # noqa: E402

__all__ = ["ddpm", "gan", "transformer", "vae"]
__version__ = "0.1.0"
