"""What must be true of a run that was interrupted once and lost every one of its processes to kill -9."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sapo_learner import checkpoint
from sapo_learner.archive import Archive
from sapo_learner.control import GROUP, decode_settings
from sapo_learner.learner import Learner
from sapo_learner.snapshot import weights_digest
from sapo_learner.train import Position, train
from services.learner.base_policy import base_policy
from services.replay import ArchivedLog
from services.run_directory import run_config
from services.runtime.tracing import trace_id
from services.wire import decode
from tests import prometheus as monitoring
from tests.command_line import sapo
from tests.documents import DOCUMENTS, ROOT, Command, blocks, commands, named, write_files
from tests.end_to_end.conftest import GROUP_SIZE, GROUPS_PER_STEP, MAX_POLICY_AGE, SETTINGS, STEPS, Stack
from tests.logs import events
from tests.own_model import write_model

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]


def test_ctrl_c_drains_and_exits_0_and_the_same_command_goes_on(stack: Stack) -> None:
    assert stack.exit_codes[0] == 0, stack.outputs[0]
    assert "the same command goes on from here" in stack.outputs[0]
    assert "changed from here on: optimizer.learning_rate: 0.0001 -> 8e-05" in stack.outputs[1]
    assert stack.resumed_at == stack.interrupted_at + 1, "steps are taken up where Ctrl-C left them"


def test_the_run_finishes_although_every_process_was_killed(stack: Stack) -> None:
    assert stack.exit_codes[1] == 0, stack.outputs[1]
    assert stack.killed == ["rollout-0", "ingest", "control-plane", "redis", "learner"]
    assert stack.summary["steps"] == STEPS


def test_no_process_is_left_behind(stack: Stack) -> None:
    assert stack.left_over == [[], []]


def test_I1_the_ledger_balances_when_stopped_and_while_it_runs(stack: Stack) -> None:
    counted = sapo("ledger", stack.directory, "--json")
    assert counted.code == 0, counted.out + counted.err
    for live in stack.live_ledgers:
        assert live["exit_code"] == 0, live
        assert live["balanced"], live
    assert stack.summary["ledger_balanced"]


WITHOUT_TORCH = """
import sys
from services import terminal
from services.cli import app
sys.exit(terminal.run(app, ["ledger", sys.argv[1]]) or "torch" in sys.modules)
"""


def test_the_ledger_is_counted_without_waiting_for_torch(stack: Stack) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(stack.directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "balanced  True" in result.stdout


def test_every_step_s_line_names_every_phase_and_the_report_says_where_the_time_went(stack: Stack) -> None:
    phases = {"read", "archive", "decode", "collate", "optimizer", "snapshot", "publish"}
    assert all(phases <= set(line["seconds"]) for line in stack.lines("step"))
    assert {"forward", "loss", "backward", "checkpoint"} <= set(stack.summary["learner_time"])
    assert "\nlearner: " in stack.outputs[1]


def test_changed_settings_are_an_entry_of_the_log_and_count_from_there(stack: Stack) -> None:
    (change,) = [entry for entry in Archive(stack.directory / "archive", None).entries() if entry.kind != GROUP]
    assert decode_settings(change).optimizer.learning_rate == 8e-5
    rates = {line["step"]: line["learning_rate"] for line in stack.lines("step")}
    first = (change.sequence - 1) // GROUPS_PER_STEP + 1  # the step whose groups surround or follow the entry
    assert {rate for step, rate in rates.items() if 5 <= step < first} == {1e-4}  # after the warm-up
    assert {rate for step, rate in rates.items() if step >= first} == {8e-5}


def test_I2_every_draw_is_in_the_log_exactly_once(stack: Stack) -> None:
    entries = list(Archive(stack.directory / "archive", None).entries())
    draws = [entry.draw for entry in entries if entry.kind == GROUP]
    assert sorted(draws) == list(range(STEPS * GROUPS_PER_STEP))
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
    for entry in [entry for entry in entries if entry.kind == GROUP][:: len(entries) // 50]:
        group = decode(entry.payload)
        assert group.draw == entry.draw
        assert len(group.trajectories) == GROUP_SIZE


def test_I3_the_same_log_gives_the_same_weights_without_any_service(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replay the archive from the base policy, in this process, uninterrupted: bit for bit what the run ended with."""
    config = run_config(stack.directory)
    monkeypatch.setenv("SAPO_CACHE_DIR", stack.environment["SAPO_CACHE_DIR"])
    base, _ = base_policy(config, lambda *_: None)
    rate = SETTINGS["optimizer.learning_rate"]
    begun_with = config.learner.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"learning_rate": rate})}
    )
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(config.training.threads)
    torch.use_deterministic_algorithms(True)
    try:
        learner = Learner(base, begun_with, temperature=config.sampling.temperature)
        reports = list(train(learner, ArchivedLog(stack.directory / "archive"), Position(), decode=decode))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    final = checkpoint.load_newest(stack.directory / "checkpoints").state
    assert len(reports) == final.step == STEPS
    assert weights_digest(learner.policy.tensors()) == weights_digest(final.model)


