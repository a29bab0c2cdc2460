"""A policy is what its digest says (I5): whatever differs from the manifest is refused, by name."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sapo_learner.errors import ConfigError, Corrupt, Mismatch, NotFound
from sapo_learner.manifest import Blob, Manifest, TensorEntry, policy_digest
from sapo_learner.snapshot import read_snapshot, tensor_digest, weights_digest, write_snapshot

FILES = {"config.json": b'{"model_type": "tiny"}', "tokenizer.json": b"{}", "generation_config.json": b"{}"}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(40, 8, generator=generator),
        "layer.weight": torch.randn(8, 8, generator=generator).T,  # not contiguous
        "layer.scale": torch.randn((), generator=generator),
        "layer.empty": torch.empty(0, 4),
        "buffer.positions": torch.arange(5),
    }


def snapshot(directory: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Manifest:
    arguments = {"step": 3, "dtype": "bfloat16", "files": FILES, "directory": directory, "part_bytes": 300}
    return write_snapshot(weights() if tensors is None else tensors, **(arguments | changes))


def read(manifest: Manifest, directory: Path) -> dict[str, Tensor]:
    return read_snapshot(manifest, lambda digest: directory / digest)


# ---- writing and reading


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_read_is_what_was_written_in_inference_dtype(tmp_path, dtype: str):
    found = read(snapshot(tmp_path, dtype=dtype), tmp_path)
    assert found.keys() == weights().keys()
    for name, tensor in weights().items():
        expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_every_file_has_its_digest_for_a_name(tmp_path):
    manifest = snapshot(tmp_path)
    on_disk = {path.name: Blob(sha256=sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
               for path in tmp_path.iterdir()}  # fmt: skip
    assert all(name == blob.sha256 for name, blob in on_disk.items())
    assert {blob.sha256: blob for blob in manifest.blobs()} == on_disk
    assert len(list(manifest.blobs())) == len(manifest.parts) + 2  # two of the three files are equal


def test_parts_are_cut_at_part_bytes_and_a_larger_tensor_stands_alone(tmp_path):
    tensors = {name: torch.ones(size) for name, size in {"a": 60, "b": 60, "c": 500, "d": 100, "e": 60}.items()}
    manifest = snapshot(tmp_path, tensors)  # 2 bytes per element, 300 per part
    contents = [sorted(load_file(tmp_path / part.sha256)) for part in manifest.parts]
    assert contents == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [entry.part for entry in manifest.tensors.values()] == [0, 0, 1, 2, 3]


def test_equal_weights_give_equal_snapshots_whatever_the_order(tmp_path):
    backwards = dict(reversed(weights().items()))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b", backwards)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".part-123").write_bytes(b"half")
    snapshot(tmp_path)
    assert not list(tmp_path.glob(".part-*"))


def test_every_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        events.append(("name", path))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    manifest = snapshot(tmp_path)
    *files, last = events
    assert last == ("fsync", tmp_path)
    assert len(files) == 2 * (len(manifest.parts) + len(FILES))
    for synced, named in zip(files[::2], files[1::2], strict=True):
        assert (synced[0], named[0], synced[1]) == ("fsync", "name", named[1])


# ---- digests


def test_a_tensor_digest_is_over_its_little_endian_bytes():
    assert tensor_digest(torch.tensor([1.0, -2.0])) == sha256(bytes.fromhex("0000803f000000c0")).hexdigest()
    assert tensor_digest(torch.tensor([1.0], dtype=torch.bfloat16)) == sha256(bytes.fromhex("803f")).hexdigest()
    assert tensor_digest(torch.tensor([[1, 2], [3, 4]]).T) == tensor_digest(torch.tensor([[1, 3], [2, 4]]))


def test_the_policy_digest_is_over_sorted_name_dtype_shape_and_bytes(tmp_path):
    a, b = torch.zeros(2), torch.ones(1, 3)
    rows = [["a", "float32", [2], tensor_digest(a)], ["b", "float32", [1, 3], tensor_digest(b)]]
    canonical = json.dumps(rows, separators=(",", ":")).encode()
    assert weights_digest({"b": b, "a": a}) == sha256(canonical).hexdigest()
    assert snapshot(tmp_path, {"b": b, "a": a}, dtype="float32").digest == weights_digest({"b": b, "a": a})


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"b": torch.zeros(2, 3)}, id="name"),
        pytest.param({"a": torch.zeros(3, 2)}, id="shape"),
        pytest.param({"a": torch.zeros(2, 3, dtype=torch.int32)}, id="dtype"),
        pytest.param({"a": -torch.zeros(2, 3)}, id="sign of zero"),
        pytest.param({"a": torch.zeros(2, 3), "b": torch.empty(0)}, id="one more"),
    ],
)
def test_i5_the_policy_digest_changes_with(other: dict[str, Tensor]):
    assert weights_digest(other) != weights_digest({"a": torch.zeros(2, 3)})


def test_model_and_tokenizer_digests_follow_their_files_only(tmp_path):
    plain = snapshot(tmp_path)
    assert snapshot(tmp_path, weights(1)).model_digest == plain.model_digest
    other_model = snapshot(tmp_path, files=FILES | {"config.json": b"{}"})
    other_tokens = snapshot(tmp_path, files=FILES | {"tokenizer.json": b"[]"})
    assert (other_model.model_digest != plain.model_digest, other_model.tokenizer_digest) == (
        True,
        plain.tokenizer_digest,
    )
    assert (other_tokens.tokenizer_digest != plain.tokenizer_digest, other_tokens.model_digest) == (
        True,
        plain.model_digest,
    )
    with pytest.raises(NotFound, match=r"config\.json"):
        _ = snapshot(tmp_path, files={}).model_digest


# ---- what is never published


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bfloat16"), (float("inf"), "float32"), (1e5, "float16")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value: float, dtype: str):
    tensors = weights()
    tensors["layer.weight"][3, 4] = value
    with pytest.raises(Corrupt, match=r"'layer\.weight' holds NaN or infinity"):
        snapshot(tmp_path, tensors, dtype=dtype)


def test_tied_weights_are_refused_by_name(tmp_path):
    tensors = weights()
    tensors["head.weight"] = tensors["embed.weight"].view(8, 40)
    with pytest.raises(Mismatch, match=r"'embed\.weight' and 'head\.weight' share storage"):
        snapshot(tmp_path, tensors)


@pytest.mark.parametrize("dtype", ["int32", "bf16", "nn", ""])
def test_only_floating_point_dtypes_can_be_served(tmp_path, dtype: str):
    with pytest.raises(Mismatch, match="floating-point dtype"):
        snapshot(tmp_path, dtype=dtype)


# ---- I5: what differs is refused


def _rewrite(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


def _flip_last_byte(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(_flip_last_byte, "tensor 'b'", id="one bit"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a safetensors file", id="cut"),
        pytest.param(_rewrite(lambda t: t.update(b=t["b"].view(torch.int16))), "tensor 'b'", id="dtype"),
        pytest.param(_rewrite(lambda t: t.update(b=t["b"].reshape(3, 2))), "tensor 'b'", id="shape"),
        pytest.param(_rewrite(lambda t: t.update(x=torch.ones(1))), "tensor 'x'", id="one more"),
        pytest.param(_rewrite(lambda t: t.pop("b") is None), "holds .*, not ", id="one less"),
        pytest.param(lambda path: save_file(load_file(path), path), "holds .*, not ", id="only the header"),
    ],
)
def test_i5_a_part_that_differs_is_refused_by_name(tmp_path, damage: Callable[[Path], None], message: str):
    manifest = snapshot(tmp_path, {"a": torch.ones(4), "b": torch.ones(2, 3)})
    damage(tmp_path / manifest.parts[0].sha256)
    with pytest.raises(Mismatch, match=message):
        read(manifest, tmp_path)


def test_i5_a_manifest_that_was_altered_is_refused(tmp_path):
    manifest, other = snapshot(tmp_path), snapshot(tmp_path, weights(1))
    with pytest.raises(Mismatch, match="do not make up its policy digest"):
        read(manifest.model_copy(update={"digest": other.digest}), tmp_path)
    entries = manifest.tensors | {"layer.scale": other.tensors["layer.scale"]}
    forged = manifest.model_copy(update={"tensors": entries, "digest": policy_digest(entries)})
    with pytest.raises(Mismatch, match=r"tensor 'layer\.scale'"):
        read(forged, tmp_path)
    entries = manifest.tensors | {"more": manifest.tensors["layer.scale"]}
    with pytest.raises(Mismatch, match="tensor 'more' is missing"):
        read(manifest.model_copy(update={"tensors": entries, "digest": policy_digest(entries)}), tmp_path)


def test_a_part_that_is_not_there_is_not_found(tmp_path):
    manifest = snapshot(tmp_path)
    (tmp_path / manifest.parts[0].sha256).unlink()
    with pytest.raises(NotFound, match=manifest.parts[0].sha256):
        read(manifest, tmp_path)


# ---- the manifest as JSON


def test_a_manifest_survives_json(tmp_path):
    manifest = snapshot(tmp_path).model_copy(update={"version": 7})
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "abc"}, "'digest'"),
        ({"digst": "abc"}, "did you mean 'digest'"),
        ({"parts": []}, "lies in part 0 of 0"),
        ({"parts": [{"sha256": "../../etc/passwd", "size": 1}]}, "'parts.0.sha256'"),
        ({"files": {"../config.json": {"sha256": "0" * 64, "size": 1}}}, "files"),
        ({"files": {"config.json\n": {"sha256": "0" * 64, "size": 1}}}, "files"),
        ({"kind": "delta"}, "'kind'"),
        ({"step": -1}, "'step'"),
    ],
)
def test_a_manifest_that_is_wrong_says_where(change: dict[str, Any], message: str):
    entry = TensorEntry(dtype="float32", shape=(1,), sha256="0" * 64, part=0).model_dump()
    good = {"step": 1, "digest": "0" * 64, "dtype": "float32", "tensors": {"a": entry}, "files": {}}
    good["parts"] = [{"sha256": "0" * 64, "size": 1}]
    assert Manifest.from_json(json.dumps(good)).step == 1
    with pytest.raises(ConfigError, match=message):
        Manifest.from_json(json.dumps(good | change), where="manifest 7")


@pytest.mark.parametrize("text", ["", "{", "[]", b"\xff"])
def test_text_that_is_no_manifest_is_refused(text: str | bytes):
    with pytest.raises(ConfigError, match="manifest 7: not"):
        Manifest.from_json(text, where="manifest 7")
