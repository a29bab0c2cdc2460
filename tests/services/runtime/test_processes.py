"""What ends with whom."""

import subprocess
import sys


def test_a_process_in_a_group_with_others_does_not_end_that_with_itself() -> None:
    """A shell that started a worker, for example."""
    program = "from services.runtime.processes import end_group_with_me as end; import os, sys\n"
    program += "if pid := os.fork():\n    sys.exit(os.waitpid(pid, 0)[1] != 0)\nend()"
    ended = subprocess.run([sys.executable, "-c", program], start_new_session=True, capture_output=True, timeout=60)
    assert ended.returncode == 1
    assert b"in a group with others" in ended.stderr
