"""What an operator sees of an archive, and what may be changed in it by hand."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from sapo_learner import checkpoint, skips
from sapo_learner.archive import Archive, Entry
from sapo_learner.config import LearnerSettings
from sapo_learner.control import settings_of
from sapo_learner.errors import ConfigError, Mismatch, NotFound, Unavailable
from sapo_learner.ledger import Ledger
from sapo_learner.policy import tiny_policy, write_policy
from services import archive_tools
from services.run_directory import audit_run
from services.runstore import EmbeddedRedis, Pacing, RunStore
from services.runtime.settings import RunConfig, dump_config
from services.wire import encode
from tests.recorded import ALPHABET, entries, random_group
from tests.small_run import group, run_config, trajectory

GROUPS = 8
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PACING = Pacing(groups_per_step=10, lookahead=8, max_policy_age=8, steps=100, lease_seconds=30, max_lease_seconds=60)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    config = run_config(tmp_path / "run")
    config.run.directory.mkdir()
    (config.run.directory / "run.yaml").write_text(dump_config(config))
    return config


@pytest.fixture
def run(config: RunConfig) -> Path:
    """A stopped run with a control entry in the middle of eight groups, in several segments."""
    directory = config.run.directory
    payloads = [encode(replace(random_group(draw), traceparent=TRACE)) for draw in range(GROUPS)]
    fill(directory, entries([*payloads[:4], config.learner, *payloads[4:]]))
    return directory


def fill(directory: Path, log: list[Entry], *, token: int = 1) -> None:
    with Archive(directory / "archive", token, segment_bytes=1200) as archive:
        for entry in log:
            archive.append([entry])


def save(
    directory: Path, step: int, last: Entry | None, *, token: int = 1, settings: LearnerSettings | None = None
) -> Path:
    """A checkpoint that has consumed everything up to `last`."""
    state = checkpoint.CheckpointState(
        step=step, cursor=last.sequence if last else 0, chain=last.chain if last else "0" * 40,
        ledger=Ledger(trained=last.sequence - 1, control=1).to_dict() if last else Ledger().to_dict(),
        model={"w": torch.zeros(1)}, optimizer={"w": torch.zeros(1)}, rng={"torch": torch.get_rng_state()},
        extra={"settings": settings_of(settings or LearnerSettings())},
    )  # fmt: skip
    return checkpoint.save(directory / "checkpoints", state, token=token)


def held(directory: Path) -> list[Entry]:
    return list(Archive(directory / "archive", None).entries())


# ---- stats


def test_stats_add_up(run: Path) -> None:
    found, groups, log = archive_tools.stats(run), [random_group(draw) for draw in range(GROUPS)], held(run)
    responses = [each for group in groups for each in group.trajectories]
    assert (found["entries"], found["groups"], found["controls"], found["invalid"]) == (9, 8, 1, 0)
    assert found["responses"] == len(responses)
    assert found["tokens"] == sum(len(each.token_ids) for each in responses)
    assert found["mean_reward"] == pytest.approx(sum(each.reward for each in responses) / len(responses))
    assert (found["first_draw"], found["last_draw"], found["generations"]) == (0, 7, [1])
    assert found["payload_bytes"] == sum(len(entry.payload) for entry in log)
    assert found["bytes"] == sum(path.stat().st_size for path in (run / "archive").glob("segment-*"))
    assert found["compression"] == found["payload_bytes"] / found["bytes"]
    assert len(found["segments"]) > 2
    assert sum(segment["bytes"] for segment in found["segments"]) == found["bytes"]
    assert (found["segments"][0]["first"], found["segments"][-1]["last"]) == ("1-1", "1-9")
    lasts = [int(segment["last"].split("-")[1]) for segment in found["segments"]]
    assert [segment["first"] for segment in found["segments"][1:]] == [f"1-{last + 1}" for last in lasts[:-1]]
    assert {segment["token"] for segment in found["segments"]} == {1}
    assert (found["pruned"], found["skipped"]) == (None, {})
    json.dumps(found)


def test_stats_name_workers_unreadable_groups_skips_and_what_was_pruned(run: Path) -> None:
    log = entries([*(encode(random_group(draw)) for draw in range(3)), b"not a group", encode(group(4, worker="b"))])
    directory = run.with_name("other")
    fill(directory, log)
    skips.add(directory / "archive", "1-2", "why")
    before = archive_tools.stats(directory)
    assert before["invalid"] == 1
    assert before["groups_per_worker"] == {"": 3, "b": 1}
    assert before["skipped"] == {"1-2": "why"}
    Archive(directory / "archive", None).prune(4)
    after = archive_tools.stats(directory)
    through = int(after["pruned"]["through"].split("-")[1])
    assert after["pruned"] == {"through": f"1-{through}", "groups": through, "controls": 0}
    assert 0 < through == before["entries"] - after["entries"]


@pytest.mark.parametrize("tool", [archive_tools.stats, archive_tools.prune])
def test_a_directory_without_an_archive(tmp_path: Path, tool: object) -> None:
    with pytest.raises(NotFound, match="no archive there"):
        tool(tmp_path)  # type: ignore[operator]
    assert not list(tmp_path.iterdir())


# ---- show


@pytest.mark.parametrize("wanted", ["1-3", "draw:2"])
def test_a_group_is_shown_in_full(run: Path, config: RunConfig, wanted: str) -> None:
    policy = tiny_policy(ALPHABET, seed=0)
    write_policy(policy, run / "model")
    save(run, 0, None, settings=config.learner)
    found, group = archive_tools.show(run, wanted), replace(random_group(2), traceparent=TRACE)
    json.dumps(found)
    for name in ("draw", "attempt", "task", "prompt_id", "epoch", "seed", "worker", "engine", "traceparent"):
        assert found[name] == getattr(group, name)
    assert (found["entry"], found["kind"], found["skipped"]) == ("1-3", "group", None)
    assert (found["step"], found["estimator"], found["advantages_note"]) == (2, "group", "")
    assert found["prompt"] == {"tokens": group.prompt_ids.tolist(), "text": policy.tokenizer.decode(group.prompt_ids)}
    assert len(found["responses"]) == len(group.trajectories)
    for shown, response in zip(found["responses"], group.trajectories, strict=True):
        assert shown["tokens"] == response.token_ids.tolist()
        assert shown["logprobs"] == response.behaviour_logprobs.tolist()
        assert shown["loss_mask"] == response.loss_mask.tolist()
        assert shown["text"] == policy.tokenizer.decode(response.token_ids)
        assert [tuple(span.values()) for span in shown["spans"]] == [
            (s.length, s.version, s.step) for s in response.spans
        ]
        assert (shown["rewards"], shown["reward"]) == (response.rewards, response.reward)
        assert (shown["advantage"] > 0) == (response.reward == 1.0)
    assert sum(shown["advantage"] for shown in found["responses"]) == pytest.approx(0, abs=1e-9)


def test_other_entries_are_shown_too(run: Path, config: RunConfig) -> None:
    control = archive_tools.show(run, "1-5")
    assert control["kind"] == "config"
    assert control["content"]["training"]["steps"] == config.training.steps
    assert archive_tools.show(run, "1-1")["prompt"]["text"] is None, "there is no tokenizer"
    fill(run, entries([*(entry.payload if entry.draw >= 0 else config.learner for entry in held(run)), b"broken"]))
    assert "not a TrajectoryGroup" in archive_tools.show(run, "1-10")["invalid"]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("1-10", "no such entry .*entries 1 to 9"),
        ("1-0", "no such entry"),
        ("2-3", "its place is taken by 1-3"),
        ("draw:8", "no entry answers it"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(run: Path, wanted: str, says: str) -> None:
    with pytest.raises(NotFound, match=says):
        archive_tools.show(run, wanted)
    Archive(run / "archive", None).prune(4)
    for pruned in ("1-1", "draw:0"):
        with pytest.raises(NotFound, match=r"pruned .*up to entry 1-\d.*entries \d to 9"):
            archive_tools.show(run, pruned)


@pytest.mark.parametrize("wanted", ["57", "draw:", "", "1-2-3", "draw:x"])
def test_what_is_no_entry_is_refused_with_the_forms_there_are(run: Path, wanted: str) -> None:
    with pytest.raises(ConfigError, match="1-57, or a draw such as draw:57"):
        archive_tools.show(run, wanted)


# ---- prune


def test_pruning_by_hand_keeps_what_any_kept_checkpoint_needs(run: Path) -> None:
    log = held(run)
    save(run, 0, None)
    assert archive_tools.prune(run)["freed_bytes"] == 0
    for step, last in ((1, log[6]), (2, log[8])):
        save(run, step, last)
    found = archive_tools.prune(run)
    assert found["freed_bytes"] > 0
    assert "no longer be replayed from step 0" in found["notes"]
    archive = Archive(run / "archive", None)
    assert found["pruned_through"] == archive.pruned.head.id
    assert 0 < archive.pruned.head.sequence <= 7
    assert archive.read(7, 9) == log[7:]


def test_nothing_is_pruned_or_skipped_while_a_learner_runs(run: Path) -> None:
    save(run, 1, held(run)[8])
    with skips.learning(run / "archive"):
        for change in (lambda: archive_tools.prune(run), lambda: archive_tools.skip(run, "1-9", "")):
            with pytest.raises(Unavailable, match="a learner runs on this archive"):
                change()
    assert archive_tools.prune(run)["freed_bytes"] > 0


# ---- skip


def test_only_a_group_that_no_checkpoint_has_consumed_may_be_skipped(run: Path) -> None:
    log = held(run)
    for step, last in ((0, None), (1, log[3]), (2, log[6])):
        save(run, step, last)
    for entry, error, says in (
        ("1-10", NotFound, "no such entry"),
        ("draw:7", ConfigError, "give an entry's id such as 1-57$|1-57\\)"),
        ("1-5", Mismatch, "entry 1-5 is no group"),
        ("1-7", Mismatch, "step-00000002-00000001 has consumed entry 1-7"),
        ("1-2", Mismatch, "has consumed entry 1-2"),
    ):
        with pytest.raises(error, match=says):
            archive_tools.skip(run, entry, "")
    assert skips.read(run / "archive") == {}
    archive_tools.skip(run, "1-8", "it kills the learner")
    assert skips.read(run / "archive") == {"1-8": "it kills the learner"}


def test_looking_into_an_archive_needs_no_torch() -> None:
    code = "import sys, services.archive_tools; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# ---- the ledger


@pytest_asyncio.fixture
async def store(redis: EmbeddedRedis, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunStore]:
    monkeypatch.setenv("SAPO_REDIS_URL", redis.url)
    async with await RunStore.connect(redis.url, config.run.name) as connected:
        yield connected


async def accepted(store: RunStore, directory: Path, count: int, *, trim: bool = True) -> list[Entry]:
    """Draws leased, accepted and archived one by one, with a control entry among them; two more stay in Redis."""
    control, learner = await store.acquire_token("control-plane"), await store.acquire_token("learner")
    archive = Archive(directory / "archive", learner, segment_bytes=400)
    await store.rebuild(learner, archive.head, [])
    await store.restore_registry(control, [])
    await store.publish(learner, 0, "digest", "{}")
    grant = await store.grant(control, "w", count + 2, 0, PACING)
    for number, lease in enumerate(grant.leases):
        if number == count // 2:
            await store.append_control(learner, "config", b"{}")
        payload = encode(group(lease.draw, lease.attempt, trajectories=(trajectory(), trajectory((7,)))))
        answer = await store.append(lease.draw, lease.attempt, payload, max_entries=1000, max_bytes=1 << 30)
        assert answer.status == "OK"
    for sequence in range(count + 1):
        archive.append(await store.read(sequence, 1))
    if trim:
        await store.trim(learner, archive.head)
    archive.close()
    return held(directory)


async def test_I1_the_ledger_balances_after_pruning(store: RunStore, config: RunConfig) -> None:
    directory = config.run.directory
    log = await accepted(store, directory, 9)
    save(directory, 0, None)
    save(directory, 1, log[8])
    before = await audit_run(directory)
    assert before.balanced, before.problems
    assert before.to_dict()["backlog"] == 3
    assert archive_tools.prune(directory)["freed_bytes"] > 0
    assert (await audit_run(directory)).to_dict() == before.to_dict()


async def test_I1_the_ledger_balances_when_all_is_pruned_and_nothing_trimmed_yet(
    store: RunStore, config: RunConfig
) -> None:
    directory = config.run.directory
    log = await accepted(store, directory, 9, trim=False)
    Archive(directory / "archive", 1 << 20).close()  # the next learner, which has not yet read anything
    save(directory, 1, log[-1])
    before = await audit_run(directory)
    assert before.balanced, before.problems
    archive_tools.prune(directory)
    assert list(Archive(directory / "archive", None).entries(len(log))) == []
    assert Archive(directory / "archive", None).pruned.head == log[-1].position
    assert (await audit_run(directory)).to_dict() == before.to_dict()
