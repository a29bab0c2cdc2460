"""Every metric of every process: name, unit, meaning, labels, buckets. docs/metrics.md is made from it.

Names follow the Prometheus conventions: `sapo_`, base units, ratios in [0, 1], `_total` for counters. Every label has a
bounded set of values, whatever the data are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Service = Literal["control-plane", "ingest", "rollout", "learner"]
Kind = Literal["counter", "gauge", "histogram"]

MAX_VALUES = 64
"""Most values of a label that the run's configuration or its workers decide; what is beyond is "other", or left out."""
MAX_DIAGNOSTICS = 512
OTHER = "other"

_AGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)
_STEP_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_RPC_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_TOKENS = tuple(2**power for power in range(18))

OUTCOMES = ("trained", "degenerate", "stale", "invalid", "refused", "skipped")
PHASES = (
    "read", "decode", "collate", "forward", "loss", "backward", "optimizer", "checkpoint", "snapshot", "other",
    "archive", "publish",
)  # fmt: skip
_FINAL = ("accepted", "duplicate", "expired", "invalid")
WAITS = ("lookahead", "max_policy_age", "steps", "not ready", "lease")
FAILED = ("exception", "timeout", "crash", "malformed")
GROUPS = (
    "all", "positive", "negative",
    "age_0", "age_1", "age_2", "age_3_4", "age_5_8", "age_9_16", "age_17_32", "age_33_on",
)  # fmt: skip
"""Of tokens: all, by sign of the advantage, by policy age in optimizer steps (sapo_learner.diagnostics)."""

Labels = Mapping[str, tuple[str, ...] | str]


