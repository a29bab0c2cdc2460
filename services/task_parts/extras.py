"""Libraries that only some tasks and commands need, imported when they are first used."""

import importlib
from typing import Any

from sapo_learner.errors import ConfigError


def load(module: str, *, where: str = "task", extra: str = "tasks") -> Any:
    """The module, or a ConfigError that says what to install. extra: of this package, that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module.partition('.')[0]} cannot be imported: {error}", where=where, fix=f"pip install 'sapo[{extra}]'"
        ) from None
