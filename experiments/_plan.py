"""`python -m experiments plan NAME`: what the models of a script would need on devices that are not here

Only the configs of a scale are read. No data set is needed and nothing is trained.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Annotated

import jax
import numpy as np
import tyro

from aigc_jax import contrastive, ddpm, gan, train, transformer, vae
from aigc_jax.commands.plan import devices_for, report, tensor_of

from ._catalog import names

# The configs whose fields tell the shapes of a batch, and the function that makes each family.
# language.Config is missing: the length of its rows depends on the data.
MAKES: dict[type, Callable] = {
    vae.Config: vae.make,
    vae.AutoencoderConfig: vae.make_autoencoder,
    vae.VQConfig: vae.make_vq,
    gan.Config: gan.make,
    gan.CycleConfig: gan.make_cycle,
    ddpm.Config: ddpm.make,
    ddpm.TokenConfig: ddpm.make_tokens,
    ddpm.DiscreteConfig: ddpm.make_discrete,
    transformer.Config: transformer.make,
    contrastive.Config: contrastive.make,
}


def batch_of(cfg, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of what a step reads of a batch of `size` examples."""

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((size, *shape), np.dtype(dtype))

    if isinstance(cfg, transformer.Config):
        return {"tokens": rows("int32", cfg.context + 1)}
    if isinstance(cfg, ddpm.TokenConfig):
        return {"tokens": rows("int32", cfg.context)}
    if isinstance(cfg, ddpm.DiscreteConfig):
        return {"points": rows("float32", cfg.dim)}
    images = len(cfg.shape) == 3 and getattr(cfg, "levels", None) is not None
    batch = {"image" if images else "points": rows("uint8" if images else "float32", *cfg.shape)}
    if isinstance(cfg, contrastive.Config):
        batch["tokens"] = rows("int32", cfg.text.context)
    if isinstance(cfg, gan.CycleConfig):
        batch["other"] = next(iter(batch.values()))
    if getattr(cfg, "context", None) is not None:
        batch["context"] = rows("float32", *cfg.context)
    if getattr(cfg, "classes", 0):
        batch["label"] = rows("int32")
    if getattr(cfg, "binarisation", None) == "static":
        batch["index"] = rows("int32")
    return batch


def models(setup) -> dict[str, object]:
    """Returns {flag: config} of the models that a setup names."""
    fields = {f.name: getattr(setup, f.name) for f in dataclasses.fields(setup)}
    return {
        name: cfg
        for name, cfg in fields.items()
        if type(cfg) in MAKES and getattr(cfg, "vocab", 1)  # 0: no tokens, a model of numbers
    }


def plan(
    name: Annotated[str, tyro.conf.Positional],
    scale: str = "cpu",
    topology: str = "cpu:4",
    mesh: str = "",
    batch_size: int | None = None,
) -> None:
    """Compiles an update of each model of a script for devices that are not here.

    The exit code is 1 if a model does not fit.

    Args:
        name: a script, such as ddpm_cifar10.
        scale: smoke, cpu, or paper where the script has it.
        topology: cpu:N, v5e:AxB, v6e:AxB or v5p:AxBxC. All but cpu need libtpu; none needs a TPU.
            Without libtpu the CPU's plan is shown, and the exit code is 2.
        mesh: such as data=8,model=2: groups of 2 devices share each layer.
        batch_size: examples of an update, over all devices; by default the script's run.batch_size.
            A script that trains a model with another batch needs this flag.
    """
    if name not in names():
        raise train.Refused(f"there is no script {name}: python -m experiments lists all")
    scales = importlib.import_module(f"experiments.{name}").SCALES
    if scale not in scales:
        raise train.Refused(f"{name} has no scale {scale}, only {', '.join(scales)}")
    setup = scales[scale].setup
    found = models(setup)
    if not found:
        raise train.Refused(
            f"the configs of {name} do not tell the batches of its models: if it trains any, start it "
            f"at --scale {scale}, then python -m aigc_jax plan RUN with the run folders that it writes"
        )
    asked = topology
    (topology, devices), fits = devices_for(asked), True
    tensor = tensor_of(mesh, len(devices)) if mesh else setup.run.tensor
    size = setup.run.batch_size if batch_size is None else batch_size
    for flag, cfg in found.items():
        print(f"model    {flag} of {name}, scale {scale}")

        def batch(size, cfg=cfg):
            return batch_of(cfg, size)

        fits &= report(MAKES[type(cfg)], cfg, batch, size, topology, devices, tensor)
    for field in dataclasses.fields(setup):
        if hasattr(getattr(setup, field.name), "optim") and field.name not in found:
            print(f"model    {field.name} of {name} is not planned: its config tells no batch")
    if not fits:
        raise SystemExit(1)
    if topology != asked:  # nothing was said of the chips
        raise SystemExit(2)


def main(command: list[str]) -> None:
    """The command line: one line and exit code 2 for a user's mistake."""
    try:
        tyro.cli(plan, args=command, prog="python -m experiments plan")
    except (train.Refused, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e
