"""benchmarks/results/gpu.md from the figures of benchmarks.gpu."""

import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

from benchmarks.gpu_cases import MEASURED, MINIATURES, SHAPES, WARM_UP, Case
from benchmarks.machine import machine
from sapo_learner.flops import ModelFlops

GIB = 1 << 30

NOT_MEASURED = """\
**not measured: no NVIDIA GPU was at hand**; the miniature figures below only show that the script runs. Where there is
one, this replaces them with figures of Qwen3-shaped 0.6B, 1.7B and 4B and a small mixture of experts at 2,048, 8,192
and 32,768 packed tokens, in 25 minutes at most:

    python -m benchmarks.gpu

"""
TEXT = """\
# Optimizer steps and log-probs on one GPU

{notice}`{command}`

{where}; torch {torch}, transformers {transformers}, TRL {trl}.
Every row is a fresh process: {warm_up} runs to warm up, then the median of {measured}.{over}

## Optimizer steps

The learner's own, of the objective SAPO: forward, backward, clipping, AdamW. Weights, gradients and moments are
float32, passes bfloat16, sharded over a process group of one. Random weights; synthetic groups with log-normal lengths
whose responses, prompts included, fill one packed row to the token. `training.deterministic` is off, other than in
`run.yaml`, but in the row that says so; TF32 is `torch.set_float32_matmul_precision("high")`, which the learner sets
for passes in bfloat16. Peak: what torch allocated at most, weights and optimizer included.

Model FLOP and MFU are what the learner reports (`sapo_learner/flops.py`, after PaLM, appendix B): 6 per active weight
and token, of the output projection per trained token alone, and 12 x heads x head size per layer and pair of tokens of
one sequence, masked ones included; over the dense bfloat16 peak of the card, where its data sheet is known there.

| model | packed tokens | responses (longest) | step, ms | trained tokens/s | model TFLOP/s | MFU | peak GiB |
|---|---|---|---|---|---|---|---|
{steps}
| model | vocabulary | hidden | layers | heads, key/value x size | intermediate | parameters | active | checkpointing |
|---|---|---|---|---|---|---|---|---|
{shapes}
Active: weights that a trained token is multiplied with. Tied: the output projection is the embedding.
Checkpointing: `parallel.activation_checkpointing`.

## Log-probs from hidden states

Forward and backward with random per-token gradients, from bfloat16 hidden states [T, {width}] and a bfloat16 output
projection [{words}, {width}]. naive: float32 logits, log_softmax, gather. TRL, full logits: its `selective_log_softmax`
on bfloat16 logits. TRL, chunked: its `ChunkedLogProbFunction` with entropy, as in its GRPO trainer. ours:
`token_logprobs` with entropy. Peak: above what the inputs take. Difference: the largest from float32 logits of the same
inputs.

| tokens | log-probs | ms | of naive | peak GiB | largest difference, nats |
|---|---|---|---|---|---|
{logprobs}"""

Figures = Mapping[Case, Mapping[str, Any]]


def report(asked: Sequence[Case], figures: Figures, *, command: str, small: bool, minutes: float) -> str:
    """The whole file. asked: every row in order; one without figures was not reached in time."""
    shapes = MINIATURES if small else SHAPES
    first = next(iter(shapes.values())).config
    missing = len(asked) - len(figures)
    return TEXT.format(
        notice=NOT_MEASURED if small else "", command=command, where=_where(figures), warm_up=WARM_UP,
        torch=metadata.version("torch"), transformers=metadata.version("transformers"), trl=_trl(), measured=MEASURED,
        over=f" {missing} of {len(asked)} rows were not reached in {minutes:g} minutes." if missing else "",
        steps="".join(_step_row(each, figures.get(each)) for each in asked if each.table == "steps"),
        shapes="".join(map(_shape_row, SHAPES | shapes)),
        width=f"{first['hidden_size']:,}", words=f"{first['vocab_size']:,}",
        logprobs="".join(_logprob_row(each, figures) for each in asked if each.table == "logprobs"),
    )  # fmt: skip


def _where(figures: Figures) -> str:
    cards = sorted({each["card"] for each in figures.values() if each.get("card")})
    return f"{', '.join(cards) or 'no GPU'}; {machine()}"


def _trl() -> str:
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return "not installed"


def _step_row(case: Case, found: Mapping[str, Any] | None) -> str:
    start = [case.shape + (f", {case.way}" if case.way else ""), f"{case.tokens:,}"]
    if not found or "problem" in found:
        return _row(*start, _problem(found), *[""] * 5)
    seconds = statistics.median(found["seconds"])
    rate, peak = found["flops"] / seconds, found["peak"]
    return _row(
        *start, f"{found['responses']} ({found['longest']:,})", f"{seconds * 1000:,.1f}",
        f"{found['trained'] / seconds:,.0f}", f"{rate / 1e12:,.4g}", f"{rate / peak:.1%}" if peak else "-",
        _memory(found),
    )  # fmt: skip


def _logprob_row(case: Case, figures: Figures) -> str:
    found, start = figures.get(case), (f"{case.tokens:,}", case.way)
    if not found or "problem" in found:
        return _row(*start, _problem(found), *[""] * 3)
    seconds = statistics.median(found["seconds"])
    naive = figures.get(Case(case.table, case.shape, case.tokens, "naive"), {}).get("seconds")
    ratio = f"{seconds / statistics.median(naive):.2f}" if naive else "-"
    return _row(*start, f"{seconds * 1000:,.1f}", ratio, _memory(found), f"{found['difference']:.1e}")


@cache  # the report is written after every row
def _shape_row(name: str) -> str:
    shape = (SHAPES | MINIATURES)[name]
    config = shape.config
    intermediate = f"{config['intermediate_size']:,}"
    if "num_experts" in config:
        sizes = [config[key] for key in ("num_experts", "moe_intermediate_size", "num_experts_per_tok")]
        intermediate = "{} experts of {:,}, {} active".format(*sizes)
    heads = f"{config['num_attention_heads']}, {config['num_key_value_heads']} x {config['head_dim']}"
    policy = shape.empty()
    parameters, flops = sum(each.numel() for each in policy.model.parameters()), ModelFlops.of(policy)
    assert flops is not None
    active = (flops.per_token + flops.per_target) / 6
    return _row(
        name, f"{config['vocab_size']:,}", f"{config['hidden_size']:,}", str(config["num_hidden_layers"]), heads,
        intermediate,
        f"{parameters:,}" + (", tied" if config["tie_word_embeddings"] else ""), f"{active:,.0f}",
        "yes" if shape.checkpointing else "no",
    )  # fmt: skip


def _problem(found: Mapping[str, Any] | None) -> str:
    return str(found["problem"]) if found else "skipped: the time was over"


def _memory(found: Mapping[str, Any]) -> str:
    return "-" if found["memory"] is None else f"{found['memory'] / GIB:.2f}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
