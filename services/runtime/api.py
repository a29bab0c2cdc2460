"""What crosses the control plane's HTTP API: one pydantic model per body, used by both ends."""

import json
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from sapo_learner.trajectory import FinishReason
from services.runtime.sampling_settings import ChatSettings
from services.tasks import Prompt

RUN_HEADER = "Sapo-Run"  # of the configuration: which run it is, in one word
EVENT_SECONDS = 15.0  # an event stream says something at least this often
MAX_NAME = 200
MAX_DEPTH = 32  # lists and objects in one another, of a body
MAX_LEASES = 1 << 16  # of one body
MAX_SHOWN_TOKENS = 1 << 18  # of one response
MAX_ENTRY = 60
ENTRY = "^[0-9]+-[0-9]+$"
"""Of the log: GENERATION-SEQUENCE."""


def check_worker_name(name: str) -> str:
    """Names are keys, labels and log lines. Raises ValueError that says what is wrong."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        shown = repr(name) if len(name) <= MAX_NAME else f"one of {len(name)} characters"
        raise ValueError(f"a worker's name has 1 to {MAX_NAME} printable characters, this is {shown}")
    return name


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return
        level = [*chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)]
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


WorkerName = Annotated[str, AfterValidator(check_worker_name)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
"""What every part counts with exactly: Lua's numbers, too."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class RequestBody(BaseModel):
    """What a peer sends. JSON can hold half a surrogate pair, which nothing here could write down again, and lists in
    lists so deep that whoever walks through them runs out of stack."""

    @model_validator(mode="before")
    @classmethod
    def _writable(cls, data: Any) -> Any:
        _check_depth(data)
        json.dumps(data, ensure_ascii=False, default=str).encode()  # UnicodeEncodeError is a ValueError
        return data


class LeaseRequest(RequestBody):
    worker: WorkerName
    count: int = Field(ge=0, le=4096)
    """Most draws the worker takes."""
    version: Count
    step: Count
    """Policy the worker serves: its number and optimizer step."""
    evaluate: bool = True
    """Whether the worker can take an evaluation chunk, too."""
    wait_seconds: float = Field(default=10, ge=0, le=60, allow_inf_nan=False)
    """How long the answer may wait for something to give."""


class LeasedDraw(BaseModel):
    draw: int
    attempt: int
    epoch: int
    seed: int
    task: str
    """Which of the run's tasks the prompt is from."""
    prompt: Prompt


class EvaluationChunk(BaseModel):
    """Held-out prompts of one task to answer under one pinned policy version."""

    evaluation: str
    chunk: int
    version: int
    samples: int
    """Responses per prompt."""
    seed: int
    """Of the first prompt's responses; the second's is one more, and so on."""
    task: str
    prompts: list[Prompt]
    temperature: float | None = None
    max_tokens: int | None = None
    chat: ChatSettings | None = None
    """Where they are not the run's own."""
    text_characters: int | None = None
    """How much of every response's text is wanted in the result; none: only what is correct."""


class LeaseResponse(BaseModel):
    draws: list[LeasedDraw] = []
    evaluation: EvaluationChunk | None = None
    waiting_for: str = ""
    """What keeps the control plane from granting more."""
    version: int
    """The current policy version."""


class LeaseProgress(BaseModel):
    draw: Count
    attempt: Count
    tokens: Count
    """Sampled for this lease since its last renewal; a lease without any is not renewed."""


class ProbeFigures(BaseModel):
    """How far the engine's log-probs are from the learner's on the newest version's probe, in nats."""

    max: Finite
    mean: Finite


class Unscored(BaseModel):
    """Responses that could not be scored, or not be replied to."""

    reasons: dict[str, Count] = Field(max_length=16)
    last: str = Field(max_length=2000)
    """Of which task and prompt the newest one was, and what was wrong."""


class Heartbeat(RequestBody):
    worker: WorkerName
    version: Count
    step: Count
    rows: Count
    """Responses in flight."""
    tokens: Count
    """Sampled since the worker started."""
    tokens_per_second: Finite
    busy: list[tuple[Finite, Finite]] = []
    """Unix times between which tokens were sampled, since the last heartbeat."""
    leases: list[LeaseProgress] = Field(default=[], max_length=MAX_LEASES)
    waiting_for: str = ""
    mixed_version_responses: Count = 0
    """Since the worker started."""
    notes: list[str] = []
    """What a person should know of, until the worker ends."""
    probe: ProbeFigures | None = None
    unscored: Unscored | None = None
    """Those since the last heartbeat; None when there are none."""


class HeartbeatResponse(BaseModel):
    version: int
    """The current policy version: the same hint that server-sent events give."""
    lost: list[LeaseProgress] = []
    """Leases that are no longer this worker's: stop sampling them."""


class ReleaseRequest(RequestBody):
    worker: WorkerName
    leases: list[LeaseProgress] = Field(max_length=MAX_LEASES)
    leaving: bool = False
    """The worker goes, or begins anew: whatever else is held under its name is handed back, too, also what it was
    granted without hearing of it."""
    probe_missed: bool = False
    """It goes because its engine computes a version otherwise than the learner."""


class Answer(BaseModel):
    """One response of an evaluation."""

    text: str
    tokens: Count
    """Of all of it, whatever became of its text."""
    finish_reason: FinishReason
    rewards: dict[str, Finite]
    correct: bool


class ChunkResult(RequestBody):
    worker: WorkerName
    evaluation: str
    chunk: Count
    version: Count
    correct: list[Count]
    """Correct responses per prompt of the chunk."""
    samples: int = Field(ge=1, le=1 << 53)
    """Responses of the chunk."""
    tokens: Count
    """Of all its responses."""
    examples: list[str] = []
    """One response per prompt."""
    answers: list[list[Answer]] = []
    """All of them by prompt, where they are asked for."""


class PublishRequest(RequestBody):
    token: Count
    """The learner's fencing token."""
    manifest: dict[str, Any]
    facts: dict[str, str] = {}
    """Vocabulary size and digests, for ingest."""


class PublishResponse(BaseModel):
    version: int | None = None
    """None while the policy is held back."""
    changed: bool = False
    held_for: str = ""
    """What must end before the policy may become current: ask again."""


class _ShownTokens(BaseModel):
    """One response's tokens as columns of one length; None: not known, or not sampled by the policy."""

    id: list[Count] = Field(max_length=MAX_SHOWN_TOKENS)
    text: list[Annotated[str, Field(max_length=2000)] | None] = Field(max_length=MAX_SHOWN_TOKENS)
    mask: list[bool] = Field(max_length=MAX_SHOWN_TOKENS)
    version: list[int] = Field(max_length=MAX_SHOWN_TOKENS)
    behaviour_logprob: list[Finite | None] = Field(max_length=MAX_SHOWN_TOKENS)
    ratio: list[Finite | None] = Field(max_length=MAX_SHOWN_TOKENS)
    gate_weight: list[Finite | None] = Field(max_length=MAX_SHOWN_TOKENS)
    coefficient: list[Finite | None] = Field(max_length=MAX_SHOWN_TOKENS)
    advantage: list[Finite | None] = Field(max_length=MAX_SHOWN_TOKENS)

    @model_validator(mode="after")
    def _of_one_length(self) -> "_ShownTokens":
        if len({len(getattr(self, name)) for name in type(self).model_fields}) > 1:
            raise ValueError("columns of different lengths")
        return self


class _ShownResponse(BaseModel):
    response: Count
    reward: Finite
    rewards: dict[Annotated[str, Field(max_length=MAX_NAME)], Finite] = Field(max_length=256)
    advantage: Finite | None
    finish_reason: str = Field(max_length=MAX_NAME)
    tokens: _ShownTokens


class _ShownPrompt(BaseModel):
    text: str | None = Field(max_length=1 << 20)
    tokens: Count


class ShownGroup(RequestBody):
    """A group as it was trained, token by token, for people to look at: what `sapo show` tells, tokens as columns."""

    entry: str = Field(pattern=ENTRY, max_length=MAX_ENTRY)
    step: Count
    draw: Count
    task: str = Field(max_length=MAX_NAME)
    prompt_id: str = Field(max_length=1 << 16)
    worker: str = Field(max_length=MAX_NAME)
    engine: str = Field(max_length=MAX_NAME)
    estimator: str = Field(max_length=MAX_NAME)
    objective: str = Field(max_length=2000)
    weight: Literal["gate", "coefficient"]
    """Which of the two `gate_weight` holds."""
    prompt: _ShownPrompt
    cut: Count = 0
    """Tokens left out of the responses' ends."""
    responses: list[_ShownResponse] = Field(max_length=4096)


class LearnerReport(RequestBody):
    """What the learner tells after every step, and when it starts or waits."""

    state: str
    step: Count
    cursor: Count
    ledger: dict[str, int]
    record: dict[str, Any] | None = None
    """The step's figures, for the run's record."""
    waiting_for: str = ""
