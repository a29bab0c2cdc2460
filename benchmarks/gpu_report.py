"""benchmarks/results/gpu.md from the figures of benchmarks.gpu, and how many operations a step takes."""

import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from benchmarks.gpu_cases import MEASURED, MINIATURES, SHAPES, WARM_UP, Case
from benchmarks.machine import machine

#: Dense bfloat16, as NVIDIA states it, by torch's name of the card. The PCIe and NVL cards of these names are slower.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
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

Model FLOP = 6 x (weights of the layers that a token passes x packed tokens + weights of the output projection x trained
tokens) + 6 x layers x heads x head size x sum of squared lengths. The last term is causal attention; embedding
look-ups, norms and what is computed twice (activation checkpointing, chunks of log-probs) do not count. MFU is model
FLOP/s over the card's dense bfloat16 peak: 989e12 on an H100 or H200 SXM; no other card is known, and gets none.

| model | packed tokens | responses (longest) | step, ms | trained tokens/s | model TFLOP/s | MFU | peak GiB |
|---|---|---|---|---|---|---|---|
{steps}
| model | vocabulary | hidden | layers | heads, key/value x size | intermediate | parameters | active | checkpointing |
|---|---|---|---|---|---|---|---|---|
{shapes}
Active: weights of the matrices that a trained token passes. Tied: the output projection is the embedding.
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


def layer_weights(config: Mapping[str, Any]) -> int:
    """Weights of the matrices that a token passes in all layers: of a mixture's experts the active ones."""
    hidden, size = config["hidden_size"], config["head_dim"]
    attention = 2 * hidden * size * (config["num_attention_heads"] + config["num_key_value_heads"])
    if "num_experts" in config:
        experts = 3 * hidden * config["moe_intermediate_size"] * config["num_experts_per_tok"]
        return int(config["num_hidden_layers"] * (attention + experts + hidden * config["num_experts"]))
    return int(config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"]))


def head_weights(config: Mapping[str, Any]) -> int:
    return int(config["vocab_size"] * config["hidden_size"])


def parameters(config: Mapping[str, Any]) -> int:
    """All of them, norms included."""
    hidden, size, layers = config["hidden_size"], config["head_dim"], config["num_hidden_layers"]
    everyone = {**config, "num_experts_per_tok": config.get("num_experts")}
    embeddings = head_weights(config) * (1 if config["tie_word_embeddings"] else 2)
    return layer_weights(everyone) + embeddings + layers * 2 * (hidden + size) + hidden


def model_flops(config: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Of one optimizer step, by the formula in the report. found: `tokens`, `trained` and `squares` of its batch."""
    matrices = layer_weights(config) * found["tokens"] + head_weights(config) * found["trained"]
    attention = config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"] * found["squares"]
    return 6.0 * (matrices + attention)


def _step_row(case: Case, found: Mapping[str, Any] | None) -> str:
    start = [case.shape + (f", {case.way}" if case.way else ""), f"{case.tokens:,}"]
    if not found or "problem" in found:
        return _row(*start, _problem(found), *[""] * 5)
    seconds = statistics.median(found["seconds"])
    rate = model_flops((SHAPES | MINIATURES)[case.shape].config, found) / seconds
    peak = PEAK_FLOPS.get(found["card"])
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


def _shape_row(name: str) -> str:
    shape = (SHAPES | MINIATURES)[name]
    config = shape.config
    intermediate = f"{config['intermediate_size']:,}"
    if "num_experts" in config:
        sizes = [config[key] for key in ("num_experts", "moe_intermediate_size", "num_experts_per_tok")]
        intermediate = "{} experts of {:,}, {} active".format(*sizes)
    heads = f"{config['num_attention_heads']}, {config['num_key_value_heads']} x {config['head_dim']}"
    active = layer_weights(config) + head_weights(config)
    return _row(
        name, f"{config['vocab_size']:,}", f"{config['hidden_size']:,}", str(config["num_hidden_layers"]), heads,
        intermediate,
        f"{parameters(config):,}" + (", tied" if config["tie_word_embeddings"] else ""), f"{active:,}",
        "yes" if shape.checkpointing else "no",
    )  # fmt: skip


def _problem(found: Mapping[str, Any] | None) -> str:
    return str(found["problem"]) if found else "skipped: the time was over"


def _memory(found: Mapping[str, Any]) -> str:
    return "-" if found["peak"] is None else f"{found['peak'] / GIB:.2f}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
