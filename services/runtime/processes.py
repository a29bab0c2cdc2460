"""What a process tells its parent when it ends, and the other way round."""

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable


def exit_reason(code: int, *, meaning: bool = False) -> str:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    # None of us sends it to a process that shall live.
    return name + ", by the kernel because memory ran out, or by somebody" * (meaning and code == -signal.SIGKILL)


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """On Linux, as preexec_fn: have the kernel send this signal to the child when its parent dies, even by kill -9."""
    if not sys.platform.startswith("linux"):
        return None
    libc, set_death_signal = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG
    return lambda: libc.prctl(set_death_signal, number)


PARENT = "SAPO_PARENT_PID"
"""Environment variable by which a parent that cannot give a preexec_fn names itself."""


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, or at once when that has happened meanwhile."""
    if bind := die_with_parent(signal.SIGKILL):
        bind()
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


WATCH_SECONDS = 0.5  # where the kernel does not tell


def end_group_with_me() -> None:
    """Whatever stays in this process's group ends when this process does, even by kill -9. For one that leads it.

    A fork waits in the group, which so keeps its number until everybody is gone. What leaves the group is not ended.
    """
    leader = os.getpid()
    if os.getpgrp() != leader:
        raise RuntimeError("this process is in a group with others, which it must not end")
    if os.fork():
        return
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # nobody is to wait for what this one would still hold open
        _wait_for_parent(leader)
    finally:
        os.kill(0, signal.SIGKILL)


def _wait_for_parent(parent: int) -> None:
    if not hasattr(os, "pidfd_open"):
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        return
    ended = select.poll()
    ended.register(os.pidfd_open(parent))
    if os.getppid() == parent:  # it was not too late to look
        ended.poll()
