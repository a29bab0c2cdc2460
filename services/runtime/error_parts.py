"""An error as it crosses a process, over HTTP or gRPC: its class and its parts, so that both ends say the same."""

from collections.abc import Mapping
from typing import Any

from sapo_learner.errors import InvalidTrajectory, SapoError

_TREE: list[type[SapoError]] = [SapoError, *SapoError.__subclasses__()]
_BY_NAME = {each.__name__: each for each in _TREE}
# Two classes share INVALID_ARGUMENT: a peer that names no class means the other one.
_BY_CODE = {each.code: each for each in _TREE if each is not InvalidTrajectory}


def to_parts(error: SapoError) -> dict[str, str]:
    """kind: the class of the tree (a class derived from one of them counts as that). code: gRPC's status name."""
    kind = next(each.__name__ for each in type(error).__mro__ if each.__name__ in _BY_NAME)
    parts = {"kind": kind, "code": error.code, "what": error.what, "where": error.where, "fix": error.fix}
    # What came from a peer may hold what UTF-8 cannot: an error about it must still get through.
    return {name: text.encode("utf-8", "replace").decode() for name, text in parts.items()}


def from_parts(parts: Mapping[str, Any]) -> SapoError:
    """Raises KeyError or TypeError when these are not an error's parts."""
    kind = _BY_NAME.get(parts.get("kind", "")) or _BY_CODE.get(parts["code"], SapoError)
    return kind(str(parts["what"]), where=str(parts["where"]), fix=str(parts["fix"]))
