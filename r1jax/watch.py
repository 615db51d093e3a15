"""A line from every host to host 0, over which they agree to begin, learn who failed first, and end together.

A collective whose partner is gone hangs (TPU) or fails on every host at once (CPU, GPU), and then nobody says whose
fault it was. So each process holds one TCP connection to a hub, a thread of host 0: the kernel closes it when a process
dies, and its keep-alives notice a machine that is gone, whatever the main thread is busy with. The hub tells everybody
the first cause and whether the same command may get further when it is run again, and all exit. Knows sockets and
nothing of jax.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# A death makes the others fail too, and their report may be here first.
GRACE_S = 1.0
# Causes, the likeliest first: a death explains an error elsewhere, and either one explains that a collective broke.
DEATH, ERROR, DEVICE = range(3)
# For a machine that vanished without closing its connection: found after 10 + 4 x 5 seconds.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}

Facts = Mapping[str, Any]
Message = dict[str, Any]


@dataclasses.dataclass(eq=False)
class _Member:
    """What the hub knows of a host."""

    name: str = "a host that has not said its name"
    index: int = -1
    facts: Facts | None = None
    is_done: bool = False
    has_failed: bool = False
    unread: bytes = b""


def difference(members: list[tuple[str, Facts]]) -> str | None:
    """Where a host's facts differ from the first one's: which, of whom, and both values; None where all are alike."""
    (first, wanted), *others = members
    for name, facts in others:
        keys = sorted(key for key in wanted.keys() | facts.keys() if wanted.get(key) != facts.get(key))
        if keys:
            here, there = (json.dumps(one.get(keys[0], "absent")) for one in (facts, wanted))
            more = f", and {len(keys) - 1} more differ: {', '.join(keys[1:4])}" if len(keys) > 1 else ""
            return f"{name} disagrees with {first}: {keys[0]} is {here} there, {there} here{more}"
    return None


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        if hasattr(socket, option):  # not on macOS
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(connection: socket.socket, message: Message) -> None:
    with contextlib.suppress(OSError):  # it is gone, and whoever reads from it will notice
        connection.sendall(json.dumps(message).encode() + b"\n")


def _stop(cause: str, index: int = -1, again: bool = False) -> Message:
    """The hub's last word where all have to end; `index` is the host that is the cause."""
    return {"kind": "stop", "index": index, "cause": cause, "again": again}


def serve(listener: socket.socket, count: int, join_s: float) -> None:
    """The hub: until all `count` hosts are done, or one of them failed and all know it. `join_s`: to wait for all."""
    members: dict[socket.socket, _Member] = {}
    causes: list[tuple[int, int, int, str]] = []  # the likeliest kind first, then in order of arrival
    verdict_s, begin_s = 0.0, time.monotonic() + join_s

    def blame(kind: int, member: _Member, text: str) -> None:
        nonlocal verdict_s
        verdict_s = verdict_s or time.monotonic() + GRACE_S
        causes.append((kind, len(causes), member.index, f"{member.name} {text}"))
        member.has_failed = True

    def hear(member: _Member, message: Message) -> None:
        match message["kind"]:
            case "hello":
                member.index, member.name, member.facts = message["index"], message["name"], message["facts"]
                joined = sorted((m for m in members.values() if m.facts is not None), key=lambda m: m.index)
                if len(joined) == count:
                    if differs := difference([(m.name, m.facts) for m in joined]):
                        tell(_stop(differs))
                    else:
                        tell({"kind": "start", "first": joined[0].name})
            case "error":
                blame(DEVICE if message["again"] else ERROR, member, f"failed: {message['text']}")
            case "done":
                member.is_done = True

    def tell(message: Message) -> None:
        # Host 0 last: hearing it ends the process that this thread is of.
        for connection, _ in sorted(members.items(), key=lambda item: -item[1].index):
            _send(connection, message)

    def read(connection: socket.socket, member: _Member) -> None:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        *lines, member.unread = (member.unread + data).split(b"\n")
        try:
            for line in lines:
                hear(member, json.loads(line))
        except (ValueError, KeyError, TypeError):
            data = b""
        if not data:
            selector.unregister(connection)
            if member.facts is None:  # no host of ours: something that knocks on open ports
                del members[connection]
                connection.close()
            elif not member.is_done and not member.has_failed:
                blame(DEATH, member, "died (killed, out of memory, or its machine is gone)")

    with selectors.DefaultSelector() as selector, listener:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(0.2):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    _keep_alive(connection)
                    members[connection] = _Member()
                    selector.register(connection, selectors.EVENT_READ)
                else:
                    read(key.fileobj, members[key.fileobj])
            joined = {m.index for m in members.values() if m.facts is not None}
            if len(joined) < count and time.monotonic() > begin_s:
                missing = ", ".join(str(i) for i in range(count) if i not in joined)
                tell(_stop(f"of {count} hosts {missing} did not come in {join_s} s"))
                return
            if causes and time.monotonic() >= verdict_s:
                kind, _, index, cause = min(causes)
                tell(_stop(cause, index, again=kind != ERROR))
                return
            if len(joined) == count and all(m.is_done for m in members.values()):
                tell({"kind": "end"})
                return


