"""Who may do what: every HTTP route under /v1 and every gRPC method, with the roles that it is open to.

A token has one role. `admin` may do everything, and alone may do what is not in these tables: what somebody forgets to
enter here is closed, not open.
"""

from enum import StrEnum

from starlette.routing import compile_path

from sapo_learner.errors import Forbidden


class Role(StrEnum):
    VIEWER = "viewer"
    """Looks: the page, status, history. No weights, and nothing is changed."""
    WORKER = "worker"
    """Samples: leases, snapshots, the stream to ingest."""
    LEARNER = "learner"
    """Trains: snapshots both ways, versions, reports."""
    ADMIN = "admin"


_ALL = frozenset({Role.VIEWER, Role.WORKER, Role.LEARNER})
_VIEWER, _WORKER, _LEARNER = (frozenset({role}) for role in (Role.VIEWER, Role.WORKER, Role.LEARNER))
_ADMIN: frozenset[Role] = frozenset()

HTTP: dict[tuple[str, str], frozenset[Role]] = {
    ("GET", "/v1/config"): _ALL,
    ("GET", "/v1/status"): _VIEWER | _LEARNER,  # the learner asks it for what is still being evaluated
    ("GET", "/v1/ledger"): _VIEWER,
    ("GET", "/v1/history"): _VIEWER,
    ("GET", "/v1/live"): _VIEWER,
    ("GET", "/v1/groups"): _VIEWER,
    ("GET", "/v1/groups/{entry}"): _VIEWER,
    ("GET", "/v1/events"): _WORKER,
    ("POST", "/v1/leases"): _WORKER,
    ("POST", "/v1/leases/release"): _WORKER,
    ("POST", "/v1/workers/heartbeat"): _WORKER,
    ("POST", "/v1/evaluations/results"): _WORKER,
    ("POST", "/v1/groups"): _LEARNER,
    ("POST", "/v1/learner"): _LEARNER,
    ("POST", "/v1/policies"): _LEARNER,
    ("GET", "/v1/policies"): _ALL,
    ("GET", "/v1/policies/current"): _ALL,
    ("GET", "/v1/policies/{version}"): _ALL,
    ("GET", "/v1/blobs/{sha256}"): _WORKER | _LEARNER,  # the weights themselves
    ("HEAD", "/v1/blobs/{sha256}"): _LEARNER,  # it keeps the blob for a while, also one that nobody wants any more
    ("PUT", "/v1/blobs/{sha256}"): _LEARNER,
}
GRPC: dict[str, frozenset[Role]] = {"/sapo.v1.TrajectoryIngestService/StreamTrajectoryGroups": _WORKER}
GRPC_OPEN = frozenset({"/grpc.health.v1.Health/Check"})
"""Need no token: probes have none. Not Watch, which holds its connection for as long as the client likes."""

_PATTERNS = [(method, compile_path(path)[0], roles) for (method, path), roles in HTTP.items()]


def of_route(method: str, path: str) -> frozenset[Role]:
    """The roles, beside admin, that may call this."""
    return next((roles for known, pattern, roles in _PATTERNS if known == method and pattern.match(path)), _ADMIN)


def of_method(name: str) -> frozenset[Role]:
    """The same for a gRPC method, by its full name."""
    return GRPC.get(name, _ADMIN)


def refusal(role: Role, allowed: frozenset[Role], what: str) -> Forbidden | None:
    """Why a token of this role may not do `what`; None: it may."""
    if role is Role.ADMIN or role in allowed:
        return None
    needed = " or ".join(sorted(allowed | {Role.ADMIN}))
    return Forbidden(f"a token of role {role} may not do this", where=what, fix=f"use a token of role {needed}")
