"""What tests of the whole stack share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def warm_starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where base policies are cached: every run of the session has the same one."""
    return tmp_path_factory.mktemp("warm-starts")
