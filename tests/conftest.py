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

LONG = (
    "end_to_end/",
    "chaos/test_chaos.py",
    "sapo_learner/test_several_ranks.py",
    "benchmarks/",
    "services/test_check.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts the whole stack comes first: whichever file is the last, one worker alone is busy with it."""
    root = Path(__file__).parent
    items.sort(key=lambda item: not item.path.relative_to(root).as_posix().startswith(LONG))


def pytest_collection_finish() -> None:
    """From here on as usual, but never again among what was loaded."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.freeze()


@pytest.fixture(scope="session")
def warm_starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where base policies are cached: every run of the session has the same one, whichever worker starts it."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "warm-starts"
    directory.mkdir(exist_ok=True)
    return directory
