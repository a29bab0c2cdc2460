"""How large a deployment's parts must be: arithmetic over measured bytes and assumed speeds, into results/sizing.md.

    python -m benchmarks.sizing                                  measures, and writes the table
    python -m benchmarks.sizing --rollout-tokens 5000 --mfu 0.3  with speeds of yours

What is measured here and what is assumed is said in the table; speeds of GPUs are all assumed.
"""

import argparse
import asyncio
from dataclasses import replace
from pathlib import Path

from benchmarks.sizing_cases import MFU, SHAPES, Bytes, Shape, Sizing, demo_rate
from benchmarks.sizing_report import report

RESULTS = Path(__file__).parent / "results"


def measure() -> Bytes:
    from benchmarks.learner_sides import Job, policy_of
    from benchmarks.sizing_measured import control_plane_speed, groups, log_bytes, policy_bytes

    log = log_bytes(groups(512, 151_936, 8))
    policy = policy_bytes(policy_of(Job("equal", 64, 128, 256, 4, 8_192, 4_096)))
    speed = asyncio.run(control_plane_speed())
    # As the report says them, so that whoever has the report can compute what is in it.
    return Bytes(
        *(round(each, 2) for each in (log.wire, log.redis, log.archive)),
        *(round(each, 3) for each in (policy.snapshot, policy.checkpoint)), round(policy.manifest),
        *(round(each, -6) for each in (speed.upload, speed.download)),
    )  # fmt: skip


def chosen(arguments: argparse.Namespace) -> list[Shape]:
    """The shapes with what the command line says of those that have GPUs."""
    given = {
        name: value for name in ("rollout_tokens", "response_tokens", "groups_per_step", "workers", "max_policy_age")
        if (value := getattr(arguments, name)) is not None
    }  # fmt: skip
    demo, *others = SHAPES
    text = (RESULTS / "end_to_end.md").read_text()
    rate = demo_rate(text, demo.groups_per_step, demo.group_size * demo.response_tokens)
    return [replace(demo, rate=rate), *(replace(each, **given) for each in others)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollout-tokens", type=float, help="tokens per second of one sampling GPU")
    parser.add_argument("--response-tokens", type=float, help="tokens of a response, on average")
    parser.add_argument("--groups-per-step", type=int)
    parser.add_argument("--workers", type=int, help="rollout workers")
    parser.add_argument("--max-policy-age", type=int)
    parser.add_argument("--mfu", type=float, default=MFU, help="share of the peak at which the learner trains")
    parser.add_argument("--out", type=Path, default=RESULTS / "sizing.md")
    arguments = parser.parse_args()
    measured = measure()
    sizings = [Sizing(shape, measured, arguments.mfu) for shape in chosen(arguments)]
    text = report(sizings, command="python -m benchmarks.sizing")
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
