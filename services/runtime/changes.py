"""A run started again with other settings: which of them may change in mid-run, which would make it another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapo_learner.errors import ConfigError
from services.runtime.settings import RunConfig, load_config

# What the log's entries mean, and where their steps lie, hangs on these.
FIXED = (
    "run", "policy", "task", "tasks", "chat", "sampling", "training.groups_per_step", "training.max_policy_age",
    "parallel.precision",
)  # fmt: skip


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """Dotted names of the settings that differ, the run's directory aside."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and key != "run.dir")


def check_changes(directory: Path, now: RunConfig) -> list[str]:
    """Each change as "key: old -> new" against the run in `directory`, [] for a new run.

    Raises ConfigError, naming them all, when one of them would make it another run.
    """
    path = directory / "run.yaml"
    if not path.exists():
        return []
    before = load_config(path)
    changed = changes(before, now)
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    said = [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]
    fixed = [text for key, text in zip(changed, said, strict=True) if _is_fixed(key)]
    if fixed:
        raise ConfigError(
            f"these settings cannot change in mid-run: {'; '.join(fixed)}",
            where=str(directory),
            fix="go on with the old ones, or start another run (`--again` sets this one aside)",
        )
    return said


def _is_fixed(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in FIXED)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
