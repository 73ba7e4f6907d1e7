"""The models that come with the package: the files weights/NAME.safetensors, and their headers."""

from __future__ import annotations

from pathlib import Path

from .record import Refused

WEIGHTS = Path(__file__).parents[1] / "weights"


def shipped() -> list[str]:
    """Returns the names of the models that come with the package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors") if "record" in header(path))


def file_of(name: str) -> Path:
    """Returns the file of a model that comes with the package."""
    return WEIGHTS / f"{name}.safetensors"


def header(file: Path) -> dict:
    """Returns the texts in the header of a .safetensors file; raises Refused for a broken one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise Refused(f"{file} is damaged: {e}") from e
