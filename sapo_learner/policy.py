"""The model: any Hugging Face causal language model in a directory, or a tiny Qwen3 built here.

Shape letters: B rows, L padded length, H hidden width, V vocabulary.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config
from transformers.utils import logging as transformers_logging

from sapo_learner.errors import ConfigError, Mismatch
from sapo_learner.manifest import TOKENIZER_FILES
from sapo_learner.model_files import MODEL_FILES, read_config, require_weights
from sapo_learner.segment import fsync
from sapo_learner.snapshot import without_data

transformers_logging.disable_progress_bar()  # services log; they do not draw
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Base:
    """The frozen weights that adapters belong to. source: where they came from; digest: theirs, in float32."""

    source: str
    digest: str


@dataclass(frozen=True)
class Policy:
    """A causal language model, its tokenizer, and the small files that describe both (by name, as bytes)."""

    model: Any  # a transformers causal language model
    tokenizer: Any
    files: Mapping[str, bytes]

    @property
    def vocabulary(self) -> int:
        """Number of token ids the model knows, V."""
        return int(self.head_weight.shape[0])

    @property
    def context(self) -> int | None:
        """Most positions the model was made for; None when its configuration states none."""
        positions: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return positions

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        return _end_ids(self.model.generation_config.eos_token_id, self.tokenizer)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]: the output projection (the embedding itself when tied)."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V], or None: the bias of the output projection."""
        bias: Tensor | None = getattr(self.model.get_output_embeddings(), "bias", None)
        return bias

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] int64 and [B, L] bool (False = padding on the right) -> [B, L, H], before the output projection."""
        output = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor that makes up the policy, as engines get it, by name, tied ones once."""
        seen: dict[int, str] = {}
        state = self.model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            # neither has an address: what is on the meta device, and a share of a tensor where it is empty
            nowhere = tensor.is_meta or isinstance(tensor, DTensor)
            seen.setdefault(id(tensor) if nowhere else tensor.data_ptr(), name)
        return {name: state[name].detach() for name in seen.values()}

    def copied(self, dtype: str) -> Mapping[str, Tensor]:
        """`tensors` as they are now, whatever training does next, rounded to `dtype` but held in their own."""
        return {name: rounded(tensor.detach(), dtype, copy=True) for name, tensor in self.tensors().items()}

    def state(self) -> dict[str, Tensor]:
        """What training changes, by name: what a checkpoint must hold to go on exactly. The tensors themselves."""
        return dict(self.tensors())

    @property
    def frozen_base(self) -> Base | None:
        """What `state` says nothing of, because training leaves it alone; None where it says everything."""
        return None

    def standing_in(self, tensors: Mapping[str, Tensor]) -> AbstractContextManager[Mapping[str, Tensor]]:
        """While it lasts, `functional_call` with what it gives computes with `tensors` in place of the policy's."""
        return nullcontext(tensors)

    def merged(self) -> "Policy":
        """The same policy without adapters; where there are some, this one must not be used any more."""
        return self


@dataclass(frozen=True)
class PolicyDescription:
    """What an engine that loads the weights itself must know of a policy."""

    tokenizer: Any
    end_ids: frozenset[int]
    """Token ids that end a response."""
    vocabulary: int
    context: int | None


