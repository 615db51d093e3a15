"""Over the line to host 0: they begin only if they agree, the first cause reaches all, nobody outlives a dead one."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_walls import ROOT

from r1jax import watch

# A host that does nothing but listen to the others; its third argument says how it ends.
HOST = """
import os, sys, time
from r1jax import watch
port, index, count, facts, end = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
port = port or watch.listen(count, 20)
print(port, flush=True)
def leave(cause, again):
    print("left:", cause, flush=True)
    os._exit(75 if again else 1)
line = watch.join(("localhost", port), index, watch.name(index, count), {"config.seed": facts, "x": 1}, leave)
print("begun", flush=True)
if end == "done":
    line.done()
elif end in ("error", "device"):
    line.fail("of its own", again=end == "device")
    print("failed first", flush=True)
    os._exit(3)
else:
    time.sleep(60)
"""


def hosts(ends: list[str], seeds: list[str] | None = None) -> list[subprocess.Popen]:
    """One process for each end; all have said their port."""
    started, port = [], "0"
    for index, end in enumerate(ends):
        words = [sys.executable, "-c", HOST, port, str(index), str(len(ends)), (seeds or ["0"] * 9)[index], end]
        started.append(subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        port = started[-1].stdout.readline().strip()
    return started


def ends(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    texts = [host.communicate(timeout=60)[0] for host in started]
    return [(host.returncode, text) for host, text in zip(started, texts, strict=True)]


def test_all_end_together_when_all_are_done():
    assert ends(hosts(["done"] * 3)) == [(0, "begun\n")] * 3


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_host_is_named_by_all_others_at_once(victim):
    started = hosts(["sleep"] * 4)
    for host in started:
        assert host.stdout.readline() == "begun\n"
    started[victim].send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    ended = ends(started)
    assert time.monotonic() - killed_s < 30
    assert ended.pop(victim)[0] == -9
    for code, text in ended:
        assert code == 75 and re.match(rf"left: host {victim} of 4 \(.*, process {started[victim].pid}\) died", text)


@pytest.mark.parametrize(("end", "want"), [("error", 1), ("device", 75)])
def test_the_first_failure_is_everybodys_cause_and_says_whether_to_try_again(end, want):
    first, *others = reversed(ends(hosts(["sleep", "sleep", end])))
    assert first == (3, "begun\nfailed first\n")
    for code, text in others:
        assert code == want and re.search(r"left: host 2 of 3 .* failed: of its own", text)


def test_hosts_that_disagree_do_not_begin():
    for code, text in ends(hosts(["sleep"] * 3, ["0", "0", "1"])):
        assert code == 1 and "begun" not in text
        assert re.search(r'left: host 2 of 3 .* disagrees with host 0 .*: config.seed is "1" there, "0" here$', text)


def test_a_difference_names_what_is_missing_and_how_much_more_differs():
    assert watch.difference([("a", {"x": 1}), ("b", {"x": 1})]) is None
    text = watch.difference([("a", {"x": 1, "y": 2}), ("b", {"x": 2, "z": 3})])
    assert text == "b disagrees with a: x is 2 there, 1 here, and 2 more differ: y, z"
    assert '"absent" there' in watch.difference([("a", {"y": 2}), ("b", {})])


def test_a_host_that_does_not_come_is_named():
    with pytest.raises(Left, match=r"'of 3 hosts 0, 2 did not come in 0\.5 s', False"):
        watch.join(("localhost", watch.listen(3, 0.5)), 1, "one", {}, leave)


def test_a_host_that_dies_before_all_are_there_is_a_death():
    port = watch.listen(3, 20)
    raw(port, 2).close()
    with pytest.raises(Left, match=r"'host 2 died .*', True"):
        watch.join(("localhost", port), 1, "one", {}, leave)


class Left(Exception):
    """What `leave` makes of an end."""


def leave(*given: object) -> None:
    raise Left(*given)


def raw(port: int, index: int) -> socket.socket:
    """A host that says what it is told to."""
    connection = socket.create_connection(("localhost", port))
    say(connection, kind="hello", index=index, name=f"host {index}", facts={})
    return connection


def say(connection: socket.socket, **message: object) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def test_a_broken_collective_is_not_the_cause_where_an_error_explains_it():
    left, port = [], watch.listen(3, 20)
    broken, wrong = raw(port, 0), raw(port, 2)
    line = watch.join(("localhost", port), 1, "host 1", {}, lambda *given: left.append(given))
    say(broken, kind="error", text="JaxRuntimeError: connection closed by peer", again=True)
    say(wrong, kind="error", text="ValueError: of its own", again=False)
    assert line.ended.wait(20) and left == [("host 2 failed: ValueError: of its own", False)]
    broken.close()
    wrong.close()


def test_a_death_is_the_cause_even_if_its_victims_report_first():
    left = []
    port = watch.listen(3, 20)
    stray = socket.create_connection(("localhost", port))  # somebody who scans ports
    stray.sendall(b"GET / HTTP/1.1\r\n\r\n")
    zero, dying = raw(port, 0), raw(port, 2)
    line = watch.join(("localhost", port), 1, "host 1", {}, lambda *given: left.append(given))
    failing = threading.Thread(target=line.fail, args=("JaxRuntimeError: connection closed by peer",))
    failing.start()
    time.sleep(0.3)
    dying.close()
    failing.join(20)
    assert left == [("host 2 died (killed, out of memory, or its machine is gone)", True)]
    zero.close()
    stray.close()
