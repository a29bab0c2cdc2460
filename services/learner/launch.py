"""torchrun for `sapo up`: so many learner processes on this machine, one job, that ends as the rank did that ended it.

    python -m services.learner.launch 8 --http-listen 127.0.0.1:9102      the options are those of `sapo serve learner`

The job is as one process: a rank that dies takes the others with it, and whoever started this starts it again. When
this process itself dies, the kernel ends the ranks (`end_with_parent`).
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterable, Sequence

from torch.distributed.elastic.multiprocessing import ProcessFailure, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sapo_learner.errors import Unavailable
from services.runtime.logging import configure
from services.runtime.processes import PARENT, exit_reason

log = logging.getLogger(__name__)
CONSEQUENCES = (Unavailable.exit_code, -signal.SIGTERM)
"""How a rank ends, among other reasons, because another is gone, or because torchrun's agent tells it to."""


def main(arguments: Sequence[str]) -> int:
    processes, *options = arguments
    configure("learner's launcher")
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_not_said_here)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(processes), run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
    )  # fmt: skip
    command = ["-u", "-m", "services.cli", "serve", "learner", *options]
    os.environ[PARENT] = str(os.getpid())
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        first = cause(error.failures.values())
        log.error("rank %d of %s died (%s)", first.local_rank, processes, exit_reason(first.exitcode, meaning=True))
        return _end_as(first.exitcode)
    except SignalException:
        return 0  # asked to stop, and so were they
    return 0


def _not_said_here(record: logging.LogRecord) -> bool:
    """Which rank ended is said in one line; more of them would bury what the rank itself has said."""
    return record.getMessage().startswith("Unable to shutdown")


def cause(failures: Iterable[ProcessFailure]) -> ProcessFailure:
    """Which rank's end was the reason of the others', as far as one can tell: the agent looks ten times a second."""
    return min(failures, key=lambda each: (each.exitcode in CONSEQUENCES, each.timestamp))


def _end_as(code: int) -> int:
    """The rank's exit code; or die of the signal that it died of, so that its parent can tell."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        sys.stderr.flush()
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