def test_I3_sapo_replay_finds_every_published_policy_again(stack: Stack) -> None:
    result = stack.sapo("replay", str(stack.directory), "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["bit_exact"], report
    assert report["step"] == STEPS
    assert report["checkpoints"][-1] == STEPS
    published = {line["step"] for line in stack.lines("policy")} - {0}
    assert set(report["published"]) == published
    assert len(published) > STEPS / 2, "the control plane may have been down for one or the other"


def test_I4_behaviour_logprobs_equal_a_recomputation_from_the_stored_snapshots(stack: Stack) -> None:
    summary = stack.summary
    assert summary["engine_logprob_probes"] >= 5
    assert summary["engine_logprob_mixed_version_responses"] > 0, "responses of mixed versions were among them"
    assert summary["engine_logprob_max_abs_diff"] <= 1e-4


def test_it_is_really_asynchronous(stack: Stack) -> None:
    summary = stack.summary
    assert summary["policy_age_mean"] > 0
    assert summary["policy_age_max"] <= MAX_POLICY_AGE
    assert summary["stale"] == 0
    assert summary["mixed_version_responses"] > 0
    assert summary["sampling_overlap"] > 0


def test_the_policy_learns(stack: Stack) -> None:
    summary = stack.summary
    assert summary["base_pass_at_1"] <= 0.45
    assert summary["final_pass_at_1"] > summary["base_pass_at_1"] + 0.1


def test_evaluations_are_of_the_first_the_last_and_scheduled_policies(stack: Stack) -> None:
    steps = [line["step"] for line in stack.lines("evaluation")]
    assert steps[0] == 0
    assert steps[-1] == STEPS
    assert len(steps) >= 3
    assert all(line["samples"] >= 198 for line in stack.lines("evaluation"))


def test_the_closing_report_says_what_happened(stack: Stack) -> None:
    report = stack.outputs[1]
    assert "held-out pass@1" in report
    assert "It did not teach the task" in report
    assert len(stack.summary["examples"]) == 3


def test_metrics_of_every_process_are_served(stack: Stack) -> None:
    assert set(stack.metrics) == {"control-plane", "ingest", "learner", "rollout-0", "rollout-1"}
    for process, metric in {
        "control-plane": "sapo_log_accepted_groups",
        "ingest": 'sapo_ingest_acks_total{status="accepted"}',
        "learner": "sapo_learner_step",
        "rollout-1": "sapo_rollout_waiting_seconds_total",
    }.items():
        assert metric in stack.metrics[process]


# ---- What a Prometheus saw of the run


def test_prometheus_finds_every_process_and_the_run_does_not_notice_when_it_dies(
    stack: Stack, prometheus: monitoring.Prometheus
) -> None:
    up = {each["metric"]["process"]: each["metric"] for each in prometheus.values("up == 1")}
    assert set(up) == {"control-plane", "ingest", "learner", "rollout-0", "rollout-1"}
    run = f"stack-{(stack.directory / 'run.id').read_text()}"
    assert (up["rollout-1"]["run"], up["rollout-1"]["service"]) == (run, "rollout")
    assert stack.lines("step")[-1]["time"] > prometheus.when.end, "steps were taken after it was killed"
    assert stack.exit_codes[1] == 0
    assert json.loads((stack.directory / "prometheus-targets.json").read_text()) == [], "nobody is there any more"


def test_every_metric_that_rules_dashboard_and_documents_name_was_scraped(prometheus: monitoring.Prometheus) -> None:
    assert monitoring.missing(monitoring.everything(), prometheus) == []


def test_every_metric_but_those_of_what_went_wrong_has_left_zero(prometheus: monitoring.Prometheus) -> None:
    series = {name: f"{name}_count" if kind == "histogram" else name for name, kind in monitoring.defined()}
    still = {name for name, counted in series.items() if not prometheus.values(f"{counted} > 0")}
    assert still - monitoring.MAY_BE_ZERO == set()


def test_every_expression_of_the_dashboard_evaluates_to_something(prometheus: monitoring.Prometheus) -> None:
    assert [each for each in monitoring.of_dashboard() if not prometheus.values(each.text)] == []


def test_every_rule_was_evaluated_without_an_error(stack: Stack, prometheus: monitoring.Prometheus) -> None:
    assert stack.scrape is not None
    assert len(stack.scrape.rules) == len(monitoring.rules())
    assert [each for each in stack.scrape.rules if each["health"] != "ok"] == []


def test_a_misspelt_metric_or_label_value_is_found(prometheus: monitoring.Prometheus, tmp_path: Path) -> None:
    for path in monitoring.RULES.glob("*.rules.yml"):
        text = path.read_text().replace("sapo_ledger_problems", "sapo_ledger_problem").replace("refused", "refuse")
        (tmp_path / path.name).write_text(text)
    assert monitoring.missing(monitoring.of_rules(tmp_path), prometheus) == [
        "SapoLedgerUnbalanced: sapo_ledger_problem",
        'SapoUpdateRefused: sapo_learner_groups_total{outcome="refuse"}',
    ]


@pytest.mark.parametrize("process", ["control-plane", "ingest", "learner", "rollout-0"])
def test_promtool_finds_nothing_wrong_with_what_is_served(stack: Stack, process: str) -> None:
    monitoring.check_metrics(stack.metrics[process])


def test_memory_on_disk_is_bounded_by_configuration(stack: Stack) -> None:
    config = run_config(stack.directory)
    manifests = list((stack.directory / "snapshots" / "manifests").glob("*.json"))
    assert len(manifests) <= config.snapshots_kept + 1
    assert len(list((stack.directory / "checkpoints").iterdir())) <= config.checkpoint.keep + 1  # and the base policy
    assert not list((stack.directory / "staging").glob("*.part*"))


def test_one_group_is_followed_through_the_logs_of_all_processes(stack: Stack) -> None:
    *_, last = (entry for entry in Archive(stack.directory / "archive", None).entries() if entry.kind == GROUP)
    group, every = (
        decode(last.payload),
        [event for path in sorted((stack.directory / "logs").glob("*.log")) for event in events(path)],
    )
    trace, draw = trace_id(group.traceparent), f"draw {group.draw}"
    way = {(each["service"], each["message"]) for each in every if each.get("trace_id") == trace}
    way |= {(each["service"], each["message"]) for each in every if each.get("entry") == last.id}
    tokens = sum(len(each.token_ids) for each in group.trajectories)
    *_, (_, end) = sorted(each for each in way if each[0] == "learner")
    assert end in {f"entry {last.id} is {fate} in step {STEPS}" for fate in ("trained", "degenerate")}
    assert way == {
        (group.worker, f"{draw} leased"),
        (group.worker, f"{draw} sampled: {tokens} tokens"),
        (group.worker, f"{draw} scored: it is sent"),
        ("ingest", f"{draw} is entry {last.id} of the log"),
        (group.worker, f"{draw} is entry {last.id} of the log"),
        ("learner", f"{draw} is archived as entry {last.id}"),
        ("learner", end),
    }


def test_every_process_names_the_one_run(stack: Stack) -> None:
    named = {path.stem: {each.get("run") for each in events(path)} for path in (stack.directory / "logs").glob("*.log")}
    run = f"stack-{(stack.directory / 'run.id').read_text()}"
    assert {name for name, runs in named.items() if run in runs} == named.keys() - {"redis"}
    assert set().union(*named.values()) <= {run, None}


def test_eval_and_sample_read_the_run(stack: Stack) -> None:
    evaluated = sapo("eval", stack.directory, "--samples", "1", "--json")
    assert evaluated.code == 0, evaluated.err
    assert '"pass_at_1"' in evaluated.out
    sampled = sapo("sample", f"{stack.directory}@{STEPS}", "--prompt", "7+5-3=")
    assert sampled.code == 0, sampled.err
    assert sampled.out.startswith("7+5-3=")


def test_tensorboard_has_every_step_of_both_lives_once(stack: Stack) -> None:
    found = EventAccumulator(str(stack.directory / "tensorboard" / "steps")).Reload().Scalars("step/reward")
    rewards = {each["step"]: each["reward"] for each in stack.lines("step")}
    assert {each.step: each.value for each in found} == pytest.approx(rewards, rel=1e-5)


def test_plot_draws_a_run_that_was_interrupted_and_attacked(stack: Stack, tmp_path: Path) -> None:
    plotted = sapo("plot", stack.directory, "--out", tmp_path)
    assert plotted.code == 0, plotted.err
    names = ("learning", "health", "speed", "objective")
    assert plotted.out.split() == [str(tmp_path / f"{name}.png") for name in names]
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in names)


