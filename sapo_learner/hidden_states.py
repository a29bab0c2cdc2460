"""Hidden states of packed sequences from any policy: in one row, or, where the model cannot, in padded rows.

    use_packing(policy)                              once: tries it on a few tokens, and says so when it does not work
    packed_hidden(policy, input_ids, packing)        [N] -> [N, H]

Whether a model packs is kept in its configuration (`_attn_implementation`), so copies of the policy do as it does;
everything else that the model computes stays what it was.

Shape letters: N tokens of all sequences, H hidden width.
"""

import inspect
import logging

import torch
from torch import Tensor

from sapo_learner.attention import IMPLEMENTATION
from sapo_learner.errors import ConfigError
from sapo_learner.packing import Packing
from sapo_learner.policy import Policy

log = logging.getLogger(__name__)

PADDING = 0.25
"""Most padding in a bucket of rows, as a share of its tokens, for models that cannot pack."""
_LENGTHS = (5, 2, 1, 4)  # of the sequences that packing is tried on
_LEAK = 0.01
"""Largest error, as a share of what seeing the sequences before it would do to one. Arithmetic makes 1e-3 at most."""


def packed_hidden(policy: Policy, input_ids: Tensor, packing: Packing) -> Tensor:
    """[N] int64 ids of the packed sequences -> [N, H], before the output projection; no sequence sees another."""
    if packs(policy):
        return _in_one_row(policy, input_ids, packing)
    return _in_padded_rows(policy, input_ids, packing)


def _in_one_row(policy: Policy, input_ids: Tensor, packing: Packing) -> Tensor:
    output = policy.model.base_model(
        input_ids=input_ids[None],
        # A mask of four dimensions is handed on as it is; without one, transformers would make one of [N, N].
        attention_mask=input_ids.new_zeros(1, 1, 1, 1),
        position_ids=packing.position_ids[None],
        use_cache=False,
        packing=packing,
    )
    states: Tensor = output.last_hidden_state[0]
    return states


def _in_padded_rows(policy: Policy, input_ids: Tensor, packing: Packing) -> Tensor:
    real = torch.ones_like(input_ids, dtype=torch.bool)
    return packing.in_rows(policy.hidden, input_ids, real, padding=PADDING)


def packs(policy: Policy) -> bool:
    """Whether the policy's model runs on packed rows."""
    return bool(policy.model.config._attn_implementation == IMPLEMENTATION)


def use_packing(policy: Policy) -> bool:
    """Let the policy's model run on packed rows, if that gives what padded ones do; else log why it does not."""
    if packs(policy):
        return True
    reason = cannot_pack(policy) or _tried(policy)
    if reason:
        log.warning("%s is trained in padded rows: %s", type(policy.model).__name__, reason)
    return not reason


def cannot_pack(policy: Policy) -> str:
    """What the model's configuration and signature say against packing, "" for nothing; its weights are not asked."""
    model = policy.model
    config = model.config.get_text_config()
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}"
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if kinds or getattr(config, "attention_chunk_size", None):  # chunks do not show on a few tokens
        return f"it has layers of {', '.join(sorted(kinds) or ['chunked_attention'])}"
    parameters = inspect.signature(model.base_model.forward).parameters
    if "position_ids" not in parameters:
        return "it takes no position ids"
    if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return "it hands nothing on to its attention"
    return ""


@torch.no_grad()
def _tried(policy: Policy) -> str:
    """What comes out wrong, "" when nothing does; then the model stays switched over."""
    device, model = policy.head_weight.device, policy.model
    ids = torch.randint(policy.vocabulary, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0)).to(device)
    training = model.training
    model.eval()
    try:
        alone = _in_padded_rows(policy, ids, Packing(_LENGTHS, device))
        together = policy.hidden(ids[None], torch.ones_like(ids, dtype=torch.bool)[None])[0]
        model.set_attn_implementation(IMPLEMENTATION)
        reason = _difference(policy, ids, alone, together)
        if reason and model.config._attn_implementation == IMPLEMENTATION:
            model.set_attn_implementation("sdpa")
    finally:
        model.train(training)
    return reason


def _difference(policy: Policy, ids: Tensor, alone: Tensor, together: Tensor) -> str:
    """What is wrong with a packed row. together: as if every sequence saw those before it."""
    config, packing = policy.model.config, Packing(_LENGTHS, ids.device)
    if config._attn_implementation != IMPLEMENTATION:
        return "its attention cannot be replaced"
    try:
        found = _in_one_row(policy, ids, packing)
    except (ConfigError, RuntimeError, TypeError, ValueError) as problem:  # from code not written for such rows
        return f"a packed row ended in {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    windowed = "sliding_attention" in kinds if kinds else bool(getattr(text, "sliding_window", None))
    if windowed and packing.windows <= {None}:  # it is only in masks, and too wide to show on a few tokens
        return "its attention is not told of its sliding window"
    error, leak = (float((each - alone).double().norm()) for each in (found, together))
    if error <= _LEAK * leak:
        return ""
    return f"packed, its hidden states are off by {error:.1e}, where attention across sequences makes {leak:.1e}"
