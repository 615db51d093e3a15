"""The kernel's means to confine a process that runs a model's program: Landlock, seccomp, rlimits, a user, a disk.

None needs a privilege except the other user (which root has). They are applied by the process itself between fork and
the program; what they take away it cannot take back. Landlock: kernel documentation, userspace-api/landlock; seccomp:
userspace-api/seccomp_filter. The numbers are those of the kernel's headers for x86-64.
"""

import ctypes
import math
import os
import platform
import resource
import struct
from collections.abc import Sequence

ALL = ("landlock", "seccomp", "rlimits", "uid", "disk")

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_SECCOMP = 317
CLONE_NEWNS = 0x20000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 0x4000, 0x40000, 2

# Rights over files, by the version of Landlock that brought them.
_EXECUTE, _READ_FILE, _READ_DIR, _WRITE_FILE, _TRUNCATE = 1 << 0, 1 << 2, 1 << 3, 1 << 1, 1 << 14
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
# Sockets, devices and hard links to elsewhere are in no way needed.
_WORK_RIGHTS = 0b0111_1111_1111_1111 & ~(1 << 6 | 1 << 9 | 1 << 11)
_TCP_BIND_CONNECT, _ABSTRACT_SOCKETS_SIGNALS = 0b11, 0b11

# Everything that a single-process program does with memory, its files and its clock.
_ALLOWED = (
    *range(29), 32, 33, 34, 35, 36, 37, 38, 39, 60, 61, 63, *range(72, 92), 95, 96, 97, 98, 99, 100, 102, 104, 107,
    108, 110, 111, 115, 118, 120, 121, 124, 127, 128, 130, 131, 132, 137, 138, 143, 145, 158, 160, 186, 201, 202, 204,
    213, 217, 218, 219, 221, 228, 229, 230, 231, 232, 233, 235, 247, 257, 258, *range(262, 272), 273, 274, 277, 280,
    281, 285, 290, 291, 292, 293, 295, 296, 302, 309, 316, 318, 324, 326, 332, 334, 436, 439, 441,
)  # fmt: skip
_CLONE, _CLONE3, _KILL, _TKILL, _TGKILL, _PRCTL, _PRLIMIT, _EXECVE = 56, 435, 62, 200, 234, 157, 302, 59
# A compiler starts its parts as processes.
_PROCESSES = (53, 56, 57, 58, 59, 62, 109, 112, 157, 322, 435)
_CLONE_THREAD = 0x10000
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_AUDIT_ARCH = 0xC000003E
_EPERM, _ENOSYS = 1, 38


def _call(name: str, *arguments: object) -> int:
    result = getattr(_LIBC, name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def _landlock_version() -> int:
    return _LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1)


def missing() -> dict[str, str]:
    """The layers that this machine has not, with the reason; "uid" only counts where the caller is root."""
    found = {}
    x86 = platform.machine() == "x86_64" and struct.calcsize("P") == 8
    if not x86:
        found["seccomp"] = f"the filter is written for x86_64, this is {platform.machine()}"
    elif _LIBC.syscall(_SECCOMP, 2, 0, ctypes.byref(ctypes.c_uint32(_ERRNO))) < 0:
        found["seccomp"] = "the kernel has no seccomp filters"
    if _landlock_version() < 1:
        found["landlock"] = "the kernel has no Landlock (Linux 5.13) or it is not in the boot parameter lsm="
    return found


