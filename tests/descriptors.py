"""Room for a thousand connections, both ends of which are in this process."""

import resource

import pytest

NEEDED = 4096


def require_many() -> None:
    """Raise the limit of open files as far as is needed, or skip."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NEEDED:
        pytest.skip(f"a process may open {hard} files here, this needs {NEEDED}")
    if soft < NEEDED:
        resource.setrlimit(resource.RLIMIT_NOFILE, (NEEDED, hard))
