"""Attempts to escape from the sandbox: each is stopped, and each gets through once the layers against it are off."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from r1jax.rewards import layers, sandbox
from r1jax.rewards.sandbox import Sandbox, SandboxError, check

pytestmark = pytest.mark.skipif(bool(layers.missing()), reason=f"this kernel lacks {layers.missing()}")
IS_ROOT = os.geteuid() == 0

# name: the layers that stop it, and what a program does that prints ESCAPED if it succeeds. {port}, {name}, {parent}
# and {outside} are those of the test: a server, an abstract socket, its process, a file of it.
ATTEMPTS = {
    "tcp": ("seccomp landlock", "socket.create_connection(('127.0.0.1', {port}), 5)"),
    "tcp server": ("seccomp landlock", "socket.socket().bind(('127.0.0.1', 0))"),
    "udp": ("seccomp", "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))"),
    "unix socket": ("seccomp", "socket.socketpair()"),
    "abstract socket": ("seccomp landlock", r"socket.socket(socket.AF_UNIX).connect('\0{name}')"),
    "raw socket": ("seccomp uid", "socket.socket(type=socket.SOCK_RAW, proto=1)"),
    "shadow": ("landlock uid", "open('/etc/shadow').read()"),
    "passwd": ("landlock", "open('/etc/passwd').read()"),
    "symlink": ("landlock", "os.symlink('/etc/passwd', 'link'); open('link').read()"),
    "dot dot": ("landlock", "os.chdir('/'); open('../../etc/passwd').read()"),
    "list root": ("landlock", "os.listdir('/')"),
    "list proc": ("landlock", "os.listdir('/proc')"),
    "own environment": ("landlock uid", "open('/proc/self/environ').read()"),
    "parent environment": ("landlock uid", "open(f'/proc/{{os.getppid()}}/environ').read()"),
    "parent memory": (
        "landlock uid",
        "at = int(open(f'/proc/{{os.getppid()}}/maps').read().split('-')[0], 16)\n"
        "    f = open(f'/proc/{{os.getppid()}}/mem', 'rb', 0); f.seek(at); assert f.read(16)",
    ),
    "parent files": ("landlock uid", "os.listdir(f'/proc/{{os.getppid()}}/fd')"),
    "file of the trainer": ("landlock", "open({outside!r}).read()"),
    "write outside": ("landlock", "open({outside!r} + str(os.getpid()), 'w').write('x')"),
    "shared memory": ("landlock", "f = f'/dev/shm/r1jax-{{os.getpid()}}'; open(f, 'w').write('x'); os.unlink(f)"),
    "peek by system call": (
        "seccomp landlock uid",
        "class V(ctypes.Structure): _fields_ = [('at', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
        "    b = ctypes.create_string_buffer(8); here = V(ctypes.addressof(b), 8)\n"
        "    there = V(ctypes.addressof(b), 8)\n"  # the parent has the same addresses: it was forked
        "    one, none = ctypes.c_long(1), ctypes.c_long(0)\n"
        "    r = call(310, os.getppid(), ctypes.byref(here), one, ctypes.byref(there), one, none)\n"
        "    assert r >= 0 or err() == 14, err()",
    ),
    "ptrace": ("seccomp landlock uid", "assert call(101, 0x4206, os.getppid(), 0, 0) == 0"),
    "signal to the launcher": ("seccomp landlock uid", "os.kill(os.getppid(), signal.SIGCONT)"),
    "signal to the trainer": ("seccomp landlock uid", "os.kill({parent}, 0)"),
    "fork": ("seccomp", "os.fork() or os._exit(0)"),
    "fork bomb": ("seccomp rlimits", "[os.fork() or time.sleep(60) for _ in range(100)]"),
    "threads": (
        "rlimits",
        "threading.stack_size(1 << 16)\n"
        "    [threading.Thread(target=time.sleep, args=(1,), daemon=True).start() for _ in range(300)]",
    ),
    "daemon": ("seccomp", "p = os.fork()\n    if not p: os.setsid(); os._exit(7)\n    assert os.wait()[1] == 7 << 8"),
    "command": ("seccomp landlock", "import subprocess; subprocess.run(['/bin/true'], check=True)"),
    "another program": ("seccomp landlock", "os.execv('/bin/echo', ['echo', 'ESCAPED'])"),
    "program in memory": ("seccomp", "os.memfd_create('x')"),
    "become root": ("seccomp uid", "os.setresuid(0, 0, 0)"),
    "raise a limit": ("rlimits", "resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))"),
    "name space": ("seccomp", "assert call(272, 0x10000000) == 0"),
    "mount": ("seccomp landlock uid", "assert call(165, b'x', b'.', b'tmpfs', 0, 0) == 0 == call(166, b'.', 2)"),
    "keyring": ("seccomp", "assert call(250, 0, -3, 1) != -1 or err() != 1"),
    "io_uring": ("seccomp", "assert call(425, 1, ctypes.create_string_buffer(120)) != -1 or err() != 1"),
    "affinity": ("seccomp", "os.sched_setaffinity(0, os.sched_getaffinity(0))"),
    "memory": ("rlimits", "bytearray(1 << 30)"),
    "one large file": ("rlimits disk", "open('f', 'wb').write(bytes(64 << 20))"),
    "many files": ("disk", "[open(f'{{i}}', 'wb').write(bytes(1 << 20)) for i in range(40)]; time.sleep(0.5)"),
    "many names": ("disk", "[open(f'{{i}}', 'wb').close() for i in range(4000)]; time.sleep(0.5)"),
    "open files": ("rlimits", "l = [os.open('.', 0) for _ in range(200)]"),
}  # fmt: skip
HEAD = """
import ctypes, os, resource, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
call, err = libc.syscall, ctypes.get_errno
try:
    {attempt}
    print("ESCAPED", flush=True)
