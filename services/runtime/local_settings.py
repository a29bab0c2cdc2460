"""What `sapo up` starts on its machine, and who gets which of its GPUs."""

from typing import Annotated

from pydantic import Field, model_validator

from sapo_learner.config import Settings

Gpu = Annotated[int, Field(ge=0)]


class LocalSettings(Settings):
    rollout_workers: int = Field(default=2, ge=1)
    """How many rollout workers `sapo up` starts."""
    learner_gpus: list[Gpu] = Field(default=[])
    """GPUs of the learner, one for each of its processes, numbered as nvidia-smi does. Empty: it sees all."""
    rollout_gpus: list[Gpu] = Field(default=[])
    """GPUs of the rollout workers, equally many for each. Empty: every worker sees all."""

    @model_validator(mode="after")
    def _shared_out(self) -> "LocalSettings":
        for name in ("learner_gpus", "rollout_gpus"):
            given: list[int] = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"local.{name} names a GPU twice: {given}")
        if len(self.rollout_gpus) % self.rollout_workers:
            raise ValueError(
                f"local.rollout_gpus: {len(self.rollout_gpus)} GPUs cannot be shared evenly by "
                f"{self.rollout_workers} workers (local.rollout_workers)"
            )
        return self

    def visible_gpus(self, process: str) -> list[int]:
        """process: learner, rollout-0, rollout-1, ... Empty: whatever there are."""
        if process == "learner":
            return self.learner_gpus
        service, _, number = process.rpartition("-")
        if service != "rollout":
            return []
        share = len(self.rollout_gpus) // self.rollout_workers
        return self.rollout_gpus[int(number) * share :][:share]
