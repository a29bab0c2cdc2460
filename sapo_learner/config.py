"""Settings of the algorithm, and the one function that turns a mapping into settings or into a clear ConfigError.

No torch here: the control plane checks the shape of a run.yaml without it. Objective options are checked where
objectives are built (`sapo_learner.objectives.build`).
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sapo_learner.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings model: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ObjectiveSettings(BaseModel):
    """`objective: {name: sapo, tau_neg: 1.1}`: every key but `name` is an option of that objective."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str = "sapo"
    """File name of the objective in sapo_learner/objectives; or one of your own: a file such as ./mine.py, relative to
    the working directory, or module:ClassName."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class FilterSettings(BaseModel):
    """`filters: [{name: policy_age, max_age: 2}]`: every key but `name` is an option of that filter."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str
    """File name of the filter in sapo_learner/filters."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class AdvantageSettings(Settings):
    estimator: Literal["group", "leave_one_out", "batch_whitened", "gdpo"] = "group"
    """group: centred and divided by `std` within the group (GRPO, SAPO). leave_one_out: reward less the mean of the
    others. batch_whitened: centred within the group, divided by `std` over the step. gdpo: `group` for every reward
    component on its own, summed with `weights`, then divided by `std` over the step."""
    std: Literal["population", "sample", "none"] = "population"
    """Divide by this standard deviation (ddof 0 or 1), or not at all. leave_one_out never divides."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the standard deviation."""
    weights: dict[str, float] = {}
    """Of reward components, for estimator: gdpo; 1 where none is given."""

    @model_validator(mode="after")
    def _belong_to_the_estimator(self) -> "AdvantageSettings":
        if self.weights and self.estimator != "gdpo":
            raise ValueError("advantages.weights belong to advantages.estimator: gdpo")
        if self.std == "none" and self.estimator in ("batch_whitened", "gdpo"):
            raise ValueError(
                f"advantages.estimator {self.estimator} divides by a standard deviation: set advantages.std to "
                "population or sample; without one there is estimator: group with std: none"
            )
        return self


class AggregationSettings(Settings):
    mode: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    """sequence_mean: mean over tokens, then over responses (the SAPO paper). token_mean: mean over all tokens.
    constant: sum over tokens divided by `length`, then mean over responses (Dr. GRPO)."""
    length: int | None = Field(default=None, ge=1)
    """The constant of mode: constant, in tokens."""
    normalise_by: Literal["step", "signal"] = "step"
    """Whether groups without reward spread count in the denominators (step) or not (signal)."""

    @model_validator(mode="after")
    def _length_belongs_to_constant(self) -> "AggregationSettings":
        if (self.mode == "constant") != (self.length is not None):
            raise ValueError("aggregation.length and aggregation.mode: constant belong together")
        return self


class ProximalSettings(Settings):
    """Which policy the objective's ratio is to; see sapo_learner.proximal."""

    mode: Literal["behaviour", "recompute"] = "behaviour"
    """behaviour: the policy that sampled, as recorded. recompute (decoupled loss): the policy at the start of the step,
    which costs another forward pass, with the loss weighted by min(proximal / behaviour, bound). Since a step is one
    update, the objective's gate or clip is inert then: this mode is for comparisons."""
    bound: float = Field(default=2.0, ge=1)
    """Of that weight (truncated importance sampling); only for mode: recompute."""


class ReferenceSettings(Settings):
    """A penalty for leaving the policy that the run began with; see sapo_learner.reference."""

    kl_coefficient: float = Field(default=0.0, ge=0)
    """Of the k3 estimate of the KL divergence to it, added to every token's loss. 0: there is none. Otherwise the
    learner holds one more copy of the weights in memory and in the run's directory, and makes one more forward pass;
    groups without signal, which are not trained on, are not penalised either."""


class OptimizerSettings(Settings):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """0 leaves the weights as they are, as `sapo check` does at first."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient is scaled down to this global L2 norm."""
    warmup_steps: int = Field(default=5, ge=0)
    """The learning rate rises linearly over this many steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up; linear and cosine end at `final_fraction` in the run's last step."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)


class WarmStartSettings(Settings):
    """How the built-in tiny policy learns the task, then a bad habit, before RL begins."""

    batch: int = Field(default=64, ge=1)
    """Demonstrations per step."""
    clean_steps: int = Field(default=700, ge=1)
    clean_extra_steps: int = Field(default=200, ge=1)
    """Further steps, as often as needed, while held-out accuracy is below the target."""
    clean_limit: int = Field(default=2300, ge=1)
    """Steps after which the phase has failed."""
    clean_learning_rate: float = Field(default=4e-3, gt=0)
    clean_target: float = Field(default=0.95, gt=0, le=1)
    habit_steps: int = Field(default=25, ge=1)
    """Steps between two measurements of the habit phase."""
    habit_limit: int = Field(default=200, ge=1)
    habit_learning_rate: float = Field(default=5e-4, gt=0)
    habit_target: float = Field(default=0.40, ge=0, lt=1)
    habit_share: float = Field(default=0.6, ge=0, le=1)
    """Share of habit demonstrations that skip the reasoning and guess."""
    samples: int = Field(default=2000, ge=1)
    """Sampled responses behind each accuracy, at least."""
    max_tokens: int = Field(default=12, ge=1)
    """Token limit of such a response."""


class LoraSettings(Settings):
    """Train low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685); engines get the merged weights."""

    rank: int = Field(default=16, ge=1)
    """Of the two factors of an adapter."""
    alpha: float = Field(default=32, gt=0)
    """An adapter's product is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers get an adapter: all but the output projection, or those whose names end in one of these,
    such as [q_proj, v_proj]."""

    @model_validator(mode="before")
    @classmethod
    def _explain_refusals(cls, data: Any) -> Any:
        for key, reason in _NO_LORA_OPTION.items():
            if isinstance(data, Mapping) and key in data:
                raise ValueError(f"there is no {key}: {reason}")
        return data


_NO_LORA_OPTION = {
    "dropout": "the log-probs that training compares would be those of random sub-networks; leave it out",
    "modules_to_save": "everything but the adapters is frozen; leave lora out to train whole layers",
    "bias": "everything but the adapters is frozen; leave it out",
}


class PolicySettings(Settings):
    source: str = "tiny"
    """Directory of a Hugging Face causal language model, relative to the working directory; or, where there is no such
    directory, its id on the Hugging Face Hub, such as Qwen/Qwen3-0.6B; or "tiny": the built-in one, warm-started on
    the task."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; default: its main branch. The commit that it means when the run
    begins is the run's from then on."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights. Left out: all weights are trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the published snapshots, which engines sample with."""
    warm_start: WarmStartSettings = WarmStartSettings()


