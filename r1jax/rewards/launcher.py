"""The process that starts programs of a model, one at a time, and watches over each until it is gone.

It is small, has one thread, an empty environment and nothing of the trainer in its memory, so that a fork of it is
safe and tells the program nothing; expected results never come here, except for tests that are code themselves.
`sandbox.Sandbox` starts it and speaks with it: requests are pickles, answers lines of JSON.
"""

import base64
import builtins
import contextlib
import gc
import importlib
import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from typing import Any

from r1jax.rewards import layers

# Imported once here, so that no program waits for them, and that a Python below /root can be used by another user.
PRELOADED = (
    "abc argparse array ast asyncio base64 binascii bisect calendar cmath codecs collections concurrent.futures"
    " contextlib contextvars copy csv ctypes dataclasses datetime decimal difflib doctest encodings.ascii"
    " encodings.idna encodings.latin_1 encodings.unicode_escape encodings.utf_16 encodings.utf_32 enum fileinput"
    " fnmatch fractions functools getopt glob graphlib hashlib heapq hmac html inspect io ipaddress itertools json"
    " locale logging math multiprocessing numbers operator pathlib pickle pprint queue random re reprlib resource"
    " secrets select shlex shutil signal statistics string struct subprocess sys tempfile textwrap threading time"
    " timeit traceback types typing unicodedata unittest urllib.parse uuid weakref zlib zoneinfo"
).split()
READABLE = (
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
    "/usr/share/zoneinfo",
    "/etc/localtime",
    "/dev/urandom",
    "/etc/ld.so.cache",
)
COMPILER_READABLE = ("/usr", "/bin", "/etc/alternatives")
# A program may read and discard.
NULL = "/dev/null"
INODES = 2048
LOOK_S = 0.05
ERROR_CHARACTERS = 4000
# Of address space, over what the program asked for: the interpreter itself.
OWN_BYTES = 192 << 20
THREADS = 64
RESULT_FD = 3


def _own_user(folder: str) -> int:
    """A user that nobody else is, made of the number of this process, which no other process has."""
    for uid in (100_000 + os.getpid(), 10_000 + os.getpid() % 50_000):  # a container may know 65,536 users only
        try:
            os.chown(folder, uid, uid)
            return uid
        except OSError as error:
            failed = error
    raise failed


def _confine(request: dict[str, Any], folder: str, applied: set[str]) -> None:
    compiles, runs_binary = request["kind"] == "compile", request["kind"] == "binary"
    if "rlimits" in applied:
        processes = THREADS if "uid" in applied else None
        # A compiler needs room whatever the program may use.
        memory = max(request["memory_mb"], 1024 if compiles else 0) << 20
        layers.limit_resources(memory + OWN_BYTES, request["timeout_s"] + 1, request["disk_mb"] << 20, processes)
    if "uid" in applied:
        layers.become(request["uid"])
    layers.end_with_parent()
    layers.gain_nothing()
    if "landlock" in applied:
        readable = [*READABLE, f"{sys.base_prefix}/lib", *(COMPILER_READABLE if compiles else ())]
        layers.restrict_files(readable, [folder, NULL], executable=compiles or runs_binary)
    if "seccomp" in applied:
        layers.restrict_calls(processes=compiles, execute=runs_binary)


def _run_python(request: dict[str, Any], result: int) -> None:
    """Runs the program and what is asked of it in this very process; writes to `result` what `Sandbox.run` says."""
    sys.argv, sys.path = ["program.py"], [path for path in sys.path if path.startswith(sys.base_prefix)]
    text = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, **text) for fd, mode in enumerate("rww"))  # noqa: SIM115
    main = types.ModuleType("__main__")
    main.__builtins__ = builtins
    sys.modules["__main__"] = main
    exec(compile(request["program"], "program.py", "exec"), main.__dict__)
    value = None
    if request.get("tests"):
        exec(compile(request["tests"], "tests.py", "exec"), main.__dict__)
    if request.get("call"):
        name, arguments = request["call"]
        owner = main.Solution() if not hasattr(main, name) and hasattr(main, "Solution") else main
        value = getattr(owner, name)(*arguments)
    sys.stdout.flush()
    answer = json.dumps({"nonce": request["nonce"], "value": value}, default=_as_json).encode()
    while answer:
        answer = answer[os.write(result, answer) :]


def _as_json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"the call returned {type(value).__name__}, which JSON has not")


def _child(request: dict[str, Any], folder: str, applied: set[str], streams: list[int]) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        os.closerange(len(streams), 1 << 16)
        os.chdir(folder)
        _confine(request, folder, applied)
        if request["kind"] == "python":
            _run_python(request, RESULT_FD)
        else:
            os.execve(
                request["argv"][0], request["argv"], {"PATH": "/usr/bin:/bin", "TMPDIR": folder, "LANG": "C.UTF-8"}
            )
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        os.write(2, traceback.format_exc()[-ERROR_CHARACTERS:].encode("utf-8", "replace"))
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(code & 0xFF)


