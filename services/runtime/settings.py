"""run.yaml as one model. `Environment`, which says where services are, is asked for here, too.

The file describes the run and is given to the control plane alone; every other service asks it there, so nothing can
disagree. Addresses and the token come from the environment, never from the file.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator
from yaml import YAMLError

from sapo_learner.config import (
    ArchiveSettings,
    CheckpointSettings,
    LearnerSettings,
    ParallelSettings,
    PolicySettings,
    Settings,
    parse,
)
from sapo_learner.errors import ConfigError
from services.record_writers import RecordSettings
from services.runtime.engine_settings import EngineSettings
from services.runtime.environment import Environment as Environment
from services.runtime.evaluation_settings import EvaluationSettings
from services.runtime.local_settings import LocalSettings
from services.runtime.sampling_settings import ChatSettings, SamplingSettings, ScoringSettings
from services.tasks import TaskSettings


class RunSettings(Settings):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    dir: str = ""
    """Where the run's files live, relative to the working directory; default runs/NAME."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seeds the base policy, the sampler and every response."""

    @property
    def directory(self) -> Path:
        return Path(self.dir or f"runs/{self.name}")


class PacingSettings(Settings):
    """How far sampling may run ahead of training: leases are granted by these bounds, never by a clock."""

    lookahead: int | None = Field(default=None, ge=0)
    """Steps' worth of groups in flight beyond the one being filled: sets how old data usually are.
    Default: the smaller of 2 and training.max_policy_age."""
    publish_every: int = Field(default=1, ge=1)
    """Optimizer steps between two published policies."""
    lease_seconds: float = Field(default=60, gt=0)
    """A lease without progress ends after this long."""
    max_lease_seconds: float = Field(default=3600, gt=0)
    """No lease lasts longer than this."""


class IngestSettings(Settings):
    credits: int = Field(default=64, ge=1)
    """Groups that a worker may have unacknowledged."""
    max_entries: int = Field(default=4096, ge=1)
    """Unread groups in Redis beyond which nothing is accepted."""
    max_bytes: int = Field(default=1 << 30, ge=1)
    """Unread bytes in Redis beyond which nothing is accepted."""


class ProbeSettings(Settings):
    behaviour_every: int = Field(default=0, ge=0)
    """Every so many steps the learner recomputes the behaviour log-probs of one group from the stored snapshots of the
    versions it was sampled under. 0: never."""
    on_miss: Literal["stop", "warn"] = "stop"
    """What a rollout worker does whose engine does not give the learner's log-probs for a new policy. stop: it ends,
    and nothing that it sampled under that policy is sent. warn: it says so and goes on, as for `sapo check`."""


