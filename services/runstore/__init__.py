"""The run's state in Redis: the head of the log, draws and leases, the policy registry, worker reports.

THE ONLY place that knows a Redis key. Every key of a run shares one hash tag (`sapo:{RUN}:...`), so that the scripts
work on a cluster too. What must happen at once happens in one script (`scripts/*.lua`), by the server's clock.

    keys.py        every key, its type and meaning
    connection.py  scripts, time limits, retries, and Redis' errors as ours
    log.py         append, read, trim, rebuild
    leases.py      grant, renew, release
    registry.py    publish, versions, facts, documents, workers
    store.py       RunStore: all of it, and the run's state at one glance
    embedded.py    a server of our own, when no URL is given
"""

from services.runstore.embedded import EmbeddedRedis
from services.runstore.leases import Grant, Lease, Pacing
from services.runstore.log import AppendResult, Refusal
from services.runstore.registry import Policy, Published, Worker
from services.runstore.store import OpenLease, RunState, RunStore

__all__ = [
    "AppendResult",
    "EmbeddedRedis",
    "Grant",
    "Lease",
    "OpenLease",
    "Pacing",
    "Policy",
    "Published",
    "Refusal",
    "RunState",
    "RunStore",
    "Worker",
]
