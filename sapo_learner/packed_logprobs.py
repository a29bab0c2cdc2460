"""What a policy makes of a microbatch, from token ids to log-probs, as one module.

As a module of its own it can be the root of a sharded policy: while it runs, the output projection is whole, although
log-probs are computed from it outside of the model.
"""

import torch
from torch import Tensor

from sapo_learner.hidden_states import packed_hidden
from sapo_learner.logprobs import token_logprobs
from sapo_learner.packing import Packing
from sapo_learner.policy import Policy


class PackedLogprobs(torch.nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model, self._policy = policy.model, policy

    def forward(
        self, input_ids: Tensor, packing: Packing, predictor: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T] log-probs of `targets` in nats, [T] entropy in nats, and [T, H] the hidden states that they come from.

        input_ids: [N] int64, of the sequences of `packing`. predictor: [T] int64, index into the N tokens. targets: [T]
        int64. temperature: of the sampling distribution.
        """
        hidden = packed_hidden(self._policy, input_ids, packing)
        predictors = hidden[predictor]
        logprobs, entropy = token_logprobs(
            predictors, self._policy.head_weight, targets, temperature=temperature, bias=self._policy.head_bias
        )
        assert entropy is not None
        return logprobs, entropy, predictors
