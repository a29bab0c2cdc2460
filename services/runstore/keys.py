"""Every key of a run.

key             type    meaning
state           hash    generation   rises with every rebuild; missing = the log must be rebuilt
                        sequence, chain   of the last entry; sequence = groups (and control entries) accepted
                        trimmed_chain     chain of the last entry that was trimmed
                        next_draw    the smallest draw never leased
                        bytes        payload bytes that nobody has archived
                        uncounted    entries that did not count towards a step (the learner's word)
                        rebuild, control  nonce of the last call, so that a repeated one does nothing
log             stream  <generation>-<sequence> -> kind, draw, chain, payload: the entries nobody has archived
index           list    "<bytes> <chain>" of each entry of `log`, in its order: trim needs no payload
leases          zset    open draw -> deadline, ms
lease_info      hash    open draw -> {worker, attempt, step, granted, lease_ms, max_lease_ms} as JSON
lease_steps     zset    open draw -> optimizer step that its worker started from
reoffered       zset    draw handed back or expired -> itself (lowest first); + 2^52: refused too often, set aside
refusals        hash    draw -> how many of its groups were malformed, until one is accepted
attempts        hash    draw -> its newest attempt, until it is accepted
registry        hash    version, step: the current policy; version -1: none yet; missing: not restored yet
versions        hash    known version -> "<step> <digest>"
manifests       hash    known version -> manifest, JSON
published       hash    "<step> <digest>" -> version; outlives forgotten versions as far back as a learner may go
facts           hash    vocabulary size, digests: what every worker must agree on
documents:NAME  hash    id -> JSON, collections that the control plane owns (evaluation leases, ...)
workers         hash    worker -> "<seen ms> <report>"
worker_expiry   zset    worker -> when its report is dropped, ms
identity        string  which run of this name it is: a random id that also stands in the run's directory
tokens          hash    role -> token of its newest writer
"""

from sapo_learner.errors import ConfigError


class Keys:
    """The names above for one run."""

    def __init__(self, run: str) -> None:
        if not run or set(run) & set("{} \n"):
            raise ConfigError(f"{run!r} cannot be the name of a run", fix="use letters, digits, '-', '_' and '.'")
        self._prefix = f"sapo:{{{run}}}:"

    def __call__(self, *names: str) -> list[str]:
        return [self._prefix + name for name in names]
