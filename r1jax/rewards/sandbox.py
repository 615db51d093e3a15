"""Runs a program that nobody trusts, by a launcher process that lives on, so that a run costs a fork and no more.

The layers are those of `layers`: Landlock (files, TCP), seccomp (no network, no new processes), rlimits, and where the
caller is root a user per launcher that owns nothing and a file system in memory of limited size; without root the
launcher looks at the size of the folder. It bounds time and output as well and kills the whole process group. A machine
that lacks a layer is refused unless the caller accepts that. The threats are a policy that looks for a loophole and a
program that runs wild, not a kernel exploit.
"""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from r1jax.rewards import layers

OUTPUT_BYTES = 1 << 20
DISK_MB = 16
# The launcher keeps the time; this much later it is itself taken for stuck.
GRACE_S = 30.0
START_TIMEOUT_S = 120.0
_ROOT = str(pathlib.Path(__file__).resolve().parents[2])


class SandboxError(RuntimeError):
    """This machine cannot confine programs as well as the caller asks for."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a program ended.

    status: exit code, or minus the number of the signal that ended it. reason: why it was killed ("timeout", "output",
    "disk"), "died" if the launcher was lost, else "". completed: True if the end of program, tests and call was
    reached. value: what the call returned, as JSON has it.
    """

    status: int
    reason: str
    stdout: str
    stderr: str
    completed: bool
    value: Any
    wall_s: float


def check(accepts: Collection[str]) -> list[str]:
    """The layers that programs will be confined by.

    Raises:
      SandboxError: a layer is missing that is not in `accepts`.
    """
    missing = layers.missing()
    if refused := sorted(set(missing) - set(accepts)):
        raise SandboxError(
            "programs of the policy cannot be confined here: "
            + "; ".join(f"no {name} ({missing[name]})" for name in refused)
            + f". To run them all the same, set config.grading.sandbox_accepts to {tuple(refused)}"
        )
    return [name for name in layers.ALL if name not in missing and (name != "uid" or os.geteuid() == 0)]


class Sandbox:
    """A launcher process and the conversation with it; runs one program at a time. Not to be shared between threads.

    accepts: layers that may be missing on this machine. without: layers left off although they are there; for tests.
    """

    def __init__(self, accepts: Collection[str] = (), without: Collection[str] = ()) -> None:
        self._layers = [name for name in check(accepts) if name not in without]
        self._start()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path.append({_ROOT!r}); from r1jax.rewards.launcher import serve; sys.path.pop()\n"
            f"serve({theirs.fileno()}, {set(self._layers)!r})"
        )
        with theirs:
            self._process = subprocess.Popen(
                # Nothing of the user's site-packages; a fixed hash seed, so that a program's output is the same twice.
                [sys.executable, "-s", "-S", "-P", "-B", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
            )
        self._connection = ours
        self._answers = ours.makefile("rb")
        self._patience_s = START_TIMEOUT_S

    def close(self) -> None:
        """Ends the launcher and whatever it runs."""
        self._answers.close()
        self._connection.close()
        try:
            self._process.wait(timeout=5.0)  # it removes its folder
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def run(
        self,
        program: str,
        timeout_s: float,
        memory_mb: int,
        stdin: str = "",
        tests: str = "",
        call: tuple[str, Sequence[Any]] | None = None,
    ) -> Finished:
        """Runs a Python program, then, in the same process, `tests` (code) and `call` (a function and arguments).

        A call of a method of `class Solution` is meant where the program has no function of that name.
        """
        request = {"kind": "python", "program": program, "tests": tests, "call": call, "nonce": secrets.token_hex(16)}
        return self._ask(request, timeout_s, memory_mb, stdin)

    def compile_cpp(self, program: str, timeout_s: float) -> Finished:
        """Compiles a C++ program with g++; `run_binary` then runs it, as often as it is asked to, until the next one.

        Raises:
          SandboxError: there is no compiler.
        """
        if not os.path.exists("/usr/bin/g++"):
            raise SandboxError("C++ programs need /usr/bin/g++, which is not installed")
        words = ["/usr/bin/g++", "-O2", "-std=c++17", "-o", "program", "program.cpp"]
        request = {"kind": "compile", "argv": words, "files": {"program.cpp": program}, "hold": True}
        return self._ask(request, timeout_s, 1024, "")

    def run_binary(self, timeout_s: float, memory_mb: int, stdin: str, last: bool) -> Finished:
        """Runs what `compile_cpp` left; after the `last` run it is gone."""
        request = {"kind": "binary", "argv": ["./program"], "keep": True, "hold": not last}
        return self._ask(request, timeout_s, memory_mb, stdin)

    def _ask(self, request: Mapping[str, Any], timeout_s: float, memory_mb: int, stdin: str) -> Finished:
        defaults = {"files": {}, "keep": False, "hold": False, "output_bytes": OUTPUT_BYTES, "disk_mb": DISK_MB}
        limits = {"timeout_s": timeout_s, "memory_mb": memory_mb, "stdin": stdin}
        try:
            self._connection.settimeout(timeout_s + GRACE_S + self._patience_s)
            self._connection.sendall(pickle.dumps({**defaults, **limits, **request}))
            line = self._answers.readline()
            answer = json.loads(line) if line else None
        except (OSError, ValueError):
            answer = None
        if answer is None:
            self._process.kill()
            self.close()
            self._start()
            return Finished(-signal.SIGKILL, "died", "", "", False, None, 0.0)
        self._patience_s = 0.0
        stdout, stderr, result = (base64.b64decode(text) for text in answer["texts"])
        try:
            found = json.loads(result)
            completed = found["nonce"] == request["nonce"] and answer["status"] == 0 and not answer["reason"]
        except (ValueError, TypeError, KeyError):
            found, completed = {}, False
        return Finished(
            answer["status"],
            answer["reason"],
            stdout.decode("utf-8", "replace"),
            stderr.decode("utf-8", "replace"),
            completed,
            found["value"] if completed else None,
            answer["wall_s"],
        )