class RunConfig(LearnerSettings):
    """A resolved run.yaml."""

    run: RunSettings = RunSettings()
    policy: PolicySettings = PolicySettings()
    parallel: ParallelSettings = ParallelSettings()
    task: TaskSettings = TaskSettings()
    tasks: list[TaskSettings] = Field(default=[])
    """Several tasks in place of `task`, mixed by their shares in every step."""
    chat: ChatSettings = ChatSettings()
    sampling: SamplingSettings = SamplingSettings()
    scoring: ScoringSettings = ScoringSettings()
    pacing: PacingSettings = PacingSettings()
    engine: EngineSettings = EngineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    archive: ArchiveSettings = ArchiveSettings()
    ingest: IngestSettings = IngestSettings()
    probe: ProbeSettings = ProbeSettings()
    record: RecordSettings = RecordSettings()
    local: LocalSettings = LocalSettings()

    @property
    def learner(self) -> LearnerSettings:
        """The algorithm's part alone."""
        return LearnerSettings.model_validate({name: getattr(self, name) for name in LearnerSettings.model_fields})

    @property
    def mixture(self) -> list[TaskSettings]:
        """The run's tasks, one or several."""
        return self.tasks or [self.task]

    @property
    def scored(self) -> list[TaskSettings]:
        """Every task that responses are scored by: the run's own, and those of its suites."""
        return [*self.mixture, *(each.task_settings for each in self.evaluation.suites)]

    @property
    def lookahead(self) -> int:
        age = self.training.max_policy_age
        return min(2, age) if self.pacing.lookahead is None else self.pacing.lookahead

    @property
    def snapshots_kept(self) -> int:
        """As many as tokens in training can have been sampled under, and two in flight."""
        return self.training.max_policy_age + 2

    @model_validator(mode="after")
    def _task_or_tasks(self) -> "RunConfig":
        if self.tasks and "task" in self.model_fields_set and self.task != TaskSettings():
            raise ValueError("give task or tasks, not both: put the single one into the list")
        return self

    @model_validator(mode="after")
    def _suites_named_apart(self) -> "RunConfig":
        labels = {each.called for each in self.mixture}
        if taken := [each.name for each in self.evaluation.suites if each.name in labels]:
            raise ValueError(f"suite {taken[0]!r} is called like a task of the run: give the task a label")
        return self

    @model_validator(mode="after")
    def _overlong_fits(self) -> "RunConfig":
        if self.scoring.overlong_buffer > self.sampling.max_tokens:
            raise ValueError(
                f"scoring.overlong_buffer {self.scoring.overlong_buffer} exceeds sampling.max_tokens "
                f"{self.sampling.max_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _a_gpu_for_each_process(self) -> "RunConfig":
        given, processes = len(self.local.learner_gpus), self.parallel.processes
        if given not in (0, processes):
            raise ValueError(f"local.learner_gpus names {given} GPUs, parallel.processes is {processes}: one for each")
        return self

    @model_validator(mode="after")
    def _engines_compute_as_the_learner(self) -> "RunConfig":
        if self.parallel.precision != "float32" and self.policy.dtype == "float32":
            raise ValueError(
                f"parallel.precision {self.parallel.precision} with policy.dtype float32: engines would compute in "
                "float32 what the learner computes in 16 bits, and no log-prob would agree; set policy.dtype to "
                f"{self.parallel.precision}, too"
            )
        return self

    @model_validator(mode="after")
    def _ranks_can_be_laid_out(self) -> "RunConfig":
        parallel = self.parallel
        if parallel.processes > 1 and parallel.processes % (parallel.shard or 1):
            raise ValueError(
                f"parallel.processes {parallel.processes} cannot share copies of the weights {parallel.shard} by "
                f"{parallel.shard}: set parallel.shard to a divisor of {parallel.processes}, or leave it out"
            )
        if self.policy.lora is not None and (parallel.processes > 1 or parallel.precision != "float32"):
            raise ValueError(
                "policy.lora: adapters are trained by one process, in float32; set parallel.processes to 1 and "
                "parallel.precision to float32, or leave policy.lora out"
            )
        return self

    @model_validator(mode="after")
    def _pacing_can_move(self) -> "RunConfig":
        age, every = self.training.max_policy_age, self.pacing.publish_every
        if self.lookahead > age:
            raise ValueError(
                f"pacing.lookahead {self.lookahead} exceeds training.max_policy_age {age}: what runs further ahead "
                "would be too old when it is used; lower lookahead, or raise max_policy_age"
            )
        if self.lookahead < every - 1:
            raise ValueError(
                f"pacing.lookahead {self.lookahead} is below pacing.publish_every - 1 = {every - 1}: sampling would "
                "wait for a policy that training cannot reach; raise lookahead (max_policy_age), or publish more often"
            )
        return self


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read run.yaml (None: defaults only) and apply `--set a.b=c` overrides; every mistake is one ConfigError."""
    where = str(path) if path else "--set"
    base = _read(path) if path else OmegaConf.create({})
    for override in overrides:
        if not re.match(r"^[\w.]+=", override):
            raise ConfigError(
                f"{override!r} is not KEY=VALUE", where="--set", fix="for example --set training.steps=50"
            )
    try:
        dotlist = OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"a value is not readable as YAML: {_one_line(error)}", where="--set", fix="quote what is text"
        ) from None
    try:
        merged = OmegaConf.merge(base, dotlist)
        data: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            str(error).splitlines()[0], where=where, fix="`sapo config` prints a complete example"
        ) from None
    return parse(
        RunConfig,
        data,
        where=f"{where} with --set" if path and overrides else where,
        fix="`sapo config --explain KEY` says what a key takes",
    )


def _read(path: Path) -> DictConfig:
    try:
        read = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), fix="`sapo config` prints a complete example") from None
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
        raise ConfigError(
            f"not readable as YAML: {what}", where=str(path), fix="`sapo config` prints a complete example"
        ) from None
    if not isinstance(read, DictConfig):
        raise ConfigError(
            "not a mapping of settings", where=str(path), fix="write sections, for example training: {steps: 50}"
        )
    return read


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return dump_yaml(config.model_dump(mode="json"))


def save_config(config: RunConfig) -> None:
    """Into the run's directory, on whichever machine that is: whole or not at all."""
    path, text = config.run.directory / "run.yaml", dump_config(config)
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text)
        os.replace(temporary, path)


def dump_yaml(settings: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(settings))
