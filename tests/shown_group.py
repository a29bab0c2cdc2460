"""A group as the learner hands it to the control plane, made of what `sapo show` tells of one in an archive."""

from pathlib import Path
from typing import Any

from services.runtime.api import ShownGroup

COLUMNS = (
    "id", "text", "mask", "version", "behaviour_logprob", "ratio", "gate_weight", "coefficient", "advantage",
)  # fmt: skip


def from_archive(directory: Path, entry: str) -> ShownGroup:
    from services.group_tokens import look  # torch

    answer = look(directory, entry, "gate")
    responses = [
        each | {"tokens": {name: [token[name] for token in each["tokens"]] for name in COLUMNS}}
        for each in answer["responses"]
    ]
    prompt = {"text": answer["prompt"]["text"], "tokens": len(answer["prompt"]["tokens"])}
    kept = {name: answer[name] for name in ("entry", "step", "draw", "task", "prompt_id", "worker", "engine")}
    return ShownGroup.model_validate(
        kept | {"estimator": answer["estimator"] or "", "objective": answer["objective"], "responses": responses}
        | {"weight": answer["weight"] or "gate", "prompt": prompt}
    )  # fmt: skip


def shown_group(entry: str = "1-1", *, step: int = 1, responses: int = 2, tokens: int = 3, **fields: Any) -> ShownGroup:
    """Made up. The ratio of a response's tokens falls, and its gate weight with it; its first token is a tool's."""
    each = {
        "id": [*range(tokens)], "text": [f"t{index} " for index in range(tokens)],
        "mask": [index > 0 for index in range(tokens)], "version": [index % 2 for index in range(tokens)],
        "behaviour_logprob": [None, *(-0.1 * index for index in range(1, tokens))],
        "ratio": [None, *(1 / index for index in range(1, tokens))],
        "gate_weight": [None, *(1 / index**2 for index in range(1, tokens))],
        "coefficient": [None, *(1 / index**2 for index in range(1, tokens))],
        "advantage": [None, *([1.0] * (tokens - 1))],
    }  # fmt: skip
    answers = [
        {"response": number, "reward": float(number % 2), "rewards": {"correct": float(number % 2)}, "advantage": 1.0,
         "finish_reason": "stop", "tokens": each}
        for number in range(responses)
    ]  # fmt: skip
    facts = {"entry": entry, "step": step, "draw": 7, "task": "arithmetic", "prompt_id": "p", "worker": "rollout-0"}
    more = {"engine": "torch", "estimator": "grpo", "objective": "sapo", "weight": "gate", "responses": answers}
    return ShownGroup.model_validate(facts | more | {"prompt": {"text": "1+2=", "tokens": 4}} | fields)
