"""From the numbers of a run to one sentence: do engine and learner agree, and if not, which setting is to blame?

Each cause has a test of its own, made so that an honest engine passes it and the other causes do not; the first one
that fits is named. Codes of a verdict that disagrees: logprob_mode, temperature, truncated, dtype, decoding, weights,
stale_cache, cache_or_weights; of one that says too little: standing_still.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from sapo_learner.agreement import Tail, TokenTable, Values, odd_tail, tails

NEARLY_ALL = 0.98
CORRELATED = 0.3
MEAN_IN_LOW_PRECISION = 0.05
"""Nats by which 16-bit arithmetic moves a log-prob, on average: more than that is no rounding."""


@dataclass(frozen=True)
class Bounds:
    """Differences in nats that an engine's arithmetic may make. drift: by how much log-probs must change from version
    to version, on average, for a stale cache to stand out."""

    mean: float
    largest: float | None
    drift: float

    def broken(self, difference: Values) -> bool:
        if not len(difference):
            return False
        sizes = np.abs(difference)
        return bool(sizes.mean() > self.mean or (self.largest is not None and sizes.max() > self.largest))


BOUNDS = {"float32": Bounds(1e-4, 1e-4, 0.01), "bfloat16": Bounds(MEAN_IN_LOW_PRECISION, None, 0.25)}
"""By policy.dtype. In bfloat16 single tokens may differ by a nat, so that only the mean is bounded."""

State = Literal["agrees", "disagrees", "untested"]


@dataclass(frozen=True)
class Verdict:
    """cause, fix: empty when all is well. code: the cause's short name, for scripts."""

    state: State
    code: str = ""
    cause: str = ""
    fix: str = ""

    @property
    def sentence(self) -> str:
        if self.state == "disagrees":
            return f"does not agree: {self.cause}; {self.fix}"
        if self.state == "untested":
            return f"agrees as far as it was tested, but {self.cause}; {self.fix}"
        return "agrees"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence}


@dataclass(frozen=True)
class Evidence:
    """What the causes are judged by. rounding: by how much bfloat16 moves the learner's own log-prob of each token
    before the first update, computed when asked, because it takes another forward pass."""

    table: TokenTable
    temperature: float
    dtype: str
    rounding: Callable[[], Values]

    @property
    def bounds(self) -> Bounds:
        return BOUNDS[self.dtype]

    @property
    def start(self) -> TokenTable:
        """Sampled before the weights ever changed: what is wrong here has nothing to do with updates."""
        return self.table.where(~self.table.updated)

    def broken(self, chosen: TokenTable) -> bool:
        return self.bounds.broken(chosen.difference)


def diagnose(evidence: Evidence) -> Verdict:
    """The first cause that fits; otherwise whether what was sampled could have shown every one of them."""
    if evidence.broken(evidence.start):
        causes = (_wrong_logprob_mode, _renormalised, _low_precision, _decode_path)
        found = next((verdict for cause in causes if (verdict := cause(evidence))), None)
        return found or _other_weights("before the first update")
    if evidence.broken(evidence.table):
        return _after_an_update(evidence)
    return _odd_sampling(evidence) or _tested(evidence)


def _wrong_logprob_mode(evidence: Evidence) -> Verdict | None:
    """Differences vanish against log-probs at temperature 1, and only there. Whether the tokens were drawn at the run's
    temperature nevertheless is what their ranks say: drawn from a flatter distribution, too many lie in the tail."""
    start = evidence.start
    raw = replace(start, logprobs=start.raw)
    if evidence.temperature == 1 or evidence.broken(raw):
        return None
    where = f"recorded log-probs are those at temperature 1, not at {evidence.temperature:g}"
    if (odd := odd_tail(tails(evidence.table))) and odd.share > 1:
        return Verdict(
            "disagrees", "temperature", f"{where}, and the tokens were drawn so, too: the engine ignores temperature",
            "have the engine apply sampling.temperature, or set it to 1",
        )  # fmt: skip
    return Verdict(
        "disagrees", "logprob_mode", where,
        "set the engine's log-prob mode to processed (after temperature), or sample at temperature 1",
    )  # fmt: skip


