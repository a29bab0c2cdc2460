"""What torchrun starts on every rank (see test_several_ranks.py): each case as a step of all, and of a process alone.

torchrun --standalone --nproc-per-node 2 -m tests.sapo_learner.ranked_steps DIRECTORY      writes DIRECTORY/rank-N.json
"""

import copy
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sapo_learner import filters, objectives, reference
from sapo_learner.batching import TrainingBatch
from sapo_learner.config import LearnerSettings, ParallelSettings
from sapo_learner.hidden_states import use_packing
from sapo_learner.learner import Learner
from sapo_learner.objectives import Objective, Surrogate, Tokens
from sapo_learner.parallel import ALONE, Ranks, joined
from sapo_learner.policy import Policy
from sapo_learner.sharding import sharded, whole
from sapo_learner.step_report import UpdateReport
from sapo_learner.trajectory import TrajectoryGroup
from tests.recorded import degenerate_group
from tests.sapo_learner import ranked_models
from tests.sapo_learner.recorded_steps import GROUPS, OPTIONS, MeanCapped, batch_of, double_policy, settings_of

MANY, ONE, EACH = 40, 10**6, 1  # token budgets: several microbatches, one, and one per response


class InfiniteOnce(Objective):
    """A loss that is not finite in one response alone, so on one rank."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        loss = -tokens.log_ratio * tokens.masked_advantages
        return Surrogate(loss=torch.where(tokens.sequence_ids == 3, loss * torch.inf, loss), diagnostics={})


class SaysMoreOfLongOnes(Objective):
    """A diagnostic that not every microbatch has."""

    def __call__(self, tokens: Tokens) -> Surrogate:
        loss = -tokens.log_ratio * tokens.masked_advantages
        return Surrogate(loss=loss, diagnostics={"long": loss.detach()} if len(loss) > 12 else {})


@dataclass(frozen=True)
class Case:
    settings: LearnerSettings
    budget: int = MANY
    objective: Objective | None = None  # in place of the settings'
    groups: Sequence[TrajectoryGroup] = field(default_factory=lambda: GROUPS)

    @property
    def batch(self) -> TrainingBatch:
        return batch_of(self.settings, self.groups, self.budget)


def cases() -> dict[str, Case]:
    """Every objective, every filter, every estimator, and what is special about several ranks."""
    chosen: dict[str, list[dict[str, Any]]] = {
        name: [{"name": name, **OPTIONS.get(name, {})}] for name in filters.available()
    }
    chosen["none"], nobody = [], [{"name": "policy_age", "max_age": 0}]
    together = [*chosen["policy_age"], *chosen["negative_sequence_mask"], *chosen["icepop"]]
    found = {
        f"{objective}-{name}": Case(settings_of(objective, filters=parts))
        for objective in objectives.available()
        for name, parts in chosen.items()
        if objective == "sapo" or name in ("none", "negative_sequence_mask")
    }
    for estimator in ("group", "leave_one_out", "batch_whitened", "gdpo"):
        for std in ("population", "sample"):
            found[f"{estimator}-{std}"] = Case(settings_of(advantages={"estimator": estimator, "std": std}))
    decay = {"learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 1e9, "weight_decay": 0.1}
    recompute, kl = {"mode": "recompute"}, {"kl_coefficient": 0.1}
    return found | {
        "filters together": Case(settings_of(filters=together)),
        "clipped": Case(settings_of(optimizer={**decay, "max_grad_norm": 1e-3})),
        "one response each": Case(settings_of(), EACH),
        "one microbatch": Case(settings_of(optimizer=decay), ONE),
        "one microbatch, bapo": Case(settings_of("bapo"), ONE),
        "one microbatch, filtered": Case(settings_of(filters=chosen["icepop"]), ONE),
        "MeanCapped": Case(settings_of(), objective=MeanCapped()),
        "MeanCapped, one microbatch": Case(settings_of(), ONE, MeanCapped()),
        "says more of long ones": Case(settings_of(), EACH, SaysMoreOfLongOnes()),
        "recompute": Case(settings_of("grpo", proximal=recompute)),
        "recompute, one microbatch": Case(settings_of("bapo", proximal=recompute), ONE),
        "reference": Case(settings_of(reference=kl)),
        "reference, one microbatch": Case(settings_of(reference=kl), ONE),
        "all dropped": Case(settings_of(filters=nobody, optimizer=decay)),
        "not finite": Case(settings_of(), EACH, InfiniteOnce()),
        "no signal": Case(settings_of(optimizer=decay), groups=[degenerate_group(0)]),
    }


def step(case: Case, ranks: Ranks, directory: Path) -> tuple[UpdateReport, torch.Tensor, Policy]:
    """Report, gradient as one vector (0 where a parameter has none) and the policy after the step."""
    policy = double_policy()
    policy.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    if case.settings.reference.kl_coefficient:
        other = copy.deepcopy(policy)
        for parameter in other.model.parameters():
            parameter.data.mul_(0.9)
        reference.keep(directory, other, reference.digest_of(other))
    if ranks.size > 1:
        use_packing(policy)
        policy = sharded(policy, ranks, ParallelSettings(), torch.device("cpu"), policy.tensors())
    learner = Learner(policy, case.settings, temperature=1.0, ranks=ranks, reference_directory=directory)
    learner.objective = case.objective or learner.objective
    report = learner.step(case.batch)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in policy.model.parameters()]
    return report, torch.cat([whole(each).flatten() for each in gradients]), policy


def result(case: Case, ranks: Ranks, directory: Path) -> dict[str, Any]:
    alone, expected, _ = step(case, ALONE, directory)
    shared, found, policy = step(case, ranks, directory)
    return {
        "microbatches": ranks.shares([1] * len(case.batch.microbatches))[ranks.rank],
        "norm": float(expected.norm()),
        "difference": float((found - expected).norm()),
        "unused": whole(policy.model.get_parameter("unused")).tolist(),
        "digest": reference.digest_of(policy),
        "applied": shared.applied,
        "refusal": shared.refusal,
        "report": text(shared),
        "report_alone": text(alone),
    }


def text(report: UpdateReport) -> str:
    """To the last bit, but for the gradient's norm, which is summed in another order, and what the step cost."""
    costs = {"seconds": {}, "memory_bytes": {}, "slowest_rank_seconds": 0.0, "flops_per_second": None, "mfu": None}
    return json.dumps(asdict(replace(report, gradient_norm=0.0, **costs)), sort_keys=True)


def one_rank_s_disk(ranks: Ranks, directory: Path) -> dict[str, Any]:
    """What every rank hears when the last one cannot read, and whether they still understand each other then."""

    def read() -> int:
        if ranks.rank == ranks.size - 1:
            (directory / "missing").read_bytes()
        return ranks.rank

    try:
        refused = str(ranks.each(read))
    except OSError as error:
        refused = str(error)
    return {"refused": refused, "then": ranks.each(lambda: ranks.rank)}


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        own = directory / f"reference-{ranks.rank}"
        many = ranks.size > 2
        found = {} if many else {name: result(case, ranks, own) for name, case in cases().items()}
        models = ranked_models.results(ranks, directory, shard=2 if many else None)
        results = {"pid": os.getpid(), "size": ranks.size, "cases": found, "models": models}
        results["one rank's disk"] = one_rank_s_disk(ranks, directory)
        (directory / f"rank-{ranks.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
