"""What a process is doing: `kill -USR1 PID` writes the stack of every task and thread to its standard error."""

import asyncio
import faulthandler
import signal
import sys
import traceback


def install(loop: asyncio.AbstractEventLoop) -> None:
    loop.add_signal_handler(signal.SIGUSR1, write_stacks)


def write_stacks() -> None:
    """Of the running loop's tasks, then of every thread."""
    for task in asyncio.all_tasks():
        print(task, file=sys.stderr)
        for frame in task.get_stack():
            traceback.print_stack(frame, limit=1, file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()
