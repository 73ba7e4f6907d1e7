"""Strictness for every test: 8 virtual devices, no silent rank promotion, no reused key, shapes checked."""

import atexit
import ctypes
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Small models compile longer than they run: LLVM without optimization takes 40 % off the contract suite. Tests in
# processes of their own (kills, command line, README) run what users run.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1"  # two workers have two cores: threads only cost
)

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("aigc_jax", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.devices()  # before a test of `plan` asks for another number of them

# Many tests train the same small model: what one compiled serves the next, within this run of pytest alone.
if "AIGC_TEST_CACHE" not in os.environ:
    os.environ["AIGC_TEST_CACHE"] = tempfile.mkdtemp(prefix="aigc-test-cache-")
    atexit.register(shutil.rmtree, os.environ["AIGC_TEST_CACHE"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["AIGC_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


# A shell ignores Ctrl-C in what it starts in the background, nohup ignores SIGHUP, and children
# inherit that: the tests that send them would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

MEMORY = Path("/proc/self/statm")  # of Linux; elsewhere nothing is freed early
LIMIT = 3 * 2**29  # bytes: 1.5 GiB


def resident():
    """Bytes of memory that this process holds."""
    return int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if MEMORY.exists() else 0


def trim():
    """Gives back to the system what LLVM has left free on the heap (glibc keeps it)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(autouse=True)
def bounded_memory():
    """Keeps a worker near 1.5 GiB: frees the heap after a test, and compiled functions where that is not enough."""
    yield
    if resident() > LIMIT:
        trim()
    if resident() > LIMIT:
        jax.clear_caches()
        trim()


def pytest_collection_modifyitems(config, items):
    if "soak" not in config.getoption("-m"):
        skip = pytest.mark.skip(reason="takes minutes: make soak")
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(skip)
