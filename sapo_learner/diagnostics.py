"""What an objective did to each token, reported the same way whatever the objective is.

Over the tokens of a step that the loss sees, in all and by group: sign of the advantage (positive, negative) and policy
age in optimizer steps (age_0, age_1, age_2, age_3_4, ...).

    log_ratio               mean of z = log pi_theta - log pi_old, which staleness alone leaves near 0
    log_ratio_std           spread of z
    importance_ratio        mean of e^z
    kl                      mean of e^z - 1 - z >= 0: the k3 estimate (J. Schulman, "Approximating KL divergence") of
                            KL(pi_old || pi_theta) on tokens of pi_old
    clamped                 share of tokens whose z was cut off, and with it their gradient
    coefficient             c in  d loss / d log pi_theta(y_t) = -c A_t, with every token's loss counted once: what is
                            left of the plain policy gradient, for which c is 1. Mean, quantiles _p10, _p50, _p90
    effective_sample_size   (sum c)^2 / (n sum c^2), in (0, 1]: 1 when all tokens count alike
    gate, gate_below_half   only where the objective has one: mean (and quantiles) of its weight, share below 1/2
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapo_learner.objectives import Surrogate, Tokens

Values = NDArray[np.float64]
Groups = dict[str, dict[str, float]]
AGE_EDGES = (0, 1, 2, 3, 5, 9, 17, 33)
"""A group of ages begins at each, and ends before the next."""
COLUMNS = ("log_ratio", "clamped", "coefficient", "advantage", "age", "gate")
LOG_RATIO_EDGES = (
    -2, -1, -0.5, -0.2, -0.1, -0.05, -0.02, -0.01, -0.005, -0.002, -0.001,
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2,
)  # fmt: skip
"""Of the bins of `histograms`; the outer two are open."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def coefficients(tokens: Tokens, surrogate: Surrogate) -> Tensor:
    """[T] float: c, without gradient; 0 where the advantage is 0 or the token is masked. Keeps the graph."""
    (gradient,) = torch.autograd.grad(surrogate.loss.sum(), tokens.logprobs, retain_graph=True)
    advantages = tokens.masked_advantages
    return torch.where(advantages == 0, 0.0, -gradient.to(tokens.dtype) / advantages)


def columns(tokens: Tokens, surrogate: Surrogate) -> dict[str, Tensor]:
    """What `summary` needs of a microbatch, by name, each [T]. Before backward: the coefficient needs the graph."""
    assert tokens.policy_age is not None
    found = {
        "log_ratio": tokens.log_ratio,
        "clamped": tokens.clamped,
        "coefficient": coefficients(tokens, surrogate),
        "advantage": tokens.masked_advantages,
        "age": tokens.policy_age,
    }
    return found | {name: surrogate.diagnostics[name] for name in ("gate",) if name in surrogate.diagnostics}


def summary(columns: Mapping[str, Values]) -> Groups:
    """name -> group -> figure; groups without tokens are left out. columns: over the unmasked tokens of a step."""
    found: Groups = {}
    for group, chosen in _groups(columns["advantage"], columns["age"]):
        for name, figure in _figures({each: values[chosen] for each, values in columns.items()}).items():
            found.setdefault(name, {})[group] = figure
    return found


def histograms(columns: Mapping[str, Values]) -> dict[str, Any]:
    """Where the log-ratio lies, and what an objective makes of it there. columns: as for `summary`.

    tokens: group -> [22 + 1] tokens in each bin between LOG_RATIO_EDGES. weight: sign -> [22 + 1] mean gate of the
    tokens in it, of an objective without one the coefficient; None where there is no token.
    """
    bins = np.digitize(columns["log_ratio"], LOG_RATIO_EDGES)
    name = "gate" if "gate" in columns else "coefficient"
    tokens: dict[str, list[int]] = {}
    weight: dict[str, list[float | None]] = {}
    for group, chosen in _groups(columns["advantage"], columns["age"]):
        counts = np.bincount(bins[chosen], minlength=len(LOG_RATIO_EDGES) + 1)
        tokens[group] = counts.tolist()
        if group in ("positive", "negative"):
            sums = np.bincount(bins[chosen], columns[name][chosen], minlength=len(counts))
            weight[group] = [float(f"{s / n:.4g}") if n else None for s, n in zip(sums, counts, strict=True)]
    return {"edges": [*LOG_RATIO_EDGES], "tokens": tokens, "weight_name": name, "weight": weight}


def _groups(advantages: Values, ages: Values) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    everything = {"all": np.ones(len(ages), np.bool_), "positive": advantages > 0, "negative": advantages < 0}
    for first, beyond in zip(AGE_EDGES, (*AGE_EDGES[1:], np.inf), strict=True):
        everything[_age_name(first, beyond)] = (ages >= first) & (ages < beyond)
    for name, chosen in everything.items():
        if chosen.any():
            yield name, chosen


def _age_name(first: int, beyond: float) -> str:
    if beyond == first + 1:
        return f"age_{first}"
    return f"age_{first}_{int(beyond) - 1}" if np.isfinite(beyond) else f"age_{first}_on"


def _figures(columns: Mapping[str, Values]) -> dict[str, float]:
    z, weights = columns["log_ratio"], columns["coefficient"]
    squares = float((weights**2).sum())
    figures = {
        "log_ratio": float(z.mean()),
        "log_ratio_std": float(z.std()),
        "importance_ratio": float(np.exp(z).mean()),
        "kl": float((np.expm1(z) - z).mean()),
        "clamped": float(columns["clamped"].mean()),
        "effective_sample_size": float(weights.sum() ** 2 / (len(weights) * squares)) if squares else 0.0,
        **_distribution("coefficient", weights),
    }
    if "gate" in columns:
        figures |= _distribution("gate", columns["gate"])
        figures["gate_below_half"] = float((columns["gate"] < 0.5).mean())
    return figures


def _distribution(name: str, values: Values) -> dict[str, float]:
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return {name: float(values.mean())} | {
        f"{name}_{label}": float(value) for label, value in zip(QUANTILES, quantiles, strict=True)
    }


def advice(summary: Mapping[str, Mapping[str, float]], threshold: float) -> str | None:
    """Which lever to pull first when the spread of the log-ratio at some age passes `threshold`; None when none does.

    What an age-0 token's ratio shows is the engine, not staleness. The threshold is a rule of thumb: it comes from a
    toy (docs/objectives.md).
    """
    spreads = {group: value for group, value in summary.get("log_ratio_std", {}).items() if group.startswith("age_")}
    wide = [group for group, value in spreads.items() if value > threshold]
    if not wide:
        return None
    said = ", ".join(f"{spreads[group]:.2f} at {group.replace('_', ' ')}" for group in wide)
    what = f"current and behaviour log-probs are far apart (spread {said}; threshold {threshold:g})"
    if "age_0" in wide:
        return f"{what}: tokens of the newest policy, too, so engine and learner differ; run `sapo check`"
    if "age_1" in wide:
        return f"{what}: one step moves the policy that far; lower optimizer.learning_rate first"
    return f"{what}: lower pacing.lookahead first, or drop such tokens with a filter"