def test_show_weighs_every_token_under_the_policy_of_its_step(stack: Stack) -> None:
    step = checkpoint.list_whole(stack.directory / "checkpoints")[1].step + 1
    ahead = [entry for entry in Archive(stack.directory / "archive", None).entries() if entry.kind == GROUP]
    weights = []
    for entry in ahead[(step - 1) * GROUPS_PER_STEP :][:3]:
        shown = sapo("show", stack.directory, entry.id, "--json")
        assert shown.code == 0, shown.err
        answer = json.loads(shown.out)
        assert (answer["step"], answer["policy"]["trained_under"]) == (step, step - 1)
        assert answer["policy"]["step"] == step - 1
        weights += [token["gate_weight"] for each in answer["responses"] for token in each["tokens"]]
    assert all(0 < weight <= 1 for weight in weights)


def test_eval_reads_the_newest_published_policy_by_url(stack: Stack) -> None:
    assert stack.by_url is not None
    assert stack.by_url.returncode == 0, stack.by_url.stderr
    assert '"pass_at_1"' in stack.by_url.stdout


def test_a_complete_run_is_not_started_again_by_accident(stack: Stack) -> None:
    result = stack.sapo("up", str(stack.directory / "run.yaml"))
    assert result.returncode == 2
    assert "this run is complete" in result.stderr
    assert "--again" in result.stderr


