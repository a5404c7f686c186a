"""A filter of system calls that lets a process start threads and no process, whoever its user is.

A limit of processes does not hold for root; this filter does, and what has it cannot put it off again. It is a program
of the kernel's classic BPF, which reads `struct seccomp_data`: number of the call, architecture, arguments.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets; the low half of the argument comes first
_CLONE_THREAD = 0x10000
# Machine -> AUDIT_ARCH, numbers of clone and clone3, of calls that only make processes, and the first that is no call.
_MACHINES = {
    "x86_64": (0xC000003E, 56, 435, (57, 58), 0x40000000),
    "aarch64": (0xC00000B7, 220, 435, (), 0x40000000),
}


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def refuse_processes() -> bool:
    """Let this process start no other one from here on. False where the machine is not one of `_MACHINES`.

    Raises:
        OSError: the kernel has no such filters.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return False
    code = _instructions(*_MACHINES[platform.machine()])
    program = _Program(len(code), (_Instruction * len(code))(*code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"no filter of system calls: {os.strerror(number)}")
    return True


def _instructions(
    architecture: int, clone: int, clone3: int, processes: tuple[int, ...], end: int
) -> list[_Instruction]:
    refused = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        refused,  # another architecture's calls, with numbers of their own
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, end),
        refused,
    ]
    for number in processes:
        steps += [(_EQUAL, 0, 1, number), refused]
    steps += [
        # Its arguments lie in memory, where a filter cannot look; the C library then takes clone.
        (_EQUAL, 0, 1, clone3),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        refused,
        (_RETURN, 0, 0, _ALLOW),
    ]
    return [_Instruction(*step) for step in steps]
