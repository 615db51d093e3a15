"""Every line that depends on which process this is, so that no other file asks.

One process drives one host of a pod (jax.distributed, one program on many hosts). What several hosts must decide alike,
such as stopping, goes through `gather`, `sum_across`, `any_across` or `agree`; all hosts have to call these in the same
order. With a single process they are the identity. Inside `together` no host outlives another (watch.py).
"""

import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import pathlib
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils

from r1jax import watch

Thing = TypeVar("Thing")

# How long to wait for hosts that start later, and for one that no longer answers: jax ends all of them then.
START_S, HEARTBEAT_S = 600, 40
# Run the same command again (EX_TEMPFAIL of sysexits.h): a host died, a device failed, or somebody asked to stop.
TRY_AGAIN = 75
# Of a device's errors those that the same program meets again: too little memory, or what cannot be compiled.
LASTING = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


def initialize(cpu_devices: int = 1) -> None:
    """Joins this process to the others; call it before anything touches a device. A single process needs nothing.

    `cpu_devices` is as how many devices jax shows the CPU, unless XLA_FLAGS says it: cores that each run a program of
    their own share small work better than cores that share every operation.

    On a TPU pod slice jax finds the others by itself. Anywhere else the environment names them:
    JAX_COORDINATOR_ADDRESS=host:port, and (unless jax can ask Slurm or Open MPI) JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    of which 0 is the writer.

    Raises:
        ValueError: the environment names a coordinator but not which of how many processes this is.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not _has_accelerator() and "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        # XLA's default, LLVM's third level, takes longer to compile and runs no faster (tests/bench/RESULTS.md).
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    waits = {"initialization_timeout": START_S, "heartbeat_timeout_seconds": HEARTBEAT_S}
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        numbers = {"num_processes": _number("JAX_NUM_PROCESSES"), "process_id": _number("JAX_PROCESS_ID")}
        jax.distributed.initialize(**numbers, **waits)
    elif _has_tpu_chips():
        # A lone TPU host (Colab) is no cluster that jax knows, and needs none.
        with contextlib.suppress(ValueError):
            jax.distributed.initialize(**waits)


def _number(variable: str) -> int | None:
    value = os.environ.get(variable)
    if value is not None and not value.isdecimal():
        raise ValueError(f"{variable}={value!r} in the environment: wanted a whole number, from 0")
    return None if value is None else int(value)


TPU_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")
GPUS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, through Windows


def _has_tpu_chips() -> bool:
    chips = any(glob.glob(pattern) for pattern in TPU_CHIPS)
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return chips and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def _has_accelerator() -> bool:
    chips = any(glob.glob(pattern) for pattern in TPU_CHIPS + GPUS)
    return chips and os.environ.get("JAX_PLATFORMS") != "cpu"


@contextlib.contextmanager
def together(facts: watch.Facts, said: tuple[type[Exception], ...], stopped: type[Exception]) -> Iterator[None]:
    """Inside, all hosts run or none: when one fails or dies, all others say which and why, and exit.

    All with the same code: TRY_AGAIN after a death or what `may_pass`, and 1 after any other error, where they disagree
    or where one does not come. A host's own failure is reported before anything else of it unwinds on other hosts; its
    process exits as well, because jax would wait for the others at its end. Nothing here touches a device.

    Args:
        facts: what has to be alike on all hosts; anything that JSON carries.
        said: errors that are told in one line, without a traceback.
        stopped: what all hosts raise together when they were asked to end.
    """
    state = distributed.global_state
    if not jax.distributed.is_initialized() or state.num_processes == 1:
        yield
        return
    if state.process_id == 0:
        state.client.key_value_set("r1jax/watch", str(watch.listen(state.num_processes, START_S)))
    port = int(state.client.blocking_key_value_get("r1jax/watch", START_S * 1000))
    host = state.coordinator_address.rsplit(":", 1)[0].strip("[]")
    name = watch.name(state.process_id, state.num_processes)
    try:
        line = watch.join((host, port), state.process_id, name, facts, _leave)
    except OSError as error:
        _leave(f"host 0 does not answer at {host}:{port}: {error}", again=False)
    try:
        yield
    except stopped:
        line.done()
        raise
    except BaseException as error:
        brief = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        line.fail(brief, may_pass(error))
        if isinstance(error, said):
            print(f"r1jax: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        _leave(None, may_pass(error))
    line.done()


def may_pass(error: BaseException) -> bool:
    """Whether the same command may get further when it is run again: a chip, or the way to another host, failed."""
    return isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(LASTING)


def _leave(cause: str | None, again: bool) -> None:
    """Ends this process at once, without jax's own good-bye, which waits for hosts that are no longer there."""
    code = TRY_AGAIN if again else 1
    if cause is not None:
        os.write(2, f"r1jax: {cause}; this host ends as well\n".encode())
    threading.Timer(5.0, os._exit, (code,)).start()  # should another thread be stuck in a print
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def count() -> int:
    """How many processes run this program together."""
    return jax.process_count()