# ---- What the documents tell people to type (docs/first-run.md: test_first_run.py)

TO_RUN = [
    command
    for document in DOCUMENTS
    for command in commands(document)
    if command.text.startswith("sapo ") and not command.excused and command.document != "first-run.md"
]
FIRST = {command.text.split()[1]: command for command in reversed(TO_RUN)}
"""By kind: the one that is a process of its own. The others run in this one, which has imported everything."""


@pytest.mark.parametrize("command", named(TO_RUN))
def test_every_command_that_is_not_excused_runs(
    command: Command, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, *words = shlex.split(command.text)
    if command is not FIRST[words[0]]:
        monkeypatch.chdir(workshop)
        ran = sapo(*words)
        assert ran.code == 0, f"{ran.out}\n{ran.err}"
        return
    outcome = subprocess.run(
        [sys.executable, "-m", "services.cli", *words], cwd=workshop,
        capture_output=True, text=True, timeout=100, env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert outcome.returncode == 0, f"{outcome.stdout}\n{outcome.stderr}"


PIPELINES = [
    line
    for each in blocks(ROOT / "docs/seeing.md")
    for line in each.text.splitlines()
    if line.startswith(("grep ", "cat "))
]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_group_s_way_is_found_as_the_document_says(pipeline: str, workshop: Path) -> None:
    if "jq " in pipeline and not shutil.which("jq"):
        pytest.skip("jq is not installed")
    command = ["bash", "-o", "pipefail", "-c", pipeline]
    outcome = subprocess.run(command, cwd=workshop, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    way = outcome.stdout.splitlines()
    assert way == sorted(way)
    assert all(any(word in line for line in way) for word in ("leased", "sampled", "of the log", "archived", "in step"))


@pytest.fixture(scope="module")
def workshop(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a complete run as runs/demo, a model, a run.yaml, and the files that documents have written."""
    directory = tmp_path_factory.mktemp("workshop")
    (directory / "runs").mkdir()
    (directory / "runs" / "demo").symlink_to(stack.directory)
    write_model(directory / "model", ["How many?"])
    for document in DOCUMENTS:
        write_files(document, directory)
    (directory / "run.yaml").write_text("policy: {source: model}\ntask: {name: jsonl, path: problems.jsonl}\n")
    (directory / "problems.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    return directory