def describe_policy(directory: Path) -> PolicyDescription:
    """From the small files of a model directory, without building the model. Raises ConfigError."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        generation = GenerationConfig.from_model_config(config)
        if (directory / _GENERATION).is_file():
            generation = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"transformers cannot read it: {reason}", where=f"policy {directory}") from error
    end_ids = _end_ids(generation.eos_token_id, tokenizer)
    context = getattr(config, "max_position_embeddings", None)
    return PolicyDescription(tokenizer, end_ids, int(config.vocab_size), context)


def _end_ids(configured: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(each for each in [*ids, tokenizer.eos_token_id] if each is not None)


def load_policy(directory: Path, *, weights: bool = True) -> Policy:
    """Read a Hugging Face model directory as float32; `weights=False` leaves the model as initialised.

    Raises ConfigError when the directory is not one, when it lacks some weights, or when the model's logits are not a
    plain projection of its last hidden states (soft-capping, scaling), which log-probs from hidden states would
    silently miss.
    """
    directory = Path(directory)
    read_config(directory, where=f"policy {directory}")
    if weights:
        require_weights(directory, where=f"policy {directory}")
    try:
        model, absent = _read_model(directory, weights=weights)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(
            f"transformers cannot load it: {reason}",
            where=f"policy {directory}",
            fix="copy the whole model there again",
        ) from error
    if absent:
        raise ConfigError(f"weights are missing: {', '.join(absent[:5])}", where=f"policy {directory}")
    model.eval()
    names = [name for name in (*MODEL_FILES, *sorted(TOKENIZER_FILES)) if (directory / name).is_file()]
    policy = Policy(model, tokenizer, {name: (directory / name).read_bytes() for name in names})
    require_plain_head(policy, directory)
    return policy


def _read_model(directory: Path, *, weights: bool) -> tuple[Any, list[str]]:
    """The model, and names of tensors that transformers did not find and would leave at random values."""
    if not weights:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if (directory / _GENERATION).is_file():  # which `from_pretrained` reads, too: it may name more end tokens
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        return model, []
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, output_loading_info=True, use_safetensors=True,
        trust_remote_code=False,
    )  # fmt: skip
    return model, sorted(info["missing_keys"])


def load_weights(policy: Policy, tensors: Mapping[str, Tensor]) -> None:
    """Copy a snapshot's or a checkpoint's tensors (see `Policy.state`) into the model, one at a time.

    All or, raising Mismatch for a wrong name or shape, none. Raises Unavailable with the model in between when the file
    that a tensor is read from has gone meanwhile: it must not be used any more.
    """
    own = policy.state()
    require_same_shapes(own, {name: each.shape for name, each in without_data(tensors).items()})
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def require_same_shapes(own: Mapping[str, Tensor], found: Mapping[str, torch.Size]) -> None:
    """Raises Mismatch naming what differs."""
    if own.keys() != found.keys():
        odd = sorted(own.keys() ^ found.keys())
        raise Mismatch(f"tensors differ in names: {', '.join(odd[:5])}", fix=_ANOTHER_MODEL)
    for name, tensor in own.items():
        if tensor.shape != found[name]:
            shapes = f"{list(found[name])}, the model's is {list(tensor.shape)}"
            raise Mismatch(f"tensor {name!r} has shape {shapes}", fix=_ANOTHER_MODEL)


_ANOTHER_MODEL = "is it a snapshot of another model?"


def rounded(tensor: Tensor, dtype: str, *, copy: bool) -> Tensor:
    """The values that publishing in `dtype` (torch's name) leaves of it, in its own dtype."""
    target = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
    return tensor.to(target, copy=copy).to(tensor.dtype)


def write_policy(policy: Policy, directory: Path, *, dtype: str | None = None) -> None:
    """A directory that `load_policy`, transformers and vLLM read, each file on the disk when it returns.

    dtype: torch's name; then the model itself is cast, so that it is not held twice. What the policy was loaded with
    and transformers would not write, such as other files of the tokenizer, is written as it was. Not of a policy with
    adapters: see `Policy.merged`.
    """
    if dtype is not None:
        policy.model.to(getattr(torch, dtype))
    generation = policy.model.generation_config
    if _GENERATION in policy.files:  # transformers refuses to save what many models have, such as idle temperatures
        policy.model.generation_config = GenerationConfig()
    try:
        policy.model.save_pretrained(directory, max_shard_size="5GB")
    finally:
        policy.model.generation_config = generation
    policy.tokenizer.save_pretrained(directory)
    for name in policy.files.keys() & {*TOKENIZER_FILES, _GENERATION}:
        (directory / name).write_bytes(policy.files[name])
    for path in directory.iterdir():
        fsync(path)
    fsync(directory)


def tiny_policy(alphabet: str, *, seed: int) -> Policy:
    """A Qwen3 of about 200,000 parameters with one token per character of `alphabet`, freshly initialised."""
    tokenizer = _character_tokenizer(alphabet)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3ForCausalLM"],
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    return Policy(model, tokenizer, {})


def _character_tokenizer(alphabet: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *alphabet])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


@torch.no_grad()
def require_plain_head(policy: Policy, directory: Path) -> None:
    """ConfigError if anything happens between the last hidden states, the output projection and the logits.

    The projection's output is replaced by large numbers, because a cap of 30 does not show on the logits near 0 of a
    model that is hardly trained.
    """
    ids = torch.arange(4)[None] % policy.vocabulary
    large = torch.linspace(-100, 100, ids.numel() * policy.vocabulary).reshape(*ids.shape, -1)
    seen: list[Tensor] = []

    def replace(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.extend(inputs)
        return large

    hook = policy.model.get_output_embeddings().register_forward_hook(replace)
    try:
        logits = policy.model(input_ids=ids).logits
    finally:
        hook.remove()
    hidden = policy.hidden(ids, torch.ones_like(ids, dtype=torch.bool))
    if not torch.equal(logits, large) or not torch.allclose(seen[0], hidden, atol=1e-4, rtol=1e-4):
        raise ConfigError(
            f"{type(policy.model).__name__} changes its logits around the output projection, which training from "
            "hidden states would miss",
            where=f"policy {directory}",
            fix="use a model without logit soft-capping or scaling",
        )
