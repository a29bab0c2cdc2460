"""What each process tells Prometheus: how reports become the values of what `metric_definitions` defines.

A process builds the one class that is its own; a metric observes reports and never steers anything. No label grows with
the data.
"""

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from services.runtime.disk_usage import DiskUsage
from services.runtime.metric_definitions import GROUPS, MAX_DIAGNOSTICS, MAX_VALUES, OUTCOMES
from services.runtime.metric_registry import Bounded, Metrics

if TYPE_CHECKING:
    from services.runtime.settings import RunConfig


class ControlPlaneMetrics(Metrics):
    service = "control-plane"

    def __init__(self) -> None:
        super().__init__()
        self.leases = self._counter("sapo_leases_granted_total")
        self.probe_misses = self._counter("sapo_worker_probe_misses_total")
        self.writer_lost = self._counter("sapo_record_writer_lost_lines_total")

    def configured(self, config: "RunConfig") -> None:
        """What the others are compared with."""
        self._gauge("sapo_max_policy_age_steps").set(config.training.max_policy_age)
        self._gauge("sapo_groups_per_step").set(config.training.groups_per_step)
        self._gauge("sapo_log_limit_groups").set(config.ingest.max_entries)
        self._gauge("sapo_log_limit_bytes").set(config.ingest.max_bytes)

    def observe(self, status: Mapping[str, Any], ledger: Mapping[str, Any], snapshots: DiskUsage) -> None:
        """status, ledger: as the control plane answers them."""
        for name, value in {
            "sapo_policy_version": status["version"] or 0,
            "sapo_policy_step": status["published_step"] or 0,
            "sapo_run_steps_left": max(0, status["steps"] - status["learner"]["step"]),
            "sapo_oldest_lease_seconds": status["oldest_lease_seconds"],
            "sapo_log_accepted_groups": status["accepted"],
            "sapo_log_unread_groups": status["unread"],
            "sapo_log_unread_bytes": status["unread_bytes"],
            "sapo_redis_memory_bytes": status["redis_memory_bytes"],
            "sapo_groups_ready": status["groups_ready"],
            "sapo_ledger_problems": len(ledger["problems"]),
            "sapo_snapshots_bytes": snapshots.used_bytes,
            "sapo_snapshots_disk_free_bytes": snapshots.free_bytes,
        }.items():
            self._gauge(name).set(value)
        leases, overdue = self._gauge("sapo_leases"), status["overdue_leases"]
        leases.labels("open").set(status["open_leases"] - overdue)
        leases.labels("overdue").set(overdue)
        leases.labels("reoffered").set(status["reoffered"])
        for outcome in (*OUTCOMES, "backlog"):
            self._gauge("sapo_ledger_groups").labels(outcome).set(ledger.get(outcome, 0))
        if status["evaluations"]:
            newest = status["evaluations"][-1]
            self._gauge("sapo_evaluation_pass_at_1").set(newest["pass_at_1"])
            self._gauge("sapo_evaluation_step").set(newest["step"])
        self._observe_workers(status["workers"], status["published_step"] or 0)

    def _observe_workers(self, workers: list[dict[str, Any]], step: int) -> None:
        """Series of those alive and of no other: a name may never come again."""
        self._gauge("sapo_workers").set(len(workers))
        figures = {
            "sapo_worker_policy_version": [each["version"] for each in workers],
            "sapo_worker_policy_lag_steps": [max(0, step - each["step"]) for each in workers],
            "sapo_worker_tokens_per_second": [each["tokens_per_second"] for each in workers],
            "sapo_worker_heartbeat_age_seconds": [each["age_seconds"] for each in workers],
        }
        for name, values in figures.items():
            gauge = self._gauge(name)
            gauge.clear()
            for worker, value in list(zip(workers, values, strict=True))[:MAX_VALUES]:
                gauge.labels(worker["worker"]).set(value)


class IngestMetrics(Metrics):
    service = "ingest"

    def __init__(self) -> None:
        super().__init__()
        self.acks = self._counter("sapo_ingest_acks_total")
        self.bytes = self._counter("sapo_ingest_accepted_bytes_total")
        self.streams = self._gauge("sapo_ingest_streams")
        self.forgotten = self._counter("sapo_ingest_forgotten_groups_total")
        self.seconds = self._histogram("sapo_ingest_group_seconds")


class RolloutMetrics(Metrics):
    service = "rollout"

    def __init__(self) -> None:
        super().__init__()
        self.tokens = self._counter("sapo_rollout_tokens_total")
        self.groups = self._counter("sapo_rollout_groups_total")
        self.responses = self._counter("sapo_rollout_responses_total")
        self.version = self._gauge("sapo_rollout_policy_version")
        self.waiting = self._counter("sapo_rollout_waiting_seconds_total")
        self.credits = self._gauge("sapo_rollout_credits")
        self.unacknowledged = self._gauge("sapo_rollout_unacknowledged_groups")
        self.response_tokens = self._histogram("sapo_rollout_response_tokens")
        self.mixed = self._counter("sapo_rollout_mixed_version_responses_total")
        self.sync_seconds = self._histogram("sapo_weight_sync_seconds")
        self.sync_bytes = self._counter("sapo_weight_sync_bytes_total")
        self.sync_failures = self._counter("sapo_weight_sync_failures_total")
        self.probe_max = self._gauge("sapo_rollout_probe_max_abs_difference")
        self.probe_mean = self._gauge("sapo_rollout_probe_mean_abs_difference")
        self.probe_misses = self._counter("sapo_rollout_probe_misses_total")
        self.scoring_failures = self._counter("sapo_rollout_scoring_failures_total")
        self.dropped = self._counter("sapo_rollout_dropped_samples_total")


OF_TOKENS = {
    "log_ratio": "sapo_learner_log_ratio_mean_nats",
    "log_ratio_std": "sapo_learner_log_ratio_std_nats",
    "clamped": "sapo_learner_clamped_ratio",
    "importance_ratio": "sapo_learner_importance_ratio",
    "kl": "sapo_learner_kl_nats",
    "gate": "sapo_learner_gate_weight",
    "coefficient": "sapo_learner_coefficient",
    "effective_sample_size": "sapo_learner_effective_sample_size_ratio",
}
"""Diagnostic of every objective -> metric, by group of tokens. All other diagnostics are one metric together."""


class LearnerMetrics(Metrics):
    service = "learner"

    def __init__(self) -> None:
        super().__init__()
        self.probe = self._gauge("sapo_probe_behaviour_logprob_max_abs_diff")
        self.publish_seconds = self._histogram("sapo_publish_seconds")
        self.publish_bytes = self._counter("sapo_publish_bytes_total")
        self._components = Bounded(self._gauge("sapo_learner_reward_component"), MAX_VALUES)
        self._others = Bounded(self._gauge("sapo_objective_diagnostic"), MAX_DIAGNOSTICS)
        self._waited = 0.0
        self._saved_step: int | None = None

    def at(self, step: int, saved_step: int) -> None:
        """Where training stands, and of which step the newest checkpoint is."""
        self._gauge("sapo_learner_step").set(step)
        if saved_step != self._saved_step:
            self._saved_step = saved_step
            self._gauge("sapo_checkpoint_step").set(saved_step)
            self._gauge("sapo_checkpoint_timestamp_seconds").set(time.time())

    def waited(self, seconds: float) -> None:
        """seconds: without enough groups since the process started, those of a wait that goes on included."""
        self._counter("sapo_learner_waiting_seconds_total").inc(max(0.0, seconds - self._waited))
        self._waited = max(self._waited, seconds)

    def observe_disk(self, checkpoints: DiskUsage, archive: DiskUsage) -> None:
        self._gauge("sapo_checkpoints_bytes").set(checkpoints.used_bytes)
        self._gauge("sapo_archive_bytes").set(archive.used_bytes)
        self._gauge("sapo_learner_disk_free_bytes").set(archive.free_bytes)

    def observe(self, record: Mapping[str, Any]) -> None:
        """record: the step's line as the learner reports it."""
        for outcome, count in record["outcomes"].items():
            self._counter("sapo_learner_groups_total").labels(outcome).inc(count)
        self._counter("sapo_learner_tokens_total").inc(record["tokens"])
        for name, value in {
            "sapo_learner_reward": record["reward"],
            "sapo_learner_gradient_norm": record["gradient_norm"],
            "sapo_learner_entropy_nats": record["entropy"],
            "sapo_learner_policy_age_max_steps": record["policy_age_max"],
            "sapo_learner_flops_per_second": record["flops_per_second"],
            "sapo_learner_mfu": record.get("mfu"),
        }.items():
            self._gauge(name).set(_known(value))
        for component, value in record["rewards"].items():
            self._components.labels(component).set(value)
        self._histogram("sapo_learner_policy_age_steps").observe(record["policy_age_mean"])
        self._observe_costs(record)
        self._observe_diagnostics(record["diagnostics"])

    def _observe_costs(self, record: Mapping[str, Any]) -> None:
        self._histogram("sapo_learner_step_seconds").observe(record["ended"] - record["started"])
        for phase, seconds in record["seconds"].items():
            self._histogram("sapo_learner_phase_seconds").labels(phase).observe(seconds)
        for phase, held in record["memory_bytes"].items():
            self._gauge("sapo_learner_phase_memory_bytes").labels(phase).set(held)

    def _observe_diagnostics(self, diagnostics: Mapping[str, Mapping[str, float]]) -> None:
        for name, metric in OF_TOKENS.items():
            figures = diagnostics.get(name, {})
            for group in GROUPS:  # of one without tokens in this step, nothing is known
                self._gauge(metric).labels(group).set(_known(figures.get(group)))
        for name, groups in diagnostics.items():
            if name not in OF_TOKENS:
                for group, value in groups.items():
                    self._others.labels(name, group).set(value)


def _known(value: float | None) -> float:
    return math.nan if value is None else value