@dataclasses.dataclass
class Line:
    """This host's connection to the hub."""

    connection: socket.socket
    index: int
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    is_mine: bool = False

    def fail(self, text: str, again: bool = False) -> None:
        """Tells the hub that this host failed; returns if that is the first cause, else the process ends meanwhile.

        `again`: whether it may get further when it is run again, such as after a device's failure.
        """
        _send(self.connection, {"kind": "error", "text": text, "again": again})
        self.ended.wait(60)

    def done(self) -> None:
        """Returns when all hosts are done."""
        _send(self.connection, {"kind": "done"})
        self.ended.wait()


def _messages(connection: socket.socket) -> Iterator[Message]:
    with contextlib.suppress(OSError), connection.makefile("rb") as lines:
        yield from map(json.loads, lines)


def join(address: tuple[str, int], index: int, name: str, facts: Facts, leave: Callable[[str, bool], Any]) -> Line:
    """Connects, waits until all hosts are there and agree on `facts`, and listens from then on.

    Args:
        name: what the others call this host.
        leave: called when the hosts disagree, one did not come, or one failed (then from another thread) with the cause
            and whether the same command may get further when it is run again; it has to end the process.

    Raises:
        OSError: the hub cannot be reached.
    """
    line = Line(socket.create_connection(address, timeout=60), index)
    line.connection.settimeout(None)
    _keep_alive(line.connection)
    _send(line.connection, {"kind": "hello", "index": index, "name": name, "facts": facts})
    heard = _messages(line.connection)
    first = next(heard, _stop("host 0 died while the hosts came together", 0, again=True))
    if first["kind"] == "stop":
        leave(first["cause"], first["again"])

    def listen() -> None:
        died = f"{first['first']} died (killed, out of memory, or unreachable)"  # and the hub with it
        last = next(heard, _stop(died, 0, again=True))
        line.is_mine = last["kind"] == "stop" and last["index"] == index
        if last["kind"] == "stop" and not line.is_mine:
            leave(last["cause"], last["again"])
        line.ended.set()

    threading.Thread(target=listen, name="watch", daemon=True).start()
    return line


def listen(count: int, join_s: float) -> int:
    """Starts the hub in a thread of this process; returns its port."""
    listener = socket.create_server(("", 0), backlog=count)
    threading.Thread(target=serve, args=(listener, count, join_s), name="watch hub", daemon=True).start()
    return listener.getsockname()[1]


def name(index: int, count: int) -> str:
    """What the hosts call one another."""
    return f"host {index} of {count} ({socket.gethostname()}, process {os.getpid()})"
