"""Strictness for every test: 8 virtual devices, no silent rank promotion, no reused key, shapes checked."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("aigc_jax", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


def pytest_collection_modifyitems(config, items):
    if "soak" not in config.getoption("-m"):
        skip = pytest.mark.skip(reason="takes minutes: make soak")
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(skip)
