"""torchrun for `sapo up`: so many learner processes on this machine, one job, with the exit code of what ended it.

    python -m services.learner.launch 8 --http-listen 127.0.0.1:9102      the options are those of `sapo serve learner`

The job is as one process: a rank that dies takes the others with it, and whoever started this starts it again.
"""

import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def main(arguments: Sequence[str]) -> int:
    processes, *options = arguments
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(processes), run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
    )  # fmt: skip
    command = ["-u", "-m", "services.cli", "serve", "learner", *options]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda each: each.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # as a shell says of a signal
    except SignalException:
        return 0  # asked to stop, and so were they
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
