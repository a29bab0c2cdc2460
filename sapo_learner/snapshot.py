"""Policy snapshots: weights in inference dtype as content-named safetensors parts, verified when read (I5)."""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from sapo_learner import formats
from sapo_learner.errors import Corrupt, Mismatch, NotFound, Unavailable
from sapo_learner.manifest import Blob, Manifest, TensorEntry, policy_digest
from sapo_learner.segment import fsync


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are computed when asked for, one at a time, so that they are never all in memory.

    held: for every name a tensor of the shape and dtype that `compute(name, held tensor)` gives.
    """

    def __init__(self, held: Mapping[str, Tensor], compute: Callable[[str, Tensor], Tensor]) -> None:
        self.held, self._compute = held, compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name, self.held[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def without_data(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same names, shapes and dtypes, which nothing had to be computed or read for."""
    return tensors.held if isinstance(tensors, LazyTensors) else tensors


def tensors_in(path: Path) -> LazyTensors:
    """A safetensors file's, each mapped when it is asked for and let go with the last reference to it.

    Whoever copies them one by one holds one at a time. Raises what safetensors does for a file that is none, and
    Unavailable for a tensor whose file has gone since.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return LazyTensors(held, lambda name, _: _mapped(path, name))


def write_snapshot(
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    dtype: str,
    files: Mapping[str, bytes],
    directory: Path,
    part_bytes: int = 1 << 30,
) -> Manifest:
    """Write `tensors` and `files` (name -> content) into `directory`, each file named by its SHA-256.

    Floating-point tensors are cast to `dtype` (torch's name); others stay as they are. A part holds at most
    `part_bytes` bytes of tensors, or one larger tensor. Memory: one part. Durable (fsync) on return. Equal weights give
    equal bytes. One writer per directory.

    Raises Corrupt for a tensor that is not finite, in `dtype`: such weights are never published. Raises Mismatch for
    two tensors that share storage.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"{_TEMPORARY}*"):  # of a writer that was killed
        leftover.unlink(missing_ok=True)
    target = _float_dtype(dtype)
    held = without_data(tensors)
    _refuse_shared(held)
    parts: list[Blob] = []
    entries: dict[str, TensorEntry] = {}
    for names in _parts(held, target, part_bytes):
        cast = {name: _cast(name, tensors[name], target) for name in names}
        parts.append(_store(directory, partial(save_tensors, cast)))
        entries |= {name: _entry(tensor, len(parts) - 1) for name, tensor in cast.items()}
    blobs = {name: _store(directory, partial(Path.write_bytes, data=content)) for name, content in files.items()}
    fsync(directory)
    digest = policy_digest(entries)
    return Manifest(
        format=formats.MANIFEST.newest, step=step, digest=digest, dtype=dtype, tensors=entries, parts=parts, files=blobs
    )


def read_snapshot(manifest: Manifest, blob_path: Callable[[str], Path]) -> Mapping[str, Tensor]:
    """The tensors, in the manifest's order, on the CPU. `blob_path`: SHA-256 -> where that blob lies.

    All digests are checked here; a tensor is read once more when it is asked for, so the blobs must stay (see
    `tensors_in`). Memory: one tensor. Raises Mismatch naming what differs from the manifest: the policy, a part or a
    tensor. Raises NotFound for a part that is not there.
    """
    if policy_digest(manifest.tensors) != manifest.digest:
        raise Mismatch("the manifest's tensors do not make up its policy digest", where=manifest.digest)
    found: dict[str, LazyTensors] = {}  # by the name of each tensor in it
    for index, part in enumerate(manifest.parts):
        path = blob_path(part.sha256)
        tensors = _load(path)
        for name in tensors:
            expected = manifest.tensors.get(name)
            if expected is None or name in found or _entry(tensors[name], index) != expected:
                raise Mismatch(f"tensor {name!r} is not the manifest's", where=str(path), fix=_REFETCH)
            found[name] = tensors
        if (actual := Blob.of(path)) != part:  # last, because a tensor's name says more
            raise Mismatch(f"holds {actual.sha256}, not {part.sha256}", where=str(path), fix=_REFETCH)
    for name in manifest.tensors:
        if name not in found:
            raise Mismatch(f"tensor {name!r} is missing", where=f"policy {manifest.digest}", fix=_REFETCH)
    held = {name: found[name].held[name] for name in manifest.tensors}
    return LazyTensors(held, lambda name, _: found[name][name])


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file, from any device and layout. Raises OSError also for what the Rust side reports."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over the raw bytes, row-major; little-endian, as every machine that torch supports in practice."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """The policy digest of tensors as they are, without a cast: equal when names, dtypes, shapes and bytes are."""
    return policy_digest({name: _entry(tensor, 0) for name, tensor in tensors.items()})


def snapshot_digest(tensors: Mapping[str, Tensor], dtype: str) -> str:
    """The digest that `write_snapshot` would publish these weights under, without writing anything."""
    target = _float_dtype(dtype)
    return policy_digest({name: _entry(_cast(name, tensor, target), 0) for name, tensor in tensors.items()})


_TEMPORARY = ".part-"
_REFETCH = "delete the blob and fetch it again; when it differs again, the store is damaged"


def _float_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise Mismatch(f"{name!r} is no floating-point dtype", fix="use bfloat16, float16 or float32")
    return dtype


def _refuse_shared(tensors: Mapping[str, Tensor]) -> None:
    """A snapshot holds each weight once: an engine would load tied ones twice, and a digest would count them twice."""
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()  # 0 of one without data
        owner = owners.setdefault((tensor.device, address), name) if address else name
        if owner != name:
            raise Mismatch(f"tensors {owner!r} and {name!r} share storage", fix="pass tied weights under one name")


def _parts(tensors: Mapping[str, Tensor], target: torch.dtype, limit: int) -> Iterator[list[str]]:
    """Names by part, sorted, so that the same weights are always cut in the same places."""
    names: list[str] = []
    size = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        nbytes = tensor.numel() * (target if tensor.is_floating_point() else tensor.dtype).itemsize
        if names and size + nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    if names:
        yield names


def _cast(name: str, tensor: Tensor, target: torch.dtype) -> Tensor:
    cast = tensor.detach().to("cpu", target if tensor.is_floating_point() else tensor.dtype).contiguous()
    if not bool(torch.isfinite(cast).all()):  # after the cast: float16 turns large values into infinity
        raise Corrupt(
            f"tensor {name!r} holds NaN or infinity in {target}, so the weights are not published",
            fix="resume from an earlier checkpoint; lower the learning rate or max_grad_norm",
        )
    return cast


def _entry(tensor: Tensor, part: int) -> TensorEntry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(dtype=dtype, shape=tuple(tensor.shape), sha256=tensor_digest(tensor), part=part)


def _store(directory: Path, write: Callable[[Path], object]) -> Blob:
    """Let `write` fill a temporary file, make it durable, then give it its name."""
    temporary = directory / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        write(temporary)
        fsync(temporary)
        blob = Blob.of(temporary)
        temporary.replace(directory / blob.sha256)
    finally:
        temporary.unlink(missing_ok=True)
    return blob


def _load(path: Path) -> LazyTensors:
    try:
        return tensors_in(path)
    except FileNotFoundError:
        raise NotFound("a part of the snapshot is not there", where=str(path), fix="fetch it first") from None
    except safetensors.SafetensorError as error:
        raise Mismatch(f"not a safetensors file: {error}", where=str(path), fix=_REFETCH) from None


def _mapped(path: Path, name: str) -> Tensor:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise Unavailable(f"tensor {name!r} can no longer be read: {error}", where=str(path), fix="try again") from None
    return tensor