class CheckpointSettings(Settings):
    every: int = Field(default=10, ge=1)
    """Optimizer steps between checkpoints."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints stay on disk."""


class ArchiveSettings(Settings):
    keep: Literal["all", "checkpoints"] = "all"
    """all: the whole log stays, so that the run can be replayed from its first step. checkpoints: only what resuming
    from a kept checkpoint needs; whole segments before that are deleted."""
    segment_bytes: int = Field(default=256 << 20, ge=1 << 10)
    """Size from which a segment of the archive is followed by the next one."""


class DiagnosticsSettings(Settings):
    warn_spread: float = Field(default=0.25, gt=0)
    """Spread (standard deviation) of the log-ratio of current over behaviour policy, at some policy age, from which a
    warning names what to change first."""


class TrainingSettings(Settings):
    steps: int = Field(default=100, ge=1)
    """Optimizer steps of the run."""
    groups_per_step: int = Field(default=32, ge=1)
    max_policy_age: int = Field(default=8, ge=0)
    """Optimizer steps between the policy that sampled a token and the update that uses it: the upper bound."""
    microbatch_tokens: int = Field(default=16384, ge=1)
    """Tokens per forward pass, prompts included, no padding; a response longer than this gets a pass of its own."""
    threads: int = Field(default=1, ge=1)
    """torch threads of the learner process."""
    deterministic: bool = True
    """Ask torch for deterministic kernels (bit-exact on CPU)."""


class ParallelSettings(Settings):
    """How many processes the learner is, and what each of them holds; see docs/scaling.md."""

    processes: int = Field(default=1, ge=1)
    """Learner processes that `sapo up` starts with torchrun, one for each GPU. In a deployment torchrun says how
    many."""
    shard: int | None = Field(default=None, ge=1)
    """How many of them share one copy of the weights (FSDP2). Left out: all. A divisor of their number: copies are
    replicated (hybrid sharding), as for nodes whose links are slower than those within."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of a forward and backward pass. Weights that the optimizer sees, sums of gradients, log-probs and losses are
    float32 in any case."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the layer again for its gradient: less memory, a third more time."""


class LearnerSettings(Settings):
    """Everything that decides what the weights become, given the log."""

    training: TrainingSettings = TrainingSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    advantages: AdvantageSettings = AdvantageSettings()
    filters: list[FilterSettings] = []
    """Which tokens do not count, in addition to the loss mask; they stay in the denominators."""
    proximal: ProximalSettings = ProximalSettings()
    reference: ReferenceSettings = ReferenceSettings()
    aggregation: AggregationSettings = AggregationSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()

    @model_validator(mode="after")
    def _warm_up_fits(self) -> "LearnerSettings":
        warmup, steps = self.optimizer.warmup_steps, self.training.steps
        if warmup >= steps and self.optimizer.schedule != "constant":
            raise ValueError(f"optimizer.warmup_steps {warmup} leaves nothing of training.steps {steps}")
        return self


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], data: Mapping[str, Any], *, where: str, fix: str = "") -> Model:
    """Validate `data`, or raise one ConfigError naming every wrong key, its place and the nearest right name."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        sentences = "; ".join(_sentence(model, data, each) for each in error.errors())
        raise ConfigError(sentences, where=where, fix=fix) from None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """What exists, after "did you mean 'x'?" when something is near."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}"


def _sentence(model: type[BaseModel], data: Mapping[str, Any], error: Mapping[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}, {did_you_mean(path[-1], _fields_at(model, path[:-1]))}"
    if error["type"] == "missing":
        return f"{dotted!r} is required"
    if error["input"] is None and error["type"] != "value_error":
        return f"{dotted!r} is empty (null): give it a value, or leave the key out"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{dotted!r}: is a section with keys of its own, got {_short(error['input'])}"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", got {_short(error['input'])}"
    return f"{dotted!r}: {message}{given}" if dotted else f"{message}{given}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model that `path` leads to from `model`, through lists and mappings of models too."""
    for part in path:
        if part not in model.model_fields:
            continue  # an index or a key: the element's model is already at hand
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), model)
    return list(model.model_fields)
