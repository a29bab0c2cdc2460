"""A policy's shape without its weights, for those who get the weights from somewhere else.

Parameters are on the meta device and take no memory. Buffers that no checkpoint holds, such as rotary frequencies, are
computed as always.
"""

import json
from collections.abc import Mapping

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sapo_learner.attention import IMPLEMENTATION
from sapo_learner.policy import Policy


def empty_policy(files: Mapping[str, bytes], *, packs: bool) -> Policy:
    """From the small files of a model directory, in float32, without a tokenizer. packs: whether its model does."""
    data = json.loads(files["config.json"])
    config = AutoConfig.for_model(**data)
    return Policy(_empty_model(config, torch.float32, packs=packs), None, files)


def empty_like(policy: Policy) -> Policy:
    """Another one of the same shape and dtype."""
    model = policy.model
    packs = model.config._attn_implementation == IMPLEMENTATION
    return Policy(_empty_model(model.config, model.dtype, packs=packs), policy.tokenizer, policy.files)


def _empty_model(config: PretrainedConfig, dtype: torch.dtype, *, packs: bool) -> torch.nn.Module:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # each was registered as a tensor of its own
    if packs:
        model.set_attn_implementation(IMPLEMENTATION)
    model.eval()
    found: torch.nn.Module = model
    return found