def is_writer() -> bool:
    """Whether this process writes the files that exist once for all: logs, summaries, the config."""
    return index() == 0


def say(text: str) -> None:
    """Prints a line, once for all hosts."""
    if is_writer():
        print(text, flush=True)


def my_part(things: Sequence[Thing]) -> Sequence[Thing]:
    """This host's part of work that any host could do: every `count()`-th thing, so that no part is much larger.

    Of prompts, not of their completions: no group is split.
    """
    return things[index() :: count()]


def gather(value: Any) -> list[Any]:
    """The values of all hosts in the order of their indices: anything that JSON carries, numpy's scalars too."""
    if count() == 1:
        return [value]
    # Bytes, because a device would round 64-bit numbers to 32.
    text = np.frombuffer(json.dumps(value, default=np.generic.item).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(max(1024, 1 << int(lengths.max()).bit_length()), np.uint8)  # few sizes, so few compilations
    padded[: len(text)] = text
    return [
        json.loads(row[:n].tobytes()) for row, n in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]


def sum_across(value: float) -> float:
    """The sum of a number over all hosts, exact for integers."""
    return sum(gather(value))


def any_across(flag: bool) -> bool:
    """Whether the flag is set on any host: how one host's SIGTERM becomes everybody's."""
    if count() == 1:
        return bool(flag)
    # Not `gather`, which is two collectives: the sampler asks before each dispatch.
    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def agree(value: Any) -> Any:
    """The writer's value, on every host: for what hosts could see differently, such as a listing of files."""
    return gather(value)[0]


def wait() -> None:
    """Returns when all hosts are here."""
    any_across(False)


def fetch(array: jax.Array) -> np.ndarray:
    """A host copy of the whole array, on every host, whatever its sharding; it outlives a donation of the array."""
    if array.is_fully_addressable:
        return np.array(array)
    if array.is_fully_replicated:
        return np.array(array.addressable_data(0))
    return np.array(multihost_utils.process_allgather(array, tiled=True))


def put(tree: Any, shardings: Any) -> Any:
    """Global arrays from numpy arrays that are whole and alike on every host; each host copies what its own devices
    hold to them. `shardings` is one sharding or a tree."""

    def one(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: one(x, shardings), tree)
    return jax.tree.map(one, tree, shardings)


@dataclasses.dataclass
class Stop:
    """Whether somebody asked this process to end."""

    requested: bool = False

    def is_agreed(self) -> bool:
        """Whether somebody asked any host to; all of them have to call it equally often."""
        return any_across(self.requested)


def on_sigterm() -> Stop:
    """From now on SIGTERM and the first Ctrl-C only set `requested`; a second Ctrl-C ends the process at once.

    To be called from the main thread, after `initialize`, whose coordination service listens to SIGTERM as well.
    """
    stop = Stop()

    def note(signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        # Not print, which may be what the signal interrupted.
        os.write(2, f"\n{signal.Signals(signum).name}: stopping after this step (Ctrl-C: at once)\n".encode())

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return stop


def peak_rss_gb() -> float:
    """Peak resident memory of this process plus that of each of its living descendants, in GB (1e9 bytes).

    The peaks need not coincide, so this is an upper bound. Where there is no /proc (macOS), this process only.
    """
    if not os.path.exists("/proc/self/status"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
    # Not getrusage: what it says of a child starts from the parent's memory at the fork.
    return sum(_peak_bytes(pid) for pid in _family(os.getpid())) / 1e9


def _peak_bytes(pid: int) -> int:
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0  # it ended meanwhile
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _family(pid: int) -> list[int]:
    try:
        lists = [pathlib.Path(path).read_text() for path in glob.glob(f"/proc/{pid}/task/*/children")]
    except OSError:
        lists = []
    return [pid, *(member for text in lists for child in text.split() for member in _family(int(child)))]


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file whole or not at all: a reader, or a run killed at any moment, sees the old file or the new one.

    Missing parent folders are made. Text is written as UTF-8. One writer per path at a time.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name has to survive a power cut as well
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
