"""Policies: any plain causal language model on disk, refused clearly when it is not one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, Qwen2Config

from sapo_learner.advantages import group_advantages
from sapo_learner.batching import collate
from sapo_learner.config import LearnerSettings
from sapo_learner.empty_policy import empty_policy
from sapo_learner.errors import ConfigError, Mismatch
from sapo_learner.learner import Learner
from sapo_learner.policy import Policy, load_policy, load_weights, require_plain_head, tiny_policy, write_policy
from sapo_learner.snapshot import weights_digest
from tests.recorded import ALPHABET, VOCABULARY, sampled_group

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**{key: value for key, value in SMALL.items() if key != "head_dim"}, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=1),
}


def written(directory: Path, config: Any) -> Path:
    """A model directory with random weights and the tiny policy's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    write_policy(Policy(model, tiny_policy(ALPHABET, seed=0).tokenizer, {}), directory)
    return directory


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([[4, 13, 5, 7]])).logits


def train_one_step(policy: Policy) -> bool:
    settings = LearnerSettings()
    one = sampled_group(policy, "1+2+3=", size=8)
    advantages = group_advantages([each.reward for each in one.trajectories], settings.advantages)
    return (
        Learner(policy, settings, temperature=1.0)
        .step(collate([one], [advantages], step=0, microbatch_tokens=64))
        .applied
    )


# ---- Loading


def test_a_tiny_policy_is_the_same_after_it_was_written_and_loaded(tmp_path):
    policy = tiny_policy(ALPHABET, seed=3)
    write_policy(policy, tmp_path)
    loaded = load_policy(tmp_path)
    assert torch.equal(logits(loaded), logits(policy))
    assert weights_digest(loaded.tensors()) == weights_digest(policy.tensors())
    assert loaded.vocabulary == VOCABULARY
    assert loaded.tokenizer.encode("7+5-3=") == policy.tokenizer.encode("7+5-3=")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("(12)>9")) == "(12)>9"
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= loaded.files.keys()
    assert loaded.files["config.json"] == (tmp_path / "config.json").read_bytes()
    assert not loaded.model.training


