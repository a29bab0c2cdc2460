"""Objectives that a user brings along: a file or a class of a module, one clear error for what is wrong with either."""

import re
from pathlib import Path

import pytest
import torch

from sapo_learner.advantages import group_advantages
from sapo_learner.batching import collate
from sapo_learner.config import LearnerSettings
from sapo_learner.errors import ConfigError
from sapo_learner.learner import Learner
from sapo_learner.objectives import Tokens, available, build, objective_class
from sapo_learner.policy import tiny_policy
from sapo_learner.snapshot import weights_digest
from tests.recorded import ALPHABET, random_group

torch.set_num_threads(1)
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
HEAD = "from sapo_learner.objectives import Objective, Surrogate\n"
ONE = """
class {name}(Objective):
    scale: float = 1.0

    def __call__(self, tokens):
        return Surrogate(-self.scale * tokens.log_ratio.exp() * tokens.masked_advantages, {{}})
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_file_is_relative_to_the_working_directory_and_takes_options(here: Path) -> None:
    (here / "mine.py").write_text(HEAD + ONE.format(name="Mine"))
    one = torch.ones(1, dtype=torch.bool)
    tokens = Tokens(torch.zeros(1), torch.zeros(1), torch.ones(1), one, one.long())
    for name in ("./mine.py", "mine.py", str(here / "mine.py")):
        assert build(name, scale=3)(tokens).loss.tolist() == [-3.0]
    with pytest.raises(ConfigError, match=r"objective './mine.py': unknown key 'scal', did you mean 'scale'"):
        build("./mine.py", scal=3)


def test_a_file_is_read_anew(here: Path) -> None:
    (here / "mine.py").write_text(HEAD + ONE.format(name="Mine"))
    build("./mine.py")
    (here / "mine.py").write_text(HEAD + ONE.format(name="Renamed") + "    added: int = 0\n")
    assert build("./mine.py", added=2).added == 2


def test_a_class_of_a_module_is_named_even_beside_others_and_base_classes_do_not_count(here: Path) -> None:
    (here / "mymodule_one.py").write_text(HEAD + ONE.format(name="First") + ONE.format(name="Second"))
    assert objective_class("mymodule_one:Second").__name__ == "Second"
    assert objective_class("sapo_learner.objectives.grpo:GRPO") is objective_class("grpo")
    derived = "from sapo_learner.objectives.grpo import GRPO\nclass Wider(GRPO):\n    clip_high: float = 0.4\n"
    (here / "derived.py").write_text(derived)
    assert build("./derived.py").clip_high == 0.4
    (here / "base.py").write_text(
        f"{HEAD}class Base(Objective):\n    pass\n{ONE.format(name='Mine').replace('(Objective', '(Base')}"
    )
    assert objective_class("./base.py").__name__ == "Mine"


def test_annotations_may_be_postponed(here: Path) -> None:
    source = ONE.format(name="Mine").replace("scale: float", "scale: Literal[1, 2]")
    (here / "mine.py").write_text(f"from __future__ import annotations\nfrom typing import Literal\n{HEAD}{source}")
    assert build("./mine.py", scale=2).scale == 2


WRONG_FILES = {
    "none.py": ("x = 1\n", r"must define one class derived from sapo_learner.objectives.Objective, found none$"),
    "imported.py": ("from sapo_learner.objectives.grpo import GRPO\n", r"found none$"),
    "two.py": (
        HEAD + ONE.format(name="B") + ONE.format(name="A"),
        r"two.py: must define one .*, found 2: A, B \(name the class: module:ClassName\)",
    ),
    "syntax.py": ("x = 1\ny = (\n", r"cannot be imported: SyntaxError: .*syntax.py, line 2$"),
    "missing.py": (
        "\nimport no_such_thing\n",
        r"ModuleNotFoundError: No module named 'no_such_thing', .*missing.py, line 2$",
    ),
    "raises.py": ("def f():\n    return 1 / 0\n\nf()\n", r"ZeroDivisionError: division by zero, .*raises.py, line 2$"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_one_clear_error(name: str, here: Path) -> None:
    source, message = WRONG_FILES[name]
    (here / name).write_text(source)
    with pytest.raises(ConfigError, match=message) as error:
        build(f"./{name}")
    assert str(error.value).startswith("objective.name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent.py", r"no file absent.py \(paths are relative to the working directory, /"),
        ("no_such_module:Mine", r"no_such_module cannot be imported: ModuleNotFoundError: No module named"),
        ("sapo_learner.objectives.grpo:GPRO", r"no such class .*objectives.grpo \(did you mean 'GRPO'\? known: GRPO\)"),
        ("sapo_learner.objectives.grpo:Field", r"it is no concrete subclass of"),
        ("sapo_learner.objectives:Objective", r"it is no concrete subclass of"),
        (":Mine", r"cannot be imported: ValueError: Empty module name"),
        ("mine", r"known: .*sapo.* \(one of your own is a file like ./mine.py, or module:ClassName\)"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_error(name: str, message: str, here: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name)


def test_a_name_with_a_directory_is_not_mistaken_for_a_part_of_the_package() -> None:
    with pytest.raises(ConfigError, match="unknown objective"):
        build("../objectives/sapo")
    assert "sapo" in available()


# ---- The example of CONTRIBUTING.md


def test_the_example_of_contributing_trains_a_step(here: Path) -> None:
    section = CONTRIBUTING.read_text().partition("## Add an objective")[2].partition("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(example.splitlines()) <= 20
    (here / "near.py").write_text(example)
    settings = LearnerSettings.model_validate({
        "objective": {"name": "./near.py", "width": 0.3}, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    })  # fmt: skip
    learner = Learner(tiny_policy(ALPHABET, seed=0), settings, temperature=1.0)
    groups = [random_group(0), random_group(1)]
    advantages = [group_advantages([each.reward for each in one.trajectories], settings.advantages) for one in groups]
    before = weights_digest(learner.policy.tensors())
    report = learner.step(collate(groups, advantages, step=0, microbatch_tokens=10**6, normalise_by="step"))
    assert report.applied
    assert set(report.diagnostics) >= {"ratio", "near"}
    assert 0 < report.diagnostics["near"]["all"] < 1
    assert weights_digest(learner.policy.tensors()) != before
