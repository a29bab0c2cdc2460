"""run.yaml: every mistake is one ConfigError that says where it is, what is wrong and what exists."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from sapo_learner.config import LearnerSettings, ObjectiveSettings, Settings, did_you_mean, parse
from sapo_learner.errors import ConfigError
from sapo_learner.objectives import available, build
from services.runtime.settings import RunConfig, dump_config, load_config

REPOSITORY = Path(__file__).parents[2]


def run_yaml(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text)
    return path


def configured(directory: Path, data: dict[str, Any]) -> RunConfig:
    return load_config(run_yaml(directory, yaml.safe_dump(data)))


# ---- Keys and values


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"trainig": {"steps": 5}}, "unknown key 'trainig', did you mean 'training'"),
        ({"training": {"step": 5}}, r"unknown key 'training\.step', did you mean 'steps'"),
        (
            {"policy": {"warm_start": {"clean_stps": 5}}},
            r"unknown key 'policy\.warm_start\.clean_stps', did you mean 'clean_steps'",
        ),
        (
            {"training": {"xyzzy": 5}},
            r"unknown key 'training\.xyzzy', known: deterministic, groups_per_step, .*threads",
        ),
        ({"training": {"steps": "many"}}, r"'training\.steps': .*valid integer.*, got 'many'"),
        ({"training": {"steps": 0}}, r"'training\.steps': .*greater than or equal to 1, got 0"),
        ({"training": {"steps": 2.5}}, r"'training\.steps': .*integer.*got 2\.5"),
        ({"training": 7}, "'training': .*got 7"),
        ({"training": None}, r"'training' is empty \(null\): give it a value, or leave the key out"),
        ({"run": {"name": None}}, r"'run\.name' is empty \(null\): give it a value, or leave the key out"),
        ({"policy": {"warm_start": {"habit_target": 1}}}, r"'policy\.warm_start\.habit_target': .*less than 1"),
        ({"optimizer": {"schedule": "step"}}, r"'optimizer\.schedule': .*'constant', 'linear' or 'cosine', got 'step'"),
        ({"run": {"name": "a b"}}, r"'run\.name'.*got 'a b'"),
        ({"optimizer": {"warmup_steps": 100, "schedule": "linear"}}, r"optimizer\.warmup_steps 100 leaves nothing of"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place_and_what_exists(data, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        configured(tmp_path, data)
    assert str(tmp_path / "run.yaml") in str(error.value)
    assert "pydantic" not in str(error.value)


def test_every_mistake_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"training\.stps.*; .*'optimizer\.beta1'"):
        configured(tmp_path, {"training": {"stps": 1}, "optimizer": {"beta1": 1}})


def test_a_wrong_key_inside_a_list_or_mapping_of_settings_is_named_with_what_exists_there():
    class Leaf(Settings):
        size: int = 0

    class Tree(Settings):
        row: tuple[Leaf, ...] = ()
        named: dict[str, Leaf] = Field(default={})

    for data in ({"row": [{"sise": 1}]}, {"named": {"x": {"sise": 1}}}):
        with pytest.raises(ConfigError, match=r"sise', did you mean 'size'"):
            parse(Tree, data, where="tree")


def test_did_you_mean_lists_what_exists_also_when_something_is_near():
    assert did_you_mean("sap", ["sapo", "grpo"]) == "did you mean 'sapo'? known: grpo, sapo"
    assert did_you_mean("zzz", ["sapo", "grpo"]) == "known: grpo, sapo"


# ---- The file and --set


def test_an_empty_file_and_no_file_give_the_defaults(tmp_path):
    assert load_config(None) == load_config(run_yaml(tmp_path, "")) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {steps: 5", "not readable as YAML"),
        ("a: b: c", "not readable as YAML"),
        ("- training", "not a mapping"),
        ("just words", "unknown key 'just words'"),
        ("training: {steps: 5, steps: 6}", "duplicate key steps"),
        ("training: ${nowhere}", "nowhere"),
        ("1: 2", "1"),
    ],
)
def test_a_file_that_is_no_mapping_of_settings_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(run_yaml(tmp_path, text))
    assert str(tmp_path / "run.yaml") in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file .*sapo config"):
        load_config(tmp_path / "absent.yaml")


def test_set_overrides_the_file_and_keeps_the_rest(tmp_path):
    path = run_yaml(tmp_path, "training: {steps: 7, groups_per_step: 5}\nobjective: {name: sapo, tau_neg: 1.2}")
    config = load_config(path, ["training.steps=9", "objective.tau_neg=1.1", "run.name=other", "pacing.lookahead=null"])
    assert (config.training.steps, config.training.groups_per_step) == (9, 5)
    assert config.objective.options == {"tau_neg": 1.1}
    assert config.run.directory == Path("runs/other")
    assert config.pacing.lookahead is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "'training.steps' is not KEY=VALUE .*--set training.steps=50"),
        ("=5", "'=5' is not KEY=VALUE"),
        ("training steps=5", "is not KEY=VALUE"),
        ("training.steps=x", r"'training\.steps'.*got 'x'"),
        ("training.stepps=5", r"unknown key 'training\.stepps', did you mean 'steps'"),
        ("training..steps=5", r"unknown key 'training\.'"),
        ("trainin.steps=5", "unknown key 'trainin', did you mean 'training'"),
        ("run.name=${oc.env:SAPO_NOT_SET}", "SAPO_NOT_SET"),
        ("training.steps=[", "--set: a value is not readable as YAML"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_the_resolved_file_reads_back_as_the_same_configuration(tmp_path):
    overrides = ["optimizer.learning_rate=1e-5", "objective.name=grpo", "objective.tau_pos=3"]
    config = load_config(REPOSITORY / "deploy/examples/demo.yaml", overrides)
    text = dump_config(config)
    again = load_config(run_yaml(tmp_path, text))
    assert again == config
    assert again.objective.options == config.objective.options
    assert again.optimizer.learning_rate == 1e-5
    assert dump_config(again) == text


# ---- What contradicts itself


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"pacing": {"lookahead": 5}, "training": {"max_policy_age": 4}},
            r"pacing\.lookahead 5 exceeds training\.max_policy_age 4",
        ),
        ({"pacing": {"lookahead": 1, "publish_every": 3}}, r"lookahead 1 is below pacing\.publish_every - 1 = 2"),
        ({"pacing": {"publish_every": 4}}, r"lookahead 2 is below pacing\.publish_every - 1 = 3"),
        ({"pacing": {"publish_every": 2}, "training": {"max_policy_age": 0}}, r"lookahead 0 is below .* = 1"),
    ],
)
def test_pacing_that_cannot_move_is_refused(data, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        configured(tmp_path, data)


@pytest.mark.parametrize(("age", "lookahead"), [(0, 0), (1, 1), (2, 2), (8, 2)])
def test_lookahead_is_the_smaller_of_2_and_the_greatest_age(age, lookahead, tmp_path):
    assert configured(tmp_path, {"training": {"max_policy_age": age}}).lookahead == lookahead
    assert configured(tmp_path, {"training": {"max_policy_age": age}, "pacing": {"lookahead": age}}).lookahead == age


def test_pacing_at_its_limits_is_accepted(tmp_path):
    config = configured(tmp_path, {"pacing": {"lookahead": 4, "publish_every": 5}, "training": {"max_policy_age": 4}})
    assert (config.lookahead, config.pacing.publish_every) == (4, 5)


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 50}])
def test_truncated_sampling_is_refused_with_its_reason(sampling, tmp_path):
    with pytest.raises(
        ConfigError, match=r"truncated sampling .* renormalises the behaviour policy.*top_p 1 and top_k 0"
    ):
        configured(tmp_path, {"sampling": sampling})


def test_raw_logprobs_are_refused_at_another_temperature(tmp_path):
    configured(tmp_path, {"sampling": {"logprob_mode": "raw"}})
    with pytest.raises(ConfigError, match=r"raw log-probs at temperature 0\.7"):
        configured(tmp_path, {"sampling": {"logprob_mode": "raw", "temperature": 0.7}})


# ---- The objective


def test_objective_options_pass_through_unread(tmp_path):
    config = configured(tmp_path, {"objective": {"name": "sapo", "tau_pos": 2, "not_ours": [1]}})
    assert config.objective.options == {"tau_pos": 2, "not_ours": [1]}
    assert ObjectiveSettings().options == {}
    assert LearnerSettings().objective.name == "sapo"


def test_an_unknown_objective_lists_what_exists():
    with pytest.raises(ConfigError, match=r"unknown objective 'sapoo', did you mean 'sapo'\? known: ") as error:
        build("sapoo")
    assert all(name in str(error.value) for name in available())


def test_an_unknown_objective_option_lists_what_exists():
    with pytest.raises(
        ConfigError, match=r"objective 'sapo': unknown key 'tau_negative', did you mean 'tau_neg'"
    ) as error:
        build("sapo", tau_negative=1.0)
    assert "tau_neg, tau_pos" in str(error.value)


def test_constant_aggregation_names_its_constant():
    with pytest.raises(ConfigError, match="belong together"):
        load_config(None, ["aggregation.mode=constant"])
    with pytest.raises(ConfigError, match="belong together"):
        load_config(None, ["aggregation.length=8"])
    assert load_config(None, ["aggregation.mode=constant", "aggregation.length=8"]).aggregation.length == 8