def _renormalised(evidence: Evidence) -> Verdict | None:
    """recorded - recomputed = -log(kept mass): never negative, and the kept mass it gives covers the token itself and
    all that ranks before it. Other weights would be too high here and too low there."""
    noise = evidence.bounds.largest or evidence.bounds.mean
    off = evidence.start.where(np.abs(evidence.start.difference) > noise)
    if not len(off):
        return None
    covered = off.before + np.exp(off.logprobs) <= np.exp(-off.difference) + noise
    if np.mean((off.difference > 0) & covered) < NEARLY_ALL:
        return None
    return _truncated("recorded log-probs are renormalised over a part of the vocabulary")


def _truncated(what: str) -> Verdict:
    return Verdict(
        "disagrees", "truncated", f"truncated sampling: {what}",
        "switch top_p, top_k and min_p off in the engine, also where the model's generation_config.json sets them",
    )  # fmt: skip


def _low_precision(evidence: Evidence) -> Verdict | None:
    """float32 was asked for, differences are as small as rounding makes them, and they go with the error that bfloat16
    makes on the learner's own side. Another cause's differences would have nothing to do with that error."""
    difference = evidence.start.difference
    if evidence.dtype != "float32" or np.abs(difference).mean() > MEAN_IN_LOW_PRECISION or len(difference) < 2:
        return None
    rounding = evidence.rounding()
    if not rounding.std() or np.corrcoef(difference, rounding)[0, 1] < CORRELATED:
        return None
    return Verdict(
        "disagrees", "dtype", "the engine computes in bfloat16, but the run asks for float32",
        "run the engine in float32, or set policy.dtype to bfloat16",
    )  # fmt: skip


def _decode_path(evidence: Evidence) -> Verdict | None:
    """First tokens, which follow the prompt's pass, agree; later ones, which are decoded over the cache, do not."""
    start = evidence.start
    first = start.where(start.position == 0)
    if not len(first) or evidence.broken(first):
        return None
    return Verdict(
        "disagrees", "decoding", "first tokens agree, later ones do not: the engine's cache is wrong while it decodes",
        "try another attention backend and no cache quantisation (kv_cache_dtype auto)",
    )  # fmt: skip


def _other_weights(when: str) -> Verdict:
    """All positions alike."""
    return Verdict(
        "disagrees", "weights", f"the engine computes with other weights than the published ones {when}",
        "compare its tensors with the snapshot's one by one: names, fused or transposed layers, tied embeddings, "
        "quantisation",
    )  # fmt: skip


def _after_an_update(evidence: Evidence) -> Verdict:
    """Agreement at first, none after an update. What the engine could remember from before the update tells why.

    `changed`: earlier tokens of the response. `recurring`: the prompt. Tokens with neither have nothing stale to look
    back at; where those disagree, the weights do.
    """
    updated = evidence.table.where(evidence.table.updated)
    fresh = updated.where(~updated.changed & ~updated.recurring)
    if evidence.broken(fresh):
        return _other_weights("after an update")
    begun = updated.where(~updated.changed)
    if evidence.broken(begun) and not len(fresh):
        return Verdict(
            "disagrees", "cache_or_weights", "log-probs are wrong after an update, from the first token on",
            "have the engine reset its prefix cache at every update, and compare its weights with the snapshot's",
        )  # fmt: skip
    what = "of prompts seen before" if evidence.broken(begun) else "of responses that were under way"
    return Verdict(
        "disagrees", "stale_cache", f"after an update the engine goes on with old keys and values {what}",
        "have it reset the prefix cache and recompute responses in flight at every update",
    )  # fmt: skip


def _odd_sampling(evidence: Evidence) -> Verdict | None:
    """Log-probs are right, but the tokens' ranks are not those that honest sampling gives."""
    odd = odd_tail(tails(evidence.table))
    if odd is None:
        return None
    what = f"log-probs are right, but {_count(odd)} from the least likely {1 - odd.threshold:.0%}"
    if odd.share < 1:
        return _truncated(what)
    return Verdict(
        "disagrees", "temperature", what,
        "have the engine draw tokens at the temperature that it records log-probs at",
    )  # fmt: skip


def _count(tail: Tail) -> str:
    return f"{tail.found} tokens instead of about {tail.expected:.0f} came"


def _tested(evidence: Evidence) -> Verdict:
    """Agreement is worth something only where a fault would have shown."""
    table = evidence.table
    if not table.updated.any() or table.drift < evidence.bounds.drift:
        return Verdict(
            "untested", "standing_still", f"the weights hardly changed (mean |log ratio| {table.drift:.2g}), so that a "
            "stale cache could not show",
            "give problems that are solved now and then, or more --steps: without a spread of rewards nothing moves",
        )  # fmt: skip
    return Verdict("agrees")
