"""What is measured on held-out problems, and how often."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from sapo_learner.config import Settings
from sapo_learner.errors import ConfigError
from services.suites import Suite
from services.suites import load as load_suite


class EvaluationSettings(Settings):
    every: int = Field(default=25, ge=1)
    """Optimizer steps between two evaluations on held-out problems; the first and the last policy always have one."""
    samples: int = Field(default=512, ge=1)
    """Responses per evaluation, at least; every problem gets equally many."""
    boundary_samples: int = Field(default=2000, ge=1)
    """The same for the first and the last policy, whose figures the run's summary compares."""
    suites: list[Suite] = Field(default=[])
    """More to measure on each time, every suite with its own number of responses: names of suites that come along,
    YAML files relative to the working directory, or what such a file holds."""
    kept: int = Field(default=10, ge=0)
    """Evaluations whose every response is kept in RUN/evaluations: so many of the newest, and the first. 0: none."""
    text_characters: int = Field(default=4000, ge=0)
    """How much of a response's text is kept there."""

    @field_validator("suites", mode="before")
    @classmethod
    def _read(cls, suites: Any) -> Any:
        """Files are read where the run is controlled; whoever asks there for the configuration gets what they hold."""
        try:
            return [load_suite(each) if isinstance(each, str) else each for each in suites]
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _named_apart(self) -> "EvaluationSettings":
        names = [each.name for each in self.suites]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two suites are called {twice[0]!r}: give each a name of its own")
        return self