def _is_full(folder: str, disk_bytes: int) -> bool:
    total, todo, seen = 0, [folder], 0
    while todo and seen <= INODES:
        try:
            for entry in os.scandir(todo.pop()):
                seen += 1
                status = entry.stat(follow_symlinks=False)
                total += status.st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
        except OSError:
            continue
    return seen > INODES or total > disk_bytes


def _watch(
    pid: int, request: dict[str, Any], readers: list[int], folder: str, is_bounded: bool
) -> tuple[str, list[bytes]]:
    """Waits until the process is gone, or kills its group; why it was killed, and what it wrote to each reader."""
    texts, reason = [bytearray() for _ in readers], ""
    limits = [request["output_bytes"], request["output_bytes"], request["output_bytes"]]
    deadline_s = time.monotonic() + request["timeout_s"]
    ended = os.pidfd_open(pid)
    with selectors.DefaultSelector() as selector:
        for i, reader in enumerate(readers):
            selector.register(reader, selectors.EVENT_READ, i)
        selector.register(ended, selectors.EVENT_READ, None)
        running = True
        while running and not reason:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                reason = "timeout"
                break
            for key, _ in selector.select(left_s if is_bounded else min(left_s, LOOK_S)):
                if key.data is None:
                    running = False
                    continue
                data = os.read(key.fd, 1 << 16)
                texts[key.data] += data
                if not data:
                    selector.unregister(key.fd)
                if len(texts[key.data]) > limits[key.data]:
                    reason = "output"
            if not is_bounded and _is_full(folder, request["disk_mb"] << 20):
                reason = "disk"
        # The whole group, while its first process is not waited for and its number therefore still taken.
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    os.close(ended)
    for reader, text, limit in zip(readers, texts, limits, strict=True):
        os.set_blocking(reader, False)
        try:
            while len(text) <= limit and (data := os.read(reader, 1 << 16)):
                text += data
        except BlockingIOError:
            pass
    return reason, [bytes(text[:limit]) for text, limit in zip(texts, limits, strict=True)]


def _run(request: dict[str, Any], folder: str, applied: set[str], is_bounded: bool) -> dict[str, Any]:
    stdin = os.memfd_create("stdin")
    os.write(stdin, request["stdin"].encode("utf-8", "replace"))
    os.lseek(stdin, 0, os.SEEK_SET)
    pipes = [os.pipe() for _ in range(3)]
    start_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(request, folder, applied, [stdin, *(write for _, write in pipes)])
    os.close(stdin)
    for _, write in pipes:
        os.close(write)
    readers = [read for read, _ in pipes]
    reason, texts = _watch(pid, request, readers, folder, is_bounded)
    _, status, usage = os.wait4(pid, 0)
    for reader in readers:
        os.close(reader)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "reason": reason,
        "texts": [base64.b64encode(text).decode() for text in texts],
        "wall_s": time.monotonic() - start_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


def _clear(folder: str, uid: int | None) -> None:
    """Deletes what is in the folder: as the program's user, and in no file system but the folder's own."""
    if not os.listdir(folder):
        return
    user = {"user": uid, "group": uid, "extra_groups": []} if uid is not None else {}
    for command in (["chmod", "-R", "u+rwx", folder], ["find", folder, "-xdev", "-mindepth", "1", "-delete"]):
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL, cwd=folder, **user)


def serve(descriptor: int, applied: set[str]) -> None:
    """Answers requests on the socket `descriptor` until it is closed, then ends the process."""
    layers.gain_nothing()
    for name in PRELOADED:
        importlib.import_module(name)
    connection = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    base = tempfile.mkdtemp(prefix="r1jax-sandbox-")
    folder = os.path.join(base, "work")
    os.mkdir(folder, 0o700)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            layers.own_mounts()
            layers.mount_memory(folder, 1 << 20, 16)
            layers.unmount(folder)
        mounts = is_root and "disk" in applied
    except OSError:  # a container without that privilege
        mounts = False
    os.chmod(base, 0o711)  # the program's user has to pass through
    gc.freeze()
    messages = connection.makefile("rb")
    try:
        while True:
            request = pickle.load(messages)
            if mounts and not request["keep"]:
                layers.mount_memory(folder, request["disk_mb"] << 20, INODES)
            uid = request["uid"] = _own_user(folder) if "uid" in applied else None
            try:
                for name, text in request["files"].items():
                    with open(os.path.join(folder, name), "x", encoding="utf-8", errors="replace") as file:
                        file.write(text)
                answer = _run(request, folder, applied, mounts or "disk" not in applied)
            finally:
                if not request["hold"]:
                    layers.unmount(folder) if mounts else _clear(folder, uid)
            connection.sendall(json.dumps(answer).encode() + b"\n")
    except EOFError:
        pass
    finally:
        for empty in (folder, base):
            with contextlib.suppress(OSError):
                os.rmdir(empty)
        os._exit(0)
