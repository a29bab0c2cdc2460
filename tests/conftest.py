"""What tests of the whole stack share."""

import gc
import os
from pathlib import Path

import hypothesis
import pytest

# In CI the same examples every time, so that what fails there is a change and not chance; elsewhere new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

gc.disable()  # while modules load, which are no garbage


def pytest_collection_finish() -> None:
    """From here on as usual, but never again among what was loaded."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.freeze()


@pytest.fixture(scope="session")
def warm_starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where base policies are cached: every run of the session has the same one."""
    return tmp_path_factory.mktemp("warm-starts")
