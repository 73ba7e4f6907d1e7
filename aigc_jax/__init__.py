"""Generative models as pure functions in JAX: one file a family."""

from . import vae

__all__ = ["vae"]
__version__ = "0.1.0"
