"""Several processes that train one model: how they find each other, and how they end together."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading

import jax
import numpy as np

from .config import Run
from .record import Refused

SILENCE = (
    20  # seconds after which JAX itself ends the rest, such as where a machine loses its power
)
GOODBYE = b"."


def connect(run: Run) -> None:
    """Joins the processes of a run. Call it before anything uses JAX's devices.

    With run.coordinator "auto" a TPU pod, Slurm or Open MPI say who takes part. Else the processes
    meet at the address host:port, where process 0 listens. It does nothing for a single process.
    If one process is killed, the others end at once.

    Raises Refused where they do not meet within five minutes.
    """
    if not run.coordinator or jax.distributed.is_initialized():
        return
    options = {"heartbeat_timeout_seconds": SILENCE, "shutdown_timeout_seconds": SILENCE}
    if run.coordinator != "auto":
        options |= {"num_processes": run.processes, "process_id": run.process}
        options["coordinator_address"] = run.coordinator
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as e:  # JAX's own errors of timeouts and addresses
        why = " ".join(str(e).split())[:200]
        raise Refused(
            f"run.coordinator {run.coordinator}: the processes did not meet: {why}"
        ) from e
    if jax.process_count() > 1:
        _watch_each_other()


def check_connected(run: Run) -> None:
    """Raises Refused where `connect` was not called, or the run has another number of processes."""
    if run.coordinator != "auto" and run.processes not in (1, jax.process_count()):
        raise Refused(
            f"run.processes is {run.processes}, JAX knows {jax.process_count()}: call "
            "train.connect(run) before anything else uses JAX"
        )


def gathered(tree):
    """Returns arrays that lie over the devices of all processes as arrays of this process.

    All processes must call it. In a single process it returns the tree as it is.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    whole = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_put(whole, jax.local_devices()[0])


# A collective that lost its partner waits, and JAX ends the process only after a long silence, by a
# trace of C++. So every process holds a connection to process 0. The system closes it at its death.

_goodbye = True  # whether this process says so before it ends


def _watch_each_other() -> None:
    from jax.experimental import multihost_utils

    first, server = jax.process_index() == 0, None
    address = np.zeros(256, np.uint8)
    if first:
        server = socket.create_server(("", 0))
        text = f"{socket.gethostname()} {server.getsockname()[1]}".encode()
        address[: len(text)] = list(text)
    address = multihost_utils.broadcast_one_to_all(address)
    if first:
        links = [server.accept()[0] for _ in range(jax.process_count() - 1)]
        server.close()
    else:
        host, port = bytes(np.asarray(address)).rstrip(b"\0").decode().split()
        links = [socket.create_connection((host, int(port)))]
    for link in links:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=_wait_for_the_end, args=(link,), daemon=True).start()
    atexit.register(_say_goodbye, links)


def _wait_for_the_end(link: socket.socket) -> None:
    """Ends this process where the other end of the link closes without a goodbye."""
    said = b""
    with contextlib.suppress(OSError):
        said = link.recv(1)
    if said != GOODBYE:
        line = f"error: another process of the run has ended, so process {jax.process_index()} ends"
        line += "; the same commands continue from the newest checkpoint\n"
        os.write(2, line.encode())  # in one piece, among what C++ writes
        os._exit(1)


def _say_goodbye(links: list[socket.socket]) -> None:
    for link in links if _goodbye else ():
        with contextlib.suppress(OSError):
            link.sendall(GOODBYE)


@contextlib.contextmanager
def ends_together():
    """Lets an error of one process end the others too; they could only wait for it."""
    global _goodbye
    try:
        yield
    except Exception:
        _goodbye = False
        raise
