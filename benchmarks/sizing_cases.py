"""The arithmetic of benchmarks.sizing: shapes of runs, what was measured, and what follows from both."""

import math
import re
import statistics
from dataclasses import dataclass

DAY = 86_400  # seconds
RECORD_BYTES = 2_700  # of record.jsonl per step: docs/recovery.md
PEAK_FLOPS, MFU = 989e12, 0.25  # H100 SXM in bfloat16, dense, by its data sheet; the share of it that is assumed
NIC_BYTES = 25e9 / 8  # of the control plane's machine, assumed: 25 Gbit/s
KEPT_CHECKPOINTS = 3 + 1 + 1  # checkpoint.keep, that of step 0, and the one being written


@dataclass(frozen=True)
class Shape:
    """A run. active: parameters that a token meets. tensors: of the model. rollout_tokens: per GPU and second, assumed.
    rate: tokens per second of the whole run, where measured."""

    name: str
    parameters: float
    active: float
    tensors: int
    vocabulary: int
    learner_gpus: float
    workers: int
    gpus_per_worker: float
    rollout_tokens: float
    response_tokens: float
    groups_per_step: int
    group_size: int = 8
    max_policy_age: int = 4
    rate: float = 0.0


SHAPES = [
    Shape("demo, on a CPU", 0.2e6, 0.2e6, 24, 32, 0, 2, 0, 0, 6.72, 32),
    Shape("0.6B, 1 GPU", 0.596e9, 0.596e9, 310, 151_936, 0.5, 1, 0.5, 10_000, 512, 32),
    Shape("8B, 8 GPUs", 8.19e9, 8.19e9, 399, 151_936, 4, 4, 1, 3_000, 2_048, 64),
    Shape("30B MoE (3B active), 64 GPUs", 30.5e9, 3.3e9, 18_867, 151_936, 16, 6, 8, 3_000, 4_096, 128),
]


@dataclass(frozen=True)
class Bytes:
    """What is measured. wire, redis, archive: per sampled token; snapshot, checkpoint: per parameter; manifest: per
    tensor; upload, download: per CPU second of the control plane."""

    wire: float
    redis: float
    archive: float
    snapshot: float
    checkpoint: float
    manifest: float
    upload: float
    download: float


@dataclass(frozen=True)
class Sizing:
    """A shape's sizes, in bytes, seconds and tokens per second."""

    shape: Shape
    measured: Bytes
    mfu: float = MFU

    @property
    def tokens_per_second(self) -> float:
        """Of the slower side."""
        shape = self.shape
        if shape.rate:
            return shape.rate
        sampled = shape.workers * shape.gpus_per_worker * shape.rollout_tokens
        return min(sampled, shape.learner_gpus * self.mfu * PEAK_FLOPS / (6 * shape.active))

    @property
    def group_tokens(self) -> float:
        return self.shape.group_size * self.shape.response_tokens

    @property
    def step_seconds(self) -> float:
        return self.shape.groups_per_step * self.group_tokens / self.tokens_per_second

    @property
    def snapshot(self) -> float:
        return self.shape.parameters * self.measured.snapshot

    @property
    def publish_seconds(self) -> float:
        """Until every worker has a version: its upload, then all downloads through one door."""
        download = min(self.measured.download, NIC_BYTES)  # per second of one core: the event loop has no more
        return self.snapshot / min(self.measured.upload, NIC_BYTES) + self.shape.workers * self.snapshot / download

    @property
    def publish_every(self) -> int:
        """The least at which a version is everywhere before the next one is due."""
        return max(1, math.ceil(self.publish_seconds / self.step_seconds))

    @property
    def interval(self) -> float:
        return self.publish_every * self.step_seconds

    @property
    def log_rate(self) -> float:
        return self.tokens_per_second * self.measured.wire

    @property
    def control_plane_rate(self) -> float:
        """In and out, with snapshots in its own directory."""
        return (1 + self.shape.workers) * self.snapshot / self.interval

    @property
    def object_storage_rate(self) -> float:
        """In and out if snapshots lay elsewhere: manifests alone."""
        return (1 + self.shape.workers) * self.shape.tensors * self.measured.manifest / self.interval

    @property
    def redis_most(self) -> float:
        """All that pacing lets be unread, which takes a learner that is stopped."""
        age = max(self.shape.max_policy_age, self.publish_every - 1)  # publishing no oftener wants that
        groups = (age + 1) * self.shape.groups_per_step
        return groups * self.group_tokens * self.measured.redis

    @property
    def archive_per_day(self) -> float:
        return DAY * self.tokens_per_second * self.measured.archive

    @property
    def record_per_day(self) -> float:
        return DAY / self.step_seconds * RECORD_BYTES

    @property
    def snapshots(self) -> float:
        """Those kept (max_policy_age + 2, in versions), and one on its way."""
        return (self.shape.max_policy_age + 3) * self.snapshot

    @property
    def checkpoints(self) -> float:
        return KEPT_CHECKPOINTS * self.shape.parameters * self.measured.checkpoint

    @property
    def learner_disk(self) -> float:
        """Checkpoints, a snapshot in staging, the model as it was fetched."""
        return self.checkpoints + 2 * self.snapshot


def demo_rate(end_to_end: str, groups_per_step: int, tokens: float) -> float:
    """Tokens per second of the demo, the median of its seeds in results/end_to_end.md."""
    rows = re.findall(r"^\| \d+ \| ours \|.*\|$", end_to_end, re.MULTILINE)
    cells = [[each.strip() for each in row.strip("|").split("|")] for row in rows]
    steps_per_second = [(int(each[3]) - 1) / float(each[9]) for each in cells]
    return statistics.median(steps_per_second) * groups_per_step * tokens


def human(size: float) -> str:
    """Bytes in powers of ten, as networks and disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError
