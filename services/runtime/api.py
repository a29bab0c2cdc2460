"""What crosses the control plane's HTTP API: one pydantic model per body, used by both ends."""

from typing import Any

from pydantic import BaseModel, Field


class ProblemBody(BaseModel):
    id: str
    prompt: str
    answer: str


class LeaseRequest(BaseModel):
    worker: str
    count: int = Field(ge=0, le=4096)
    """Most draws the worker takes."""
    version: int = Field(ge=0)
    step: int = Field(ge=0)
    """Policy the worker serves: its number and optimizer step."""
    evaluate: bool = True
    """Whether the worker can take an evaluation chunk, too."""
    wait_seconds: float = Field(default=10, ge=0, le=60)
    """How long the answer may wait for something to give."""


class LeasedDraw(BaseModel):
    draw: int
    attempt: int
    epoch: int
    seed: int
    problem: ProblemBody


class EvaluationChunk(BaseModel):
    """Held-out problems to answer under one pinned policy version."""

    evaluation: str
    chunk: int
    version: int
    samples: int
    """Responses per problem."""
    seed: int
    problems: list[ProblemBody]


class LeaseResponse(BaseModel):
    draws: list[LeasedDraw] = []
    evaluation: EvaluationChunk | None = None
    waiting_for: str = ""
    """What keeps the control plane from granting more."""
    version: int
    """The current policy version."""


class LeaseProgress(BaseModel):
    draw: int
    attempt: int
    tokens: int = Field(ge=0)
    """Sampled for this lease since its last renewal; a lease without any is not renewed."""


class Heartbeat(BaseModel):
    worker: str
    version: int
    step: int
    rows: int
    """Responses in flight."""
    tokens: int
    """Sampled since the worker started."""
    tokens_per_second: float
    busy: list[tuple[float, float]] = []
    """Unix times between which tokens were sampled, since the last heartbeat."""
    leases: list[LeaseProgress] = []
    waiting_for: str = ""
    mixed_version_responses: int = 0
    """Since the worker started."""


class HeartbeatResponse(BaseModel):
    version: int
    """The current policy version: the same hint that server-sent events give."""
    lost: list[LeaseProgress] = []
    """Leases that are no longer this worker's: stop sampling them."""


class ReleaseRequest(BaseModel):
    worker: str
    leases: list[LeaseProgress]


class ChunkResult(BaseModel):
    worker: str
    evaluation: str
    chunk: int = Field(ge=0)
    version: int
    correct: list[int]
    """Correct responses per problem of the chunk."""
    samples: int = Field(ge=1)
    """Responses of the chunk."""
    tokens: int = Field(ge=0)
    """Of all its responses."""
    examples: list[str] = []
    """One response per problem."""


class PublishRequest(BaseModel):
    token: int
    """The learner's fencing token."""
    manifest: dict[str, Any]
    facts: dict[str, str] = {}
    """Vocabulary size and digests, for ingest."""


class PublishResponse(BaseModel):
    version: int
    changed: bool


class LearnerReport(BaseModel):
    """What the learner tells after every step, and when it starts or waits."""

    state: str
    step: int
    cursor: int
    ledger: dict[str, int]
    record: dict[str, Any] | None = None
    """The step's figures, for the run's record."""
    waiting_for: str = ""
