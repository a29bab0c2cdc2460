"""benchmarks/results/sizing.md from the figures of benchmarks.sizing."""

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from benchmarks.machine import machine
from benchmarks.sizing_cases import KEPT_CHECKPOINTS, NIC_BYTES, PEAK_FLOPS, Bytes, Sizing, human

GROUPS = "groups of 8 synthetic responses, 512 tokens on average, ids by Zipf's law, all digits of the log-probs"
TEXT = """\
# How large the parts of a deployment must be

    {command}

Computed, for the shapes below, from bytes and speeds that were measured and from assumptions that are named. Set your
own with the options of `python -m benchmarks.sizing --help`; no GPU was measured.

## Measured

{date}, {where}; the machine's load meanwhile: {load:.1f}.

{measured}

## Assumed

{assumed}

The learner trains at {mfu:.0%} of {peak:.0f} TFLOP/s per GPU and 6 FLOPs per active parameter and token. The control
plane's network carries {nic} per second. `max_policy_age` is {age}, `checkpoint.keep` 3, the archive keeps everything.
Its files go
in and out with one core at most, and its disk must take what comes in. The demo's tokens per second are those of
[end_to_end.md](end_to_end.md), its tokens per response those of [overload.md](overload.md).

## Traffic

One publish is a whole snapshot, to every worker, through the control plane. Every: the least `pacing.publish_every` at
which all workers have a version before the next is due; the bytes per second are at that. It wants
`pacing.lookahead` and `training.max_policy_age` of at least that less 1. With object storage the control plane would
carry manifests alone; **that is not supported yet**.

{traffic}

## Memory and disk

Redis, usual: a group from each worker, since the learner archives what comes in at once. At most: what pacing lets be
unread while the learner is stopped; `ingest.max_bytes` (1 GiB by default) bounds it, too, and sampling waits beyond.
Snapshots: the control plane's disk. Learner's disk: {kept} checkpoints (kept, of step 0, being written), a snapshot in
staging and the model; its archive comes on top, per day.

{storage}
"""


def report(sizings: Sequence[Sizing], *, command: str) -> str:
    measured = sizings[-1].measured
    return TEXT.format(
        command=command, date=datetime.now(UTC).date(), where=machine(), load=os.getloadavg()[0],
        mfu=sizings[-1].mfu, peak=PEAK_FLOPS / 1e12, nic=human(NIC_BYTES), age=sizings[-1].shape.max_policy_age,
        kept=KEPT_CHECKPOINTS,
        measured=_table(["what", "measured on", "figure"], _measured(measured)),
        assumed=_table(["shape", "parameters (active)", "GPUs: learner + workers", "tokens/s per sampling GPU",
                        "tokens per response", "groups x responses per step"], map(_assumed, sizings)),
        traffic=_table(["shape", "tokens/s", "step", "through ingest and Redis", "snapshot", "publish to all", "every",
                        "control plane, own directory", "with object storage"], map(_traffic, sizings)),
        storage=_table(["shape", "Redis, usual", "Redis, at most", "snapshots", "one checkpoint", "learner's disk",
                        "archive per day", "record.jsonl per day"], map(_storage, sizings)),
    )  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)).replace("| --- ", "|---")


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _measured(found: Bytes) -> list[list[str]]:
    return [
        ["wire, and Redis' payload", GROUPS, f"{found.wire:.2f} bytes per sampled token"],
        ["Redis' memory", "the same, in a valkey-server", f"{found.redis:.2f} bytes per sampled token"],
        ["archive", "the same, appended group by group", f"{found.archive:.2f} bytes per sampled token"],
        ["snapshot", "a Qwen3 of 5 million parameters in bfloat16", f"{found.snapshot:.3f} bytes per parameter"],
        ["checkpoint", "the same after a step: weights and AdamW's moments in float32",
         f"{found.checkpoint:.3f} bytes per parameter"],
        ["manifest", "the same", f"{found.manifest:.0f} bytes per tensor"],
        ["upload to the control plane", "256 MiB, digest verified", f"{human(found.upload)} per second of its CPU"],
        ["download from it", "256 MiB by each of four at once", f"{human(found.download)} per second of its CPU"],
    ]  # fmt: skip


def _assumed(each: Sizing) -> list[str]:
    shape = each.shape
    gpus = f"{shape.learner_gpus:g} + {shape.workers} x {shape.gpus_per_worker:g}" if shape.learner_gpus else "none"
    return [shape.name, f"{shape.parameters / 1e9:.3g}B ({shape.active / 1e9:.3g}B)", gpus,
            f"{shape.rollout_tokens:,.0f}" if shape.rollout_tokens else "measured",
            f"{shape.response_tokens:g}", f"{shape.groups_per_step} x {shape.group_size}"]  # fmt: skip


def _traffic(each: Sizing) -> list[str]:
    return [each.shape.name, f"{each.tokens_per_second:,.0f}", _seconds(each.step_seconds),
            f"{human(each.log_rate)}/s", human(each.snapshot), _seconds(each.publish_seconds),
            str(each.publish_every), f"{human(each.control_plane_rate)}/s",
            f"{human(each.object_storage_rate)}/s"]  # fmt: skip


def _storage(each: Sizing) -> list[str]:
    usual = each.shape.workers * each.group_tokens * each.measured.redis
    checkpoint = each.shape.parameters * each.measured.checkpoint
    return [each.shape.name, human(usual), human(each.redis_most), human(each.snapshots), human(checkpoint),
            human(each.learner_disk), human(each.archive_per_day), human(each.record_per_day)]  # fmt: skip
