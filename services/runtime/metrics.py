"""Every metric of every process, in one file. Names follow the Prometheus conventions: base units, `_total` counters.

A process builds the one class that is its own; a metric observes reports and never steers anything. No label grows with
the data.
"""

import math
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

_AGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)
_STEP_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_RPC_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_TOKENS = tuple(2**power for power in range(0, 18))


class _Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)


class ControlPlaneMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.leases = self._counter("sapo_leases_granted", "Training leases granted")
        self.version = self._gauge("sapo_policy_version", "Current version of the policy registry")
        self.open_leases = self._gauge("sapo_leases_open", "Training leases that are neither used nor handed back")
        self.accepted = self._gauge("sapo_log_accepted_groups", "Last sequence of the log")
        self.unread = self._gauge("sapo_log_unread_groups", "Groups in Redis that the learner has not archived")
        self.ready = self._gauge("sapo_groups_ready", "Accepted groups that no step has consumed")
        self.workers = self._gauge("sapo_workers", "Rollout workers whose heartbeat is recent")
        self.pass_at_1 = self._gauge("sapo_evaluation_pass_at_1", "Held-out pass@1 of the newest evaluation")
        self.writer_lost = self._counter(
            "sapo_record_writer_lost_lines", "Lines of the record that a writer has not taken, by why",
            ("writer", "reason"),
        )  # fmt: skip

    def observe(self, status: Mapping[str, Any]) -> None:
        self.version.set(status["version"] or 0)
        self.open_leases.set(status["open_leases"])
        self.accepted.set(status["accepted"])
        self.unread.set(status["unread"])
        self.ready.set(status["groups_ready"])
        self.workers.set(len(status["workers"]))
        if status["evaluations"]:
            self.pass_at_1.set(status["evaluations"][-1]["pass_at_1"])


class IngestMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.acks = self._counter("sapo_ingest_acks", "Groups answered, by status", ("status",))
        self.bytes = self._counter("sapo_ingest_accepted_bytes", "Bytes of accepted groups")
        self.streams = self._gauge("sapo_ingest_streams", "Open worker streams")
        self.forgotten = self._counter(
            "sapo_ingest_forgotten_groups", "Acknowledged groups that Redis has lost since, as this replica found out"
        )
        self.seconds = self._histogram(
            "sapo_ingest_group_seconds", "Time from a group's arrival to its ack", _RPC_SECONDS
        )


class RolloutMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = self._counter("sapo_rollout_tokens", "Tokens sampled")
        self.groups = self._counter("sapo_rollout_groups", "Groups whose ack is final, by status", ("status",))
        self.version = self._gauge("sapo_rollout_policy_version", "Version that this worker serves")
        self.waiting = self._counter(
            "sapo_rollout_waiting_seconds", "Time without a lease to sample for, by what kept one back", ("reason",)
        )
        self.response_tokens = self._histogram("sapo_rollout_response_tokens", "Tokens per response", _TOKENS)
        self.mixed = self._counter(
            "sapo_rollout_mixed_version_responses", "Responses sampled under more than one version"
        )
        self.sync_seconds = self._histogram(
            "sapo_weight_sync_seconds", "From hearing of a version to serving it", _RPC_SECONDS
        )
        self.sync_failures = self._counter(
            "sapo_weight_sync_failures", "Versions that could not be fetched or verified"
        )
        self.probe_max = self._gauge(
            "sapo_rollout_probe_max_abs_difference",
            "Engine against learner on the newest version's probe, nats, largest",
        )
        self.probe_mean = self._gauge(
            "sapo_rollout_probe_mean_abs_difference", "Engine against learner on the newest version's probe, nats, mean"
        )
        self.probe_misses = self._counter(
            "sapo_rollout_probe_misses", "Versions that the engine computes otherwise than the learner"
        )
        self.scoring_failures = self._counter(
            "sapo_rollout_scoring_failures", "Scores and replies of a task that failed, by how", ("task", "reason")
        )
        self.dropped = self._counter("sapo_rollout_dropped_samples", "Responses thrown away, by why", ("reason",))


class LearnerMetrics(_Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.step = self._gauge("sapo_learner_step", "Optimizer steps done")
        self.groups = self._counter("sapo_learner_groups", "Groups consumed, by outcome", ("outcome",))
        self.tokens = self._counter("sapo_learner_tokens", "Tokens trained on")
        self.reward = self._gauge("sapo_learner_reward", "Mean reward of the last step's responses")
        self.age = self._histogram("sapo_learner_policy_age_steps", "Mean policy age of a step's tokens", _AGES)
        self.step_seconds = self._histogram("sapo_learner_step_seconds", "Time of one optimizer step", _STEP_SECONDS)
        self.phase_seconds = self._histogram(
            "sapo_learner_phase_seconds", "Time of each phase of a step", _STEP_SECONDS, ("phase",)
        )
        self.phase_memory = self._gauge(
            "sapo_learner_phase_memory_bytes",
            "Most memory in each phase of the last step: allocated on the GPU, or resident",
            ("phase",),
        )
        self.flops = self._gauge(
            "sapo_learner_flops_per_second", "Model FLOPs of the last step, of all ranks; NaN: not known"
        )
        self.mfu = self._gauge("sapo_learner_mfu", "Share of the hardware's peak that these are; NaN: not known")
        self.waiting = self._counter("sapo_learner_waiting_seconds", "Time without enough groups for a step")
        self.gradient_norm = self._gauge("sapo_learner_gradient_norm", "Global gradient norm before clipping")
        self.entropy = self._gauge("sapo_learner_entropy_nats", "Mean entropy per token of the current policy")
        self.log_ratio_std = self._gauge(
            "sapo_learner_log_ratio_std", "Spread of current over behaviour log-prob per token"
        )
        self.diagnostics = self._gauge(
            "sapo_objective_diagnostic",
            "What the objective did to a step's tokens, by sign of advantage or policy age",
            ("name", "group"),
        )
        self.checkpoint = self._gauge("sapo_checkpoint_step", "Optimizer step of the newest checkpoint")
        self.archive_bytes = self._gauge("sapo_archive_bytes", "Size of the archive on disk")
        self.probe = self._gauge(
            "sapo_probe_behaviour_logprob_max_abs_diff", "Recorded against recomputed behaviour log-probs, last probe"
        )
        self.publish_seconds = self._histogram("sapo_publish_seconds", "Time to publish a snapshot", _RPC_SECONDS)

    def observe(self, record: Mapping[str, Any]) -> None:
        """record: the step's line as the learner reports it."""
        self.step.set(record["step"])
        for outcome, count in record["outcomes"].items():
            self.groups.labels(outcome).inc(count)
        self.tokens.inc(record["tokens"])
        self.reward.set(record["reward"])
        self.age.observe(record["policy_age_mean"])
        self.step_seconds.observe(record["ended"] - record["started"])
        self.waiting.inc(record["waited_seconds"])
        for phase, seconds in record["seconds"].items():
            self.phase_seconds.labels(phase).observe(seconds)
        for phase, held in record["memory_bytes"].items():
            self.phase_memory.labels(phase).set(held)
        self.flops.set(_known(record["flops_per_second"]))
        self.mfu.set(_known(record.get("mfu")))
        self.gradient_norm.set(record["gradient_norm"])
        self.entropy.set(record["entropy"])
        self.log_ratio_std.set(record["log_ratio_std"])
        for name, groups in record["diagnostics"].items():
            for group, value in groups.items():
                self.diagnostics.labels(name, group).set(value)


def _known(value: float | None) -> float:
    return math.nan if value is None else value
