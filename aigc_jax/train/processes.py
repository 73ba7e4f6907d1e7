"""Several processes that train one model: how they find each other, and how they end together."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
import threading
import time

import jax
import numpy as np

from .checkpoints import say
from .config import Run
from .record import Refused

SILENCE = 20  # seconds after which JAX ends the rest, such as where a machine loses its power
GRACE = 5  # seconds in which a process may end by itself, and say why
GOODBYE, FAILED = b".", b"!"


def connect(run: Run) -> None:
    """Joins the processes of a run. Call it before anything uses JAX's devices.

    With run.coordinator "auto" a TPU pod, Slurm or Open MPI say who takes part. Else the processes
    meet at the address host:port, where process 0 listens. Without a coordinator it does nothing.
    If one process is killed or fails, the others end within seconds.

    Raises Refused where they do not meet within five minutes.
    """
    if not run.coordinator or jax.distributed.is_initialized():
        return
    options = {"heartbeat_timeout_seconds": SILENCE}
    if run.coordinator != "auto":
        options |= {"num_processes": run.processes, "process_id": run.process}
        options["coordinator_address"] = run.coordinator
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as e:  # JAX's own errors of timeouts and addresses
        why = " ".join(str(e).split())[:200]
        raise Refused(
            f"run.coordinator {run.coordinator}: the processes cannot be joined: {why}"
        ) from e
    if jax.process_count() > 1:
        try:
            _watch_each_other(run.coordinator)
        except OSError as e:
            say(f"the processes cannot watch each other ({e}): if one is killed, the others wait")


def check_connected(run: Run) -> None:
    """Raises Refused where the processes of a run cannot train together."""
    count = jax.process_count()
    if run.coordinator != "auto" and run.processes not in (1, count):
        raise Refused(
            f"run.processes is {run.processes}, JAX knows {count}: call train.connect(run) before "
            "anything else uses JAX"
        )
    if count > 1 and 0 < run.devices < len(jax.devices()):
        raise Refused(
            f"run.devices is {run.devices}, but {count} processes use all their "
            f"{len(jax.devices())} devices: leave it at 0"
        )


def gathered(tree):
    """Returns arrays that lie over the devices of all processes as NumPy arrays on the host.

    All processes must call it. In a single process it returns the tree as it is.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    # One leaf after the other: each is copied to every device first.
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


# A collective that lost its partner waits, and JAX ends the process only after a long silence, by a
# trace of C++. So every process holds a connection to process 0. The system closes it at its death.


class _Self:
    """What this process knows of its own end."""

    finished = False  # the last `fit` ended well, or all processes agreed to stop


@contextlib.contextmanager
def together():
    """Marks a time in which the processes need each other: one that fails ends the others too."""
    _Self.finished = False
    yield
    _Self.finished = True


def agreed_to_stop() -> None:
    """Marks that all processes end at the same step."""
    _Self.finished = True


def failed() -> None:
    """Marks that this process ends by an error after its last `fit`, so that the others end too."""
    _Self.finished = False


def _watch_each_other(coordinator: str) -> None:
    from jax.experimental import multihost_utils

    first, about, server = jax.process_index() == 0, np.zeros(256, np.uint8), None
    if first:
        server = socket.create_server(("", 0))
        known = coordinator.rpartition(":")[0]  # of "auto": nothing
        text = f"{known or socket.gethostname()} {server.getsockname()[1]} {secrets.token_hex(16)}"
        about[: len(text)] = list(text.encode())
    about = multihost_utils.broadcast_one_to_all(about)
    host, port, token = bytes(np.asarray(about)).rstrip(b"\0").decode().split()
    if first:
        links = _accepted(server, token.encode())
    else:
        links = [socket.create_connection((host, int(port)), timeout=60)]
        links[0].sendall(token.encode())
    for link in links:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=_wait_for_the_end, args=(link,), daemon=True).start()
    atexit.register(_part, links)


def _accepted(server: socket.socket, token: bytes) -> list[socket.socket]:
    """Returns a connection to each other process; strangers do not know the token."""
    links, end = [], time.monotonic() + 60
    with server:
        while len(links) < jax.process_count() - 1:
            server.settimeout(max(0.1, end - time.monotonic()))
            link = server.accept()[0]
            link.settimeout(10)
            with contextlib.suppress(OSError):
                if link.recv(len(token), socket.MSG_WAITALL) == token:
                    links.append(link)
                    continue
            link.close()
    return links


def _wait_for_the_end(link: socket.socket) -> None:
    """Ends this process where the other one fails or is killed."""
    reply = b""
    with contextlib.suppress(OSError):
        reply = link.recv(1)
    if reply == GOODBYE:
        return
    if reply == FAILED:
        time.sleep(GRACE)  # this one may be ending for the same reason
    line = f"error: another process of the run has ended, so process {jax.process_index()} ends"
    line += "; the same commands continue from the newest checkpoint\n"
    os.write(2, line.encode())  # in one piece, among what C++ writes
    os._exit(1)


def _part(links: list[socket.socket]) -> None:
    """Tells the others at the end of this process whether they may go on."""
    for link in links:
        with contextlib.suppress(OSError):
            link.sendall(GOODBYE if _Self.finished else FAILED)
