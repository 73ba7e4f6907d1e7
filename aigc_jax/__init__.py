"""Generative models as pure functions in JAX: one file a family.

`aigc_jax.vae`, `aigc_jax.train` and the other modules are imported when they are first asked for (PEP 562).
"""

# No library is imported here, not even one of Python's own: the command line first takes the current directory from
# the path, so that a run folder in which it is started cannot stand in for them.
import importlib

TYPE_CHECKING = False  # type checkers take it for typing's
if TYPE_CHECKING:
    from . import core, data, ddpm, figures, gan, metrics, nn, train, transformer, vae

__all__ = ["core", "data", "ddpm", "figures", "gan", "metrics", "nn", "train", "transformer", "vae"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