except BaseException as e:
    print("stopped by", repr(e), flush=True)
os._exit(0)
"""
ROOT_ONLY = {name for name, (stops, _) in ATTEMPTS.items() if "uid" in stops.split()} | {"fork bomb", "threads"}


@pytest.fixture(scope="module")
def world():
    """What the attempts are made on: a server, an abstract socket, a file that only its name protects."""
    name = f"r1jax-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o777)
            outside = Path(folder) / "outside"
            outside.write_text("secret")
            outside.chmod(0o644)
            yield {"port": server.getsockname()[1], "name": name, "parent": os.getpid(), "outside": str(outside)}


@pytest.fixture(scope="module")
def boxes():
    """Sandboxes by the layers that are off."""
    made: dict[str, Sandbox] = {}

    def box(without: str = "") -> Sandbox:
        if without not in made:
            made[without] = Sandbox(without=without.split())
        return made[without]

    yield box
    for one in made.values():
        one.close()


@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_is_stopped_by_its_layers_and_by_nothing_else(name, world, boxes):
    if name in ROOT_ONLY and not IS_ROOT:
        pytest.skip("only root can do that at all")
    without, attempt = ATTEMPTS[name]
    program = HEAD.format(attempt=attempt.format(**world))
    assert "ESCAPED" not in boxes().run(program, 20.0, 256).stdout
    assert "ESCAPED" in (done := boxes(without).run(program, 20.0, 256)).stdout, done
    assert boxes().run("print(1)", 20.0, 256).stdout == "1\n"


def test_the_environment_holds_nothing_of_the_trainer(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "42")
    with Sandbox(without=layers.ALL) as box:
        assert "SECRET_TOKEN" not in box.run("import os; print(dict(os.environ))", 20.0, 256).stdout
        assert "SECRET_TOKEN" not in box.run("import os; print(open('/proc/self/environ').read())", 20.0, 256).stdout


def test_no_descriptor_but_its_own_is_open(boxes):
    program = "import os\nfor fd in range(4, 1000):\n  try: os.fstat(fd); print(fd)\n  except OSError: pass"
    assert boxes(" ".join(layers.ALL)).run(program, 20.0, 256).stdout == ""


def test_output_without_end_is_cut(boxes, monkeypatch):
    program = "for _ in range(300): print('x' * 10_000)"
    done = boxes().run(program, 20.0, 256)
    assert done.reason == "output" and len(done.stdout) <= sandbox.OUTPUT_BYTES
    monkeypatch.setattr(sandbox, "OUTPUT_BYTES", 64 << 20)
    assert boxes().run(program, 20.0, 256).reason == ""


@pytest.mark.parametrize(
    "program",
    [
        "import time\nend = time.time() + 3\nwhile time.time() < end: pass",
        "import time; time.sleep(3)",
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\ntime.sleep(3)",
    ],
    ids=["loop", "sleep", "stopped", "deaf"],
)
def test_a_program_ends_in_time(program, boxes):
    assert boxes().run(program, 0.5, 256).reason == "timeout"
    if "SIGSTOP" not in program:
        assert boxes().run(program, 60.0, 256).reason == ""


def test_what_a_process_leaves_behind_is_killed_and_removed(boxes):
    box = boxes("seccomp")
    assert box.run("import os\nif os.fork() == 0:\n  while True: pass\nprint(os.getpid())", 20.0, 256).status == 0
    box.run("open('left', 'w').write('x')", 20.0, 256)
    assert box.run("import os; print(os.listdir('.'))", 20.0, 256).stdout == "[]\n"
    deep = "import os\nfor _ in range(1500):\n  os.mkdir('d'); os.chdir('d')"
    assert boxes("disk").run(deep, 20.0, 256).status == 0
    assert boxes("disk").run("import os; print(os.listdir('.'))", 20.0, 256).stdout == "[]\n"


def test_a_lost_launcher_is_replaced():
    with Sandbox() as box:
        threading.Timer(0.3, box._process.kill).start()
        assert box.run("import time; time.sleep(5)", 20.0, 256).reason == "died"
        assert box.run("print(1)", 20.0, 256).stdout == "1\n"


def test_nothing_outlives_a_killed_trainer():
    trainer = (
        "import os, signal, threading; from r1jax.rewards.sandbox import Sandbox\n"
        "box = Sandbox(); print(box._process.pid, flush=True)\n"
        "threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "print(box.run('while True: pass', 3.0, 256), flush=True)"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", trainer], cwd=root, stdout=subprocess.PIPE, text=True)
    launcher = Path("/proc") / done.stdout.strip() / "cmdline"
    deadline_s = time.monotonic() + 120
    while launcher.exists() and launcher.read_bytes() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not (launcher.exists() and launcher.read_bytes())


def test_a_missing_layer_is_refused_unless_it_is_accepted(monkeypatch):
    monkeypatch.setattr(layers, "missing", lambda: {"landlock": "the kernel has none"})
    with pytest.raises(SandboxError, match=r"no landlock \(the kernel has none\).*sandbox_accepts"):
        check([])
    assert "landlock" not in check(["landlock"])
