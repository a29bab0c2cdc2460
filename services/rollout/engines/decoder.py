"""Batched decoding with a slot cache: the synchronous heart of the torch engine.

All responses in flight are the first `active` rows of fixed-size tensors and are decoded together, one token per
`step`. A finished row's place is taken by the last active row, so that the active rows stay contiguous and are never
copied as a whole. Row state: `tokens` holds prompt and response; the cache covers all of it but the newest token, which
the next step feeds. Hence new weights need only one batched prefill of `tokens[:, :-1]` before decoding goes on.
Shape letters: S slots, L positions, V vocabulary, N active rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from sapo_learner.errors import ConfigError
from sapo_learner.policy import Policy, load_weights
from services.rollout.engines import PolicyVersion, SampleRequest, TokenDelta

FLUSH_TOKENS = 32  # a response in flight reports at least this often
PAGE = 32  # the cache grows in steps of this many positions


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values [S, heads, L, width] per layer; `update` writes where the decoder says, at a position per row."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._store: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots, self.positions = 0, 0
        self._rows = slice(0, 0)
        self._at: Tensor | None = None
        self._width = 0

    def prefill_into(self, rows: slice) -> None:
        self._rows, self._at = rows, None

    def decode_at(self, positions: Tensor, width: int) -> None:
        """positions: [N] int64, where each active row's newest token goes; width: positions to attend over."""
        self._rows, self._at, self._width = slice(0, len(positions)), positions, width

    def resize(self, slots: int, positions: int) -> None:
        self.slots, self.positions = slots, positions
        for layer, (keys, values) in self._store.items():
            self._store[layer] = (self._fit(keys), self._fit(values))

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole rows, sources -> targets."""
        for keys, values in self._store.values():
            keys[targets] = keys[sources]
            values[targets] = values[sources]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._layer(layer_idx, key_states)
        if self._at is None:
            length = key_states.shape[2]
            keys[self._rows, :, :length] = key_states
            values[self._rows, :, :length] = value_states
            return key_states, value_states
        rows = torch.arange(self._rows.stop)
        keys[rows, :, self._at] = key_states[:, :, 0]
        values[rows, :, self._at] = value_states[:, :, 0]
        return keys[self._rows, :, : self._width], values[self._rows, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions and masks are always given explicitly

    def _layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if index not in self._store:
            shape = (self.slots, like.shape[1], self.positions, like.shape[3])
            self._store[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._store[index]

    def _fit(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.slots, old.shape[1], self.positions, old.shape[3])
        slots, positions = min(old.shape[0], self.slots), min(old.shape[2], self.positions)
        new[:slots, :, :positions] = old[:slots, :, :positions]
        return new


class BatchDecoder:
    """Not thread-safe: one thread adds, steps, updates and aborts."""

    def __init__(self, policy: Policy, version: PolicyVersion, *, slots: int) -> None:
        """Raises ConfigError for a model that this cache cannot serve."""
        _require_full_attention(policy)
        self.policy, self.version, self.slots = policy, version, slots
        self._end_ids = torch.tensor(sorted(policy.end_ids), dtype=torch.int64)
        self._cache = SlotCache()
        self._requests: list[SampleRequest] = []  # of the active rows, in row order
        self._tokens = torch.zeros(slots, 0, dtype=torch.int64)
        self._logprobs = torch.zeros(slots, 0)
        self._uniforms = torch.zeros(slots, 0, dtype=torch.float64)
        self._lengths = torch.zeros(slots, dtype=torch.int64)  # prompt and response so far
        self._prompts = torch.zeros(slots, dtype=torch.int64)
        self._limits = torch.zeros(slots, dtype=torch.int64)  # length at which a row ends
        self._reported = torch.zeros(slots, dtype=torch.int64)  # length up to which tokens were reported
        self._temperatures = torch.ones(slots)
        self._row_tensors = ("_tokens", "_logprobs", "_uniforms", "_lengths", "_prompts", "_limits", "_reported",
                             "_temperatures")  # fmt: skip
        self._cache.resize(slots, 0)

    @property
    def active(self) -> int:
        return len(self._requests)

    @property
    def free(self) -> int:
        return self.slots - self.active

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Start sampling; at most `free` requests."""
        first = self.active
        self._reserve(max(len(each.prompt_ids) + each.max_tokens for each in requests))
        for row, request in enumerate(requests, start=first):
            count = len(request.prompt_ids)
            self._tokens[row, :count] = torch.tensor(request.prompt_ids)
            self._lengths[row] = self._prompts[row] = self._reported[row] = count
            self._limits[row] = count + request.max_tokens
            self._temperatures[row] = request.temperature
            # Counter-based: a response's randomness depends on its seed alone, not on who shares the batch.
            draws = np.random.Generator(np.random.Philox(key=request.seed)).random(request.max_tokens)
            self._uniforms[row, count : count + request.max_tokens] = torch.from_numpy(draws)
        self._requests += requests
        self._prefill(first)

    def abort(self, request_id: str) -> None:
        rows = [row for row, request in enumerate(self._requests) if request.id == request_id]
        if rows:
            self._remove(rows)

    @torch.no_grad()
    def update_weights(self, tensors: Mapping[str, Tensor], version: PolicyVersion) -> dict[str, TokenDelta]:
        """Swap weights and recompute the cache of every row; returns what was sampled under the old ones.

        Raises Mismatch, before anything has changed.
        """
        load_weights(self.policy, tensors)
        deltas = self._flush(range(self.active))
        self.version = version
        self._prefill(0)
        return deltas

    @torch.no_grad()
    def step(self) -> dict[str, TokenDelta]:
        """Sample one token for every active row; returns the deltas that are due, by request id."""
        count = self.active
        positions = self._lengths[:count] - 1
        width = int(positions.max()) + 1
        rows = torch.arange(count)
        self._cache.decode_at(positions, width)
        mask = (torch.arange(width)[None] <= positions[:, None])[:, None, None]
        hidden = self._forward(self._tokens[rows, positions][:, None], positions[:, None], mask)[:, 0]
        sampled, logprobs = _sample(
            self._logits(hidden), self._temperatures[:count], self._uniforms[rows, positions + 1]
        )
        self._tokens[rows, positions + 1] = sampled
        self._logprobs[rows, positions + 1] = logprobs
        self._lengths[:count] += 1
        stopped = torch.isin(sampled, self._end_ids)
        full = self._lengths[:count] >= self._limits[:count]
        overdue = self._lengths[:count] - self._reported[:count] >= FLUSH_TOKENS
        due = (stopped | full | overdue).nonzero().flatten().tolist()
        return self._report(due, stopped, full) if due else {}

    @torch.no_grad()
    def score(self, prompt_ids: Sequence[int], token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Log-probs of `token_ids` after `prompt_ids`: a plain forward pass, without the cache."""
        ids = torch.tensor([[*prompt_ids, *token_ids]])
        hidden = self.policy.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(self._logits(hidden) / (temperature or 1.0), dim=-1)
        values: list[float] = logprobs.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()
        return values

    def _report(self, rows: Sequence[int], stopped: Tensor, full: Tensor) -> dict[str, TokenDelta]:
        deltas = self._flush(rows)
        ended = []
        for row in rows:
            if stopped[row] or full[row]:
                request_id = self._requests[row].id
                deltas[request_id] = replace(deltas[request_id], finish_reason="stop" if stopped[row] else "length")
                ended.append(row)
        if ended:
            self._remove(ended)
        return deltas

    def _flush(self, rows: Sequence[int]) -> dict[str, TokenDelta]:
        deltas = {}
        starts, ends = self._reported.tolist(), self._lengths.tolist()
        for row in rows:
            part = slice(starts[row], ends[row])
            deltas[self._requests[row].id] = TokenDelta(
                self._tokens[row, part].tolist(), self._logprobs[row, part].tolist(), self.version
            )
            self._reported[row] = ends[row]
        return deltas

    @torch.no_grad()
    def _prefill(self, first: int) -> None:
        """Fill the cache of rows `first`.. with everything but their newest token."""
        rows = slice(first, self.active)
        width = int(self._lengths[rows].max()) - 1 if self.active > first else 0
        if width <= 0:
            return
        self._cache.prefill_into(rows)
        count = self.active - first
        mask = torch.ones(width, width, dtype=torch.bool).tril()[None, None].expand(count, 1, width, width)
        # Positions past a row's end are computed from padding, never attended to, and overwritten as the row grows.
        self._forward(self._tokens[rows, :width], torch.arange(width)[None].expand(count, width), mask)

    def _forward(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        output = self.policy.model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask,
            past_key_values=self._cache, use_cache=True,
        )  # fmt: skip
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.policy.head_weight, self.policy.head_bias).float()

    def _remove(self, rows: Sequence[int]) -> None:
        """Close the gaps that `rows` leave with the last active rows."""
        gone, count = set(rows), self.active
        remaining = count - len(gone)
        targets = [row for row in sorted(gone) if row < remaining]
        sources = [row for row in range(remaining, count) if row not in gone]
        for source, target in zip(sources, targets, strict=True):
            self._requests[target] = self._requests[source]
        del self._requests[remaining:]
        if sources:
            source_rows, target_rows = torch.tensor(sources), torch.tensor(targets)
            for name in self._row_tensors:
                tensor = getattr(self, name)
                tensor[target_rows] = tensor[source_rows]
            self._cache.move(source_rows, target_rows)

    def _reserve(self, positions: int) -> None:
        have = self._tokens.shape[1]
        if positions <= have:
            return
        want = -(-positions // PAGE) * PAGE
        for name in ("_tokens", "_logprobs", "_uniforms"):
            old = getattr(self, name)
            new = old.new_zeros(self.slots, want)
            new[:, :have] = old
            setattr(self, name, new)
        self._cache.resize(self.slots, want)


def _require_full_attention(policy: Policy) -> None:
    config = policy.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if not hasattr(config, "layer_types") else None
    if kinds != {"full_attention"} or window:
        raise ConfigError(
            f"the torch engine cannot serve layers of kind {', '.join(sorted(kinds))}"
            + (", windowed" if window else ""),
            where=f"model {config.model_type}",
            fix="use a model with full attention in every layer, or another engine",
        )


def _sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """[N, V] logits, [N] temperatures, [N] float64 uniforms -> sampled ids [N] and their log-probs [N] float32.

    Inverse transform: the first token whose cumulative probability exceeds the uniform draw.
    """
    greedy = temperatures == 0
    scaled = logits / torch.where(greedy, 1.0, temperatures)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    ids = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    ids = torch.where(greedy, logits.argmax(dim=-1), ids.clamp(max=logits.shape[1] - 1))
    return ids, logprobs.gather(1, ids[:, None])[:, 0]
