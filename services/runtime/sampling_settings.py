"""Settings of what a rollout worker does with a prompt: the chat it becomes, how responses are sampled, then scored."""

from typing import Any, Literal

from pydantic import Field, model_validator

from sapo_learner.config import Settings
from sapo_learner.errors import SapoError
from sapo_learner.trajectory import LogprobMode, SamplingParameters


class SamplingSettings(Settings):
    group_size: int = Field(default=8, ge=1, le=2048)
    """Responses per draw: the group over which advantages are normalised. At least 2."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of the sampling; training divides the logits by it, too."""
    max_tokens: int = Field(default=1024, ge=1)
    """Token limit of a response."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only 1: truncated sampling is refused, because the recorded log-probs would not be those of the sampler."""
    top_k: int = Field(default=0, ge=0)
    """Only 0, for the same reason."""
    logprob_mode: LogprobMode = "processed"
    """processed: log-probs after temperature. raw: before, which is the same at temperature 1 alone."""

    @model_validator(mode="after")
    def _accounted_for(self) -> "SamplingSettings":
        try:
            self.parameters()
        except SapoError as error:
            raise ValueError(error.what) from None
        if self.group_size == 1:
            raise ValueError(
                "group_size 1 teaches nothing: a response is compared with the others of its group; use 2 or more"
            )
        self._fits_one_message()
        return self

    def _fits_one_message(self) -> None:
        from services.wire import MAX_MESSAGE_BYTES, TOKEN_BYTES

        size = self.group_size * self.max_tokens * TOKEN_BYTES
        if size > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"group_size {self.group_size} x max_tokens {self.max_tokens} makes groups of up to {size >> 20} MiB, "
                f"one message holds {MAX_MESSAGE_BYTES >> 20}: lower max_tokens to "
                f"{MAX_MESSAGE_BYTES // TOKEN_BYTES // self.group_size}, or group_size"
            )

    def parameters(self) -> SamplingParameters:
        return SamplingParameters(self.temperature, self.max_tokens, self.top_p, self.top_k, self.logprob_mode)


class ChatSettings(Settings):
    """How prompts become tokens."""

    template: Literal["auto", "none"] = "auto"
    """auto: the chat template of the policy's tokenizer where it has one, a prompt that is a text becoming the user's
    message; without one, and with none, the text goes to the policy as it stands."""
    system: str = ""
    """A system message before every prompt that is a text."""
    options: dict[str, Any] = Field(default={})
    """Passed on to the template, such as {enable_thinking: false}."""

    @model_validator(mode="after")
    def _belong_to_the_template(self) -> "ChatSettings":
        if self.template == "none" and (self.system or self.options):
            raise ValueError("chat.system and chat.options belong to a template: set chat.template to auto")
        return self


class ScoringSettings(Settings):
    """Rewards are computed in processes of their own, so that one that hangs, leaks or crashes costs a response."""

    processes: int = Field(default=2, ge=1)
    """Per rollout worker. Tasks that say they are harmless are scored in the worker itself."""
    timeout_seconds: float = Field(default=30, gt=0)
    """For the score of one response, or one reply of the task in a response of several turns."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Address space of such a process; none: no limit."""
    on_error: Literal["stop"] | float = 0.0
    """What a response is worth whose score raises, takes too long or is not finite. A number: that much in every
    component. stop: the worker ends with the error. Either way it is counted, and named in the log with the prompt."""
    max_turns: int = Field(default=8, ge=1)
    """Turns of the policy in one response, for tasks that reply."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Above 0: a component `overlong` falls from 0 to -overlong_penalty over the last so many tokens before
    sampling.max_tokens (DAPO arXiv 2503.14476, Eq. 13)."""
    overlong_penalty: float = Field(default=1.0, gt=0)
