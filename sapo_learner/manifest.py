"""What a policy snapshot consists of, as data: the control plane serves it, the worker verifies against it. No torch.

Every byte is named by its SHA-256, so a manifest pins the whole policy (I5) and equal parts are stored once.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from sapo_learner import formats
from sapo_learner.config import Settings, parse
from sapo_learner.errors import ConfigError, NotFound

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,254}$")]
"""A plain name: workers write these files into a directory of theirs, so no path may leave it."""

TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""Files of a model directory that decide which token ids a text becomes."""


class Blob(Settings):
    """A file named by its content."""

    sha256: Sha256
    size: int = Field(ge=0, le=1 << 53)
    """Bytes."""

    @classmethod
    def of(cls, path: Path) -> "Blob":
        """Read the file and describe it."""
        with path.open("rb") as file:
            return cls(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=file.tell())


class TensorEntry(Settings):
    dtype: str
    """torch's name, such as bfloat16."""
    shape: tuple[int, ...]
    sha256: Sha256
    """Of the raw little-endian bytes, row-major."""
    part: int = Field(ge=0)
    """Index into the manifest's parts."""


class Probe(Settings):
    """What the learner makes of a fixed token sequence with the published weights: an engine of them agrees (I4)."""

    token_ids: tuple[Annotated[int, Field(ge=0)], ...]
    """The first is the prompt."""
    logprobs: tuple[float, ...]
    """Of every token after the first, in nats, at temperature 1; see sapo_learner.probe.measure."""

    @model_validator(mode="after")
    def _one_per_token(self) -> "Probe":
        if not self.logprobs or len(self.logprobs) != len(self.token_ids) - 1:
            raise ValueError(f"{len(self.token_ids)} tokens and {len(self.logprobs)} log-probs: the first has none")
        return self


class Manifest(Settings):
    format: int = 1
    """Of this description, see `sapo_learner.formats`; the first ones did not say it."""
    version: int | None = None
    """Number under which the registry published it; None before that."""
    step: int = Field(ge=0, le=1 << 53)
    """Optimizer step the weights come from."""
    digest: Sha256
    """`policy_digest` of the tensors."""
    kind: Literal["full"] = "full"
    dtype: str
    """Inference dtype that floating-point tensors were cast to."""
    tensors: dict[str, TensorEntry]
    parts: list[Blob]
    """safetensors files."""
    files: dict[FileName, Blob]
    """Small files of the model directory: config.json, tokenizer.json, ..."""
    probe: Probe | None = None
    """Not part of the digest: it follows from the weights. None in what older learners published."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_known_format(cls, data: Any) -> Any:
        """Before its keys are judged: another version may have others."""
        given = data.get("format", 1) if isinstance(data, dict) else 1
        if not formats.MANIFEST.reads(given):
            raise ValueError(f"{formats.MANIFEST.refusal(given)}: {formats.MANIFEST.fix(given)}")
        return data

    @field_validator("parts")
    @classmethod
    def _parts_exist(cls, parts: list[Blob], info: ValidationInfo) -> list[Blob]:
        for name, entry in info.data.get("tensors", {}).items():
            if entry.part >= len(parts):
                raise ValueError(f"tensor {name!r} lies in part {entry.part} of {len(parts)}")
        return parts

    @property
    def model_digest(self) -> str:
        """SHA-256 over config.json's: equal for equal architectures. Raises NotFound when there is no such file."""
        if "config.json" not in self.files:
            raise NotFound("the snapshot holds no config.json", fix="pass it to write_snapshot(files=...)")
        return _digest_of([self.files["config.json"].sha256])

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 over names and digests of the tokenizer's files: equal when token ids mean the same."""
        names = sorted(TOKENIZER_FILES & set(self.files))
        return _digest_of(f"{name} {self.files[name].sha256}" for name in names)

    def blobs(self) -> Iterator[Blob]:
        """Everything a worker must fetch, each content once."""
        yield from {blob.sha256: blob for blob in (*self.parts, *self.files.values())}.values()

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "manifest") -> "Manifest":
        """Raises ConfigError that names what is wrong."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"not JSON: {error}", where=where) from None
        if not isinstance(data, dict):
            raise ConfigError("not a JSON object", where=where)
        return parse(cls, data, where=where)


def policy_digest(tensors: Mapping[str, TensorEntry]) -> str:
    """SHA-256 of the policy: canonical JSON of the sorted [name, dtype, shape, tensor digest]; parts do not matter."""
    rows = sorted([name, entry.dtype, list(entry.shape), entry.sha256] for name, entry in tensors.items())
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