@dataclass(frozen=True)
class Definition:
    """name: as Prometheus sees it, without a histogram's suffixes. unit: "" for a plain number.

    labels: label -> its values, all of which are there from the start; or in words, who decides them. unknown: a gauge
    that is NaN until there is a figure, and where there is none.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    labels: Labels = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    unknown: bool = False


def _counter(name: str, unit: str, text: str, /, **labels: tuple[str, ...] | str) -> Definition:
    return Definition(name, "counter", unit, text, labels)


def _gauge(name: str, unit: str, text: str, /, **labels: tuple[str, ...] | str) -> Definition:
    return Definition(name, "gauge", unit, text, labels)


def _figure(name: str, unit: str, text: str, /, **labels: tuple[str, ...] | str) -> Definition:
    return Definition(name, "gauge", unit, text, labels, unknown=True)


def _histogram(
    name: str, unit: str, text: str, buckets: tuple[float, ...], /, **labels: tuple[str, ...] | str
) -> Definition:
    return Definition(name, "histogram", unit, text, labels, buckets)


_A_WORKER = f"a worker's name, while it is alive; {MAX_VALUES} of them at most"
_A_COMPONENT = f"as the run's tasks name them; {MAX_VALUES} at most"

_EVERYWHERE = (
    _gauge("sapo_unusable_secret_files", "files",
           "Tokens and certificates that were exchanged for what cannot be used: those of before stay in force"),
)  # fmt: skip
CONTROL_PLANE = (
    *_EVERYWHERE,
    _counter("sapo_leases_granted_total", "leases", "Training leases granted"),
    _gauge("sapo_leases", "leases", "Draws handed out: leased, leased and overdue, waiting to be leased again",
           state=("open", "overdue", "reoffered")),
    _gauge("sapo_oldest_lease_seconds", "seconds", "Age of the oldest open lease; 0 without one"),
    _gauge("sapo_policy_version", "", "Current version of the policy registry"),
    _gauge("sapo_policy_step", "steps", "Optimizer step that the current version comes from"),
    _gauge("sapo_max_policy_age_steps", "steps", "training.max_policy_age"),
    _gauge("sapo_groups_per_step", "groups", "training.groups_per_step"),
    _gauge("sapo_run_steps_left", "steps", "Optimizer steps that the run still has to do"),
    _gauge("sapo_log_accepted_groups", "groups", "Last sequence of the log"),
    _gauge("sapo_log_unread_groups", "groups", "Groups in Redis that the learner has not archived"),
    _gauge("sapo_log_unread_bytes", "bytes", "Their size"),
    _gauge("sapo_log_limit_groups", "groups", "ingest.max_entries: unread groups beyond which nothing is accepted"),
    _gauge("sapo_log_limit_bytes", "bytes", "ingest.max_bytes: unread bytes beyond which nothing is accepted"),
    _gauge("sapo_redis_memory_bytes", "bytes", "Memory that Redis uses"),
    _gauge("sapo_groups_ready", "groups", "Accepted groups that no step has consumed"),
    _gauge("sapo_ledger_groups", "groups", "What became of the accepted groups", outcome=(*OUTCOMES, "backlog")),
    _gauge("sapo_ledger_problems", "", "What keeps the ledger from balancing; 0 when it balances"),
    _gauge("sapo_workers", "", "Rollout workers whose heartbeat is recent"),
    _gauge("sapo_worker_policy_version", "", "Version that a worker serves", worker=_A_WORKER),
    _gauge("sapo_worker_policy_lag_steps", "steps", "How far that is behind the current one", worker=_A_WORKER),
    _gauge("sapo_worker_tokens_per_second", "tokens", "Tokens that a worker samples per second", worker=_A_WORKER),
    _gauge("sapo_worker_heartbeat_age_seconds", "seconds", "Since a worker was last heard of", worker=_A_WORKER),
    _counter("sapo_worker_probe_misses_total", "",
             "Versions that a worker's engine computed otherwise than the learner, as workers have told"),
    _figure("sapo_evaluation_pass_at_1", "ratio", "Held-out pass@1 of the newest evaluation"),
    _figure("sapo_evaluation_step", "steps", "Optimizer step of the policy that it was of"),
    _counter("sapo_record_writer_lost_lines_total", "lines", "Lines of the record that a writer has not taken, by why",
             writer="record.writers", reason=("too slow", "failed")),
    _gauge("sapo_snapshots_bytes", "bytes", "Published snapshots on disk"),
    _gauge("sapo_snapshots_disk_free_bytes", "bytes", "Room left on their disk"),
)  # fmt: skip

INGEST = (
    *_EVERYWHERE,
    _counter("sapo_ingest_acks_total", "groups", "Groups answered, by status", status=(*_FINAL, "full", "not_ready")),
    _counter("sapo_ingest_accepted_bytes_total", "bytes", "Bytes of accepted groups"),
    _gauge("sapo_ingest_streams", "", "Open worker streams"),
    _counter("sapo_ingest_forgotten_groups_total", "groups",
             "Acknowledged groups that Redis has lost since, as this replica found out"),
    _histogram("sapo_ingest_group_seconds", "seconds", "Time from a group's arrival to its ack", _RPC_SECONDS),
)  # fmt: skip

ROLLOUT = (
    *_EVERYWHERE,
    _counter("sapo_rollout_tokens_total", "tokens", "Tokens sampled"),
    _counter("sapo_rollout_groups_total", "groups", "Groups whose ack is final, by status", status=_FINAL),
    _counter("sapo_rollout_responses_total", "responses", "Responses of training, by how they ended",
             finish_reason=("stop", "length")),
    _histogram("sapo_rollout_response_tokens", "tokens", "Tokens per response", _TOKENS),
    _counter("sapo_rollout_mixed_version_responses_total", "responses", "Responses sampled under several versions"),
    _counter("sapo_rollout_dropped_samples_total", "responses", "Responses thrown away, by why",
             reason=("not finite",)),
    _counter("sapo_rollout_scoring_failures_total", "responses", "Scores and replies of a task that failed, by how",
             task="the run's tasks", reason=FAILED),
    _counter("sapo_rollout_waiting_seconds_total", "seconds", "Time without a lease to sample for, by what keeps it",
             reason=WAITS),
    _gauge("sapo_rollout_credits", "groups", "Groups that ingest lets the worker have unacknowledged"),
    _gauge("sapo_rollout_unacknowledged_groups", "groups", "Groups that wait for an ack"),
    _gauge("sapo_rollout_policy_version", "", "Version that this worker serves, once its engine was found to agree"),
    _histogram("sapo_weight_sync_seconds", "seconds", "From hearing of a version to serving it", _RPC_SECONDS),
    _counter("sapo_weight_sync_bytes_total", "bytes", "Bytes of snapshots fetched"),
    _counter("sapo_weight_sync_failures_total", "", "Versions that could not be fetched or verified"),
    _figure("sapo_rollout_probe_max_abs_difference", "nats",
            "Engine against learner on the newest version's probe, largest"),
    _figure("sapo_rollout_probe_mean_abs_difference", "nats", "The same, mean"),
    _counter("sapo_rollout_probe_misses_total", "", "Versions that the engine computes otherwise than the learner"),
)  # fmt: skip

LEARNER = (
    *_EVERYWHERE,
    _gauge("sapo_learner_step", "steps", "Optimizer steps done"),
    _counter("sapo_learner_groups_total", "groups", "Groups consumed, by outcome", outcome=OUTCOMES),
    _counter("sapo_learner_tokens_total", "tokens", "Tokens trained on"),
    _counter("sapo_learner_waiting_seconds_total", "seconds", "Time without enough groups for a step"),
    _figure("sapo_learner_reward", "", "Mean reward of the last step's responses"),
    _figure("sapo_learner_reward_component", "", "Mean of each named reward over them", component=_A_COMPONENT),
    _figure("sapo_learner_entropy_nats", "nats", "Mean entropy per token of the current policy"),
    _figure("sapo_learner_gradient_norm", "", "Global gradient norm before clipping"),
    _histogram("sapo_learner_policy_age_steps", "steps", "Mean policy age of a step's tokens", _AGES),
    _figure("sapo_learner_policy_age_max_steps", "steps", "Largest policy age among the last step's tokens"),
    _figure("sapo_learner_log_ratio_mean_nats", "nats", "Mean of current over behaviour log-prob per token",
            group=GROUPS),
    _figure("sapo_learner_log_ratio_std_nats", "nats", "Its spread", group=GROUPS),
    _figure("sapo_learner_clamped_ratio", "ratio", "Tokens whose log-ratio was cut off", group=GROUPS),
    _figure("sapo_learner_importance_ratio", "", "Mean importance ratio", group=GROUPS),
    _figure("sapo_learner_kl_nats", "nats", "KL(behaviour || current), k3 estimate", group=GROUPS),
    _figure("sapo_learner_gate_weight", "ratio", "Mean gate weight; NaN for an objective without a gate",
            group=GROUPS),
    _figure("sapo_learner_coefficient", "", "What is left of the plain policy gradient, for which it is 1",
            group=GROUPS),
    _figure("sapo_learner_effective_sample_size_ratio", "ratio", "Tokens that would, all weighted alike, tell as much",
            group=GROUPS),
    _figure("sapo_objective_diagnostic", "", "Whatever else objective, filters and model say of a step's tokens",
            name=f"as these name them; {MAX_DIAGNOSTICS} with their groups at most",
            group="of tokens, or of what the name says"),
    _histogram("sapo_learner_step_seconds", "seconds", "Time of one optimizer step", _STEP_SECONDS),
    _histogram("sapo_learner_phase_seconds", "seconds", "Time of each phase of a step", _STEP_SECONDS, phase=PHASES),
    _figure("sapo_learner_phase_memory_bytes", "bytes",
            "Most memory in each phase of the last step: allocated on the GPU, or resident", phase=PHASES),
    _figure("sapo_learner_flops_per_second", "", "Model FLOPs of the last step, of all ranks; NaN: not known"),
    _figure("sapo_learner_mfu", "ratio", "Share of the hardware's peak that these are; NaN: not known"),
    _histogram("sapo_publish_seconds", "seconds", "Time to publish a snapshot", _RPC_SECONDS),
    _counter("sapo_publish_bytes_total", "bytes", "Bytes of published snapshots"),
    _gauge("sapo_checkpoint_step", "steps", "Optimizer step of the newest checkpoint"),
    _gauge("sapo_checkpoint_timestamp_seconds", "seconds", "Unix time at which that was saved, or resumed"),
    _gauge("sapo_checkpoints_bytes", "bytes", "Checkpoints on disk"),
    _gauge("sapo_archive_bytes", "bytes", "Archive on disk"),
    _gauge("sapo_learner_disk_free_bytes", "bytes", "Room left on the disk of checkpoints and archive"),
    _figure("sapo_probe_behaviour_logprob_max_abs_diff", "nats",
            "Recorded against recomputed behaviour log-probs, last probe"),
)  # fmt: skip

METRICS: Mapping[Service, tuple[Definition, ...]] = {
    "control-plane": CONTROL_PLANE,
    "ingest": INGEST,
    "rollout": ROLLOUT,
    "learner": LEARNER,
}
