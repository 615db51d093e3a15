"""What runs inside a child process of `children.KillablePool`; imports nothing heavy and never jax.

Messages from the parent are pickles, answers are lines of JSON: `"ready"` once, then `[ticket, value, seconds]` for
each item, or `{"failed": traceback}` if anything outside the items goes wrong.
"""

import importlib
import json
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def _load(path: str) -> Callable:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _silence() -> None:
    # Whatever a reward prints, without end perhaps, must reach neither the terminal nor the disk.
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)


def _answer_items(function: Callable[[Any], Any], timeout_s: float, messages: Any, send: Callable[[Any], None]) -> None:
    while True:
        try:
            batch: list[tuple[int, bytes]] = pickle.load(messages)
        except EOFError:  # the parent has closed the connection, or is gone
            return
        for ticket, payload in batch:
            # The kernel ends this process when the time is over: also inside C code, also when the parent is gone.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            # A reward may use that alarm for itself; this one, of processor time, ends what loops without a parent.
            signal.setitimer(signal.ITIMER_PROF, 1.0 + timeout_s * (os.cpu_count() or 1))
            start_s = time.perf_counter()
            value = function(pickle.loads(payload))
            seconds = time.perf_counter() - start_s
            signal.setitimer(signal.ITIMER_REAL, 0)
            send([ticket, value, seconds])


def serve(descriptor: int) -> None:
    """Answers the parent on the socket `descriptor` until it closes it, then ends the process."""
    connection = socket.socket(fileno=descriptor)

    def send(message: Any) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    try:
        messages = connection.makefile("rb")
        setup, arguments, timeout_s = pickle.load(messages)
        function = _load(setup)(*arguments)
        send("ready")
        _silence()
        _answer_items(function, timeout_s, messages, send)
    except ConnectionError:  # the parent is gone
        pass
    except BaseException:
        send({"failed": traceback.format_exc()})
    finally:
        # Not sys.exit: threads that a reward has left behind must not keep the process.
        os._exit(0)