def restrict_files(readable: Sequence[str], writable: Sequence[str], executable: bool) -> None:
    """Leaves the process the files below these paths only, no TCP, and no signals to or sockets of other processes."""
    version = _landlock_version()
    handled = max(rights for since, rights in _FILE_RIGHTS.items() if since <= version)
    network = _TCP_BIND_CONNECT if version >= 4 else 0
    scoped = _ABSTRACT_SOCKETS_SIGNALS if version >= 6 else 0
    attributes = struct.pack("QQQ", handled, network, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _call("syscall", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    read = _READ_FILE | _READ_DIR | (_EXECUTE if executable else 0)
    for paths, rights in [(readable, read), (writable, _WORK_RIGHTS if executable else _WORK_RIGHTS & ~_EXECUTE)]:
        for path in paths:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            of_files = _READ_FILE | _WRITE_FILE | _EXECUTE | _TRUNCATE
            rule = struct.pack("=Qi", rights & handled & (-1 if os.path.isdir(path) else of_files), place)
            _call("syscall", _LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(place)
    _call("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _load(offset: int) -> bytes:
    return _instruction(0x20, offset)


def _return(action: int) -> bytes:
    return _instruction(0x06, action)


def _filter(processes: bool, execute: bool) -> bytes:
    """A seccomp program: what is not on the list is refused with EPERM; threads and signals to oneself are allowed."""
    number, arch, first = 0, 4, 16  # offsets in struct seccomp_data; of the first argument its low half
    program = [_load(arch), _instruction(0x15, _AUDIT_ARCH, 1, 0), _return(_KILL_PROCESS), _load(number)]
    # The x32 numbers would pass by the list.
    program += [_instruction(0x35, 0x40000000, 0, 1), _return(_KILL_PROCESS)]

    def when(call: int, body: list[bytes]) -> None:
        program.extend([_instruction(0x15, call, 0, len(body)), *body])

    if not processes:
        # glibc then falls back to clone, whose flags a filter can see.
        when(_CLONE3, [_return(_ERRNO | _ENOSYS)])
        thread = [_load(first), _instruction(0x45, _CLONE_THREAD, 1, 0), _return(_ERRNO | _EPERM), _return(_ALLOW)]
        when(_CLONE, thread)
        for call in (_KILL, _TGKILL):
            itself = [_load(first), _instruction(0x15, os.getpid(), 1, 0), _return(_ERRNO | _EPERM), _return(_ALLOW)]
            when(call, itself)
        name_of_thread = [_load(first), _instruction(0x15, 15, 1, 0), _return(_ERRNO | _EPERM), _return(_ALLOW)]
        when(_PRCTL, name_of_thread)
    own = [_load(first), _instruction(0x15, 0, 2, 0), _instruction(0x15, os.getpid(), 1, 0)]
    when(_PRLIMIT, [*own, _return(_ERRNO | _EPERM), _return(_ALLOW)])
    for call in sorted({*_ALLOWED, *(_PROCESSES if processes else ()), *((_EXECVE,) if execute else ())}):
        program += [_instruction(0x15, call, 0, 1), _return(_ALLOW)]
    return b"".join([*program, _return(_ERRNO | _EPERM)])


def restrict_calls(processes: bool = False, execute: bool = False) -> None:
    """Leaves the process the system calls that a program without network needs; new processes only if `processes`."""
    program = _filter(processes, execute or processes)
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    header = Program(len(program) // 8, ctypes.addressof(code))
    _call("prctl", _PR_SET_SECCOMP, 2, ctypes.byref(header), 0, 0)


def limit_resources(memory_bytes: int, cpu_s: float, file_bytes: int, processes: int | None) -> None:
    """Sets the rlimits; memory is address space. `processes` counts all threads of the user."""
    seconds = math.ceil(cpu_s)
    limits = {
        resource.RLIMIT_AS: (memory_bytes, memory_bytes),
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (file_bytes, file_bytes),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = (processes, processes)
    for name, limit in limits.items():
        resource.setrlimit(name, limit)


def become(uid: int) -> None:
    """Gives up root for a user and group that own nothing."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def gain_nothing() -> None:
    """No setuid program gives anything from here on; seccomp and Landlock ask for that."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def end_with_parent() -> None:
    """The process does not outlive the one that made it. To be said after a change of user, which forgets it."""
    _call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def own_mounts() -> None:
    """What this process mounts from here on, no other one sees, and it is gone with the process. Needs root."""
    _call("unshare", CLONE_NEWNS)
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)


def mount_memory(path: str, size_bytes: int, inodes: int) -> None:
    """Mounts an empty file system of limited size in memory. Needs root."""
    options = f"size={size_bytes},nr_inodes={inodes},mode=0700".encode()
    _call("mount", b"tmpfs", path.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options)


def unmount(path: str) -> None:
    """Unmounts, also if somebody still holds a file there."""
    _call("umount2", path.encode(), _MNT_DETACH)