def test_a_tiny_policy_is_decided_by_its_seed():
    digests = [weights_digest(tiny_policy(ALPHABET, seed=seed).tensors()) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_without_weights_the_model_is_only_shaped(tmp_path):
    write_policy(tiny_policy(ALPHABET, seed=3), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shaped = load_policy(tmp_path, weights=False)
    load_weights(shaped, tiny_policy(ALPHABET, seed=3).tensors())
    assert torch.equal(logits(shaped), logits(tiny_policy(ALPHABET, seed=3)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_load_and_train(name, tmp_path):
    policy = load_policy(written(tmp_path, ARCHITECTURES[name]))
    assert policy.end_ids == {1}
    before = weights_digest(policy.tensors())
    assert train_one_step(policy)
    assert weights_digest(policy.tensors()) != before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_of_a_row_do_not_depend_on_its_padding(name, tmp_path):
    policy = load_policy(written(tmp_path, ARCHITECTURES[name]))
    ids = torch.tensor([[4, 13, 5, 0, 0], [7, 7, 7, 7, 7]])
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    padded = policy.hidden(ids, mask)[0, :3]
    alone = policy.hidden(ids[:1, :3], mask[:1, :3])[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_weights_of_another_dtype_are_trained_in_float32(tmp_path):
    policy = load_policy(written(tmp_path, ARCHITECTURES["llama"]))
    policy.model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_policy(tmp_path).tensors().values()} == {torch.float32}


# ---- What is refused


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, final_logit_softcapping=30.0, query_pre_attn_scalar=8),
        GraniteConfig(**{key: value for key, value in SMALL.items() if key != "head_dim"}, logits_scaling=4.0),
    ],
    ids=["soft-capping", "scaling"],
)
def test_a_model_that_changes_its_logits_is_refused_even_with_untrained_weights(config, tmp_path):
    with pytest.raises(ConfigError, match=r"changes its logits .*without logit soft-capping or scaling") as error:
        load_policy(written(tmp_path, config))
    assert str(tmp_path) in str(error.value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # where no known key says so
    with pytest.raises(ConfigError, match=r"ForCausalLM changes its logits around the output projection"):
        require_plain_head(Policy(model, None, {}), tmp_path)


def test_a_model_that_changes_its_hidden_states_before_the_projection_is_refused(tmp_path):
    policy = load_policy(written(tmp_path, ARCHITECTURES["llama"]))
    policy.model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
    with pytest.raises(ConfigError, match="changes its logits around the output projection"):
        require_plain_head(policy, tmp_path)


@pytest.mark.parametrize("make", [lambda path: path / "absent", lambda path: path])
def test_what_is_not_a_model_directory_is_refused(make, tmp_path):
    with pytest.raises(
        ConfigError, match=r"(no config\.json there|no such directory).*Hugging Face causal language model"
    ):
        load_policy(make(tmp_path))


def _unknown_type(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))


def _another_shape(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def _one_tensor_less(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "config.json").write_text("{"), r"config\.json is not readable"),
        (_unknown_type, "'no-such-model' is no causal language model that the installed transformers knows"),
        (lambda directory: (directory / "model.safetensors").unlink(), r"no weights there \(\*\.safetensors\)"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b"torn"), "cannot load"),
        (_another_shape, "cannot load"),
        (_one_tensor_less, r"weights are missing: lm_head\.weight"),
    ],
)
def test_a_damaged_directory_is_refused_and_named(damage, message, tmp_path):
    damage(written(tmp_path, ARCHITECTURES["llama"]))
    with pytest.raises(ConfigError, match=message) as error:
        load_policy(tmp_path)
    assert str(tmp_path) in str(error.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "encoder-decoder": ({"model_type": "bart", "is_encoder_decoder": True}, "'bart' is an encoder-decoder"),
    "vision": ({"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, r"multimodal model \(vision_config\)"),
    "audio": ({"audio_config": {"hidden_size": 8}}, r"multimodal model \(audio_config\)"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\).*in bfloat16 or float32"),
    "own code": ({"model_type": "x", "auto_map": {"AutoModel": "m.M"}}, r"needs code .*\(auto_map\), which is not run"),
    "soft-capping": ({"final_logit_softcapping": 30.0}, r"changes its logits .*\(final_logit_softcapping 30\.0\)"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused_before_weights_are_read(changes, message, tmp_path):
    directory = written(tmp_path, ARCHITECTURES["llama"])
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=message) as error:
        load_policy(directory)
    assert str(directory) in str(error.value)


def test_a_built_in_architecture_that_also_names_code_of_its_own_is_loaded_without_it(tmp_path):
    directory = written(tmp_path, ARCHITECTURES["llama"])
    config = json.loads((directory / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}, "final_logit_softcapping": None}
    (directory / "config.json").write_text(json.dumps(config | own))
    (directory / "modeling.py").write_text("raise SystemExit")
    assert load_policy(directory).vocabulary == VOCABULARY


def test_pickles_and_adapters_without_a_model_are_refused_with_what_to_do(tmp_path):
    directory = written(tmp_path, ARCHITECTURES["llama"])
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickle files \(pytorch_model\.bin\).*convert them to safetensors"):
        load_policy(directory)
    (directory / "config.json").rename(directory / "adapter_config.json")
    with pytest.raises(ConfigError, match=r"holds a LoRA adapter and no model.*merge it into its base"):
        load_policy(directory)


def test_a_tokenizer_without_a_padding_token_is_fine(tmp_path):
    directory = written(tmp_path, ARCHITECTURES["llama"])
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    policy = load_policy(directory)
    assert policy.tokenizer.pad_token is None
    assert train_one_step(policy)


# ---- Tensors


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True)])
def test_tied_tensors_appear_once(name, tied, tmp_path):
    policy = load_policy(written(tmp_path, ARCHITECTURES[name]))
    tensors = policy.tensors()
    assert ("lm_head.weight" in tensors) is not tied
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    assert len(set(pointers)) == len(pointers)
    trained = {parameter.data_ptr() for parameter in policy.model.parameters()}
    assert trained <= set(pointers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_weights_the_tensors_have_the_same_names_and_shapes(name, tmp_path):
    policy = load_policy(written(tmp_path, ARCHITECTURES[name]))
    empty = empty_policy(policy.files, packs=False).tensors()
    assert {name: each.shape for name, each in empty.items()} == {
        name: each.shape for name, each in policy.tensors().items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"differ in names: model\.norm\.weight"),
        (lambda tensors: tensors.update(stray=torch.zeros(1)), "differ in names: stray"),
    ],
)
def test_missing_and_unknown_names_are_refused_before_anything_is_copied(change, message):
    policy = tiny_policy(ALPHABET, seed=0)
    before = weights_digest(policy.tensors())
    tensors = {name: tensor.clone() for name, tensor in tiny_policy(ALPHABET, seed=1).tensors().items()}
    change(tensors)
    with pytest.raises(Mismatch, match=message):
        load_weights(policy, tensors)
    assert weights_digest(policy.tensors()) == before


def test_load_weights_copies():
    policy, source = tiny_policy(ALPHABET, seed=0), tiny_policy(ALPHABET, seed=1)
    load_weights(policy, source.tensors())
    assert torch.equal(logits(policy), logits(source))
    assert {each.data_ptr() for each in policy.tensors().values()}.isdisjoint(
        each.data_ptr() for each in source.tensors().values()
    )


# ---- Ending


@pytest.mark.parametrize(("configured", "expected"), [(1, {1}), ([5, 6], {1, 5, 6}), (None, {1})])
def test_end_ids_are_the_models_and_the_tokenizers(configured, expected):
    policy = tiny_policy(ALPHABET, seed=0)
    policy.model.generation_config.eos_token_id = configured
    assert policy.end_ids == expected


def test_a_policy_without_an_end_token_has_no_end_ids():
    policy = tiny_policy(ALPHABET, seed=0)
    policy.model.generation_config.eos_token_id = policy.tokenizer.eos_token = None
    assert policy.end_ids == frozenset()


def test_load_weights_refuses_a_wrong_shape_and_changes_nothing():
    policy = tiny_policy(ALPHABET, seed=0)
    before = weights_digest(policy.tensors())
    tensors = {name: tensor + 1 for name, tensor in policy.tensors().items()}
    last = list(tensors)[-1]
    tensors[last] = tensors[last][:1]
    with pytest.raises(Mismatch, match="has shape"):
        load_weights(policy, tensors)
    assert weights_digest(policy.tensors()) == before
