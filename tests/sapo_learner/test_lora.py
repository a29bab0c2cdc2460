"""LoRA: adapters are trained, everything outside sees merged weights, and the base is held once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from sapo_learner import checkpoint
from sapo_learner.config import LearnerSettings, LoraSettings, PolicySettings, parse
from sapo_learner.errors import ConfigError, Mismatch
from sapo_learner.hidden_states import use_packing
from sapo_learner.learner import Learner
from sapo_learner.lora import LoraPolicy, add_lora, check_lora
from sapo_learner.policy import Policy, load_policy, load_weights, tiny_policy
from sapo_learner.probe import measure, sequence_logprobs
from sapo_learner.resume import capture, restore
from sapo_learner.sharding import check_shardable
from sapo_learner.snapshot import read_snapshot, snapshot_digest, weights_digest, write_snapshot
from sapo_learner.train import Position, train
from services.wire import decode, encode
from tests.recorded import ALPHABET, RecordedLog, random_group
from tests.sapo_learner.test_policy import ARCHITECTURES, SMALL, written

torch.set_num_threads(1)
IDS = list(range(4, 17))
LORA = LoraSettings(rank=4, alpha=8)
RATE = 0.05  # large: the merged weights are nowhere near the base's
every_architecture = pytest.mark.parametrize("name", ["qwen3", *ARCHITECTURES])
LOG = RecordedLog([encode(random_group(draw)) for draw in range(16)])


def plain(name: str, directory: Path) -> Policy:
    return tiny_policy(ALPHABET, seed=0) if name == "qwen3" else load_policy(written(directory, ARCHITECTURES[name]))


def adapted(name: str, directory: Path, *, settings: LoraSettings = LORA, seed: int = 0) -> LoraPolicy:
    return add_lora(plain(name, directory), settings, seed=seed, source="test")


def learning(policy: Policy) -> Learner:
    training = {"groups_per_step": 2, "steps": 8, "max_policy_age": 100, "microbatch_tokens": 64}
    optimizer = {"learning_rate": RATE, "warmup_steps": 0, "weight_decay": 0.1}
    settings = parse(LearnerSettings, {"training": training, "optimizer": optimizer}, where="test")
    return Learner(policy, settings, temperature=1.0)


def train_until(learner: Learner, step: int, position: Position | None = None) -> Position:
    position = position or Position()
    for report in train(learner, LOG, position, decode=decode):
        if report.update.step >= step:
            break
    return position


@pytest.fixture
def trained(tmp_path: Path) -> LoraPolicy:
    policy = adapted("qwen3", tmp_path)
    train_until(learning(policy), 3)
    return policy


def logprobs(policy: Policy) -> Tensor:
    return torch.from_numpy(sequence_logprobs(policy, IDS[:1], IDS[1:]))


# ---- Merged weights


@every_architecture
def test_merged_weights_agree_with_the_adapters_that_were_trained(name: str, tmp_path: Path) -> None:
    policy = adapted(name, tmp_path / "base")
    before = logprobs(policy)
    train_until(learning(policy), 3)
    served = plain(name, tmp_path / "served")
    load_weights(served, policy.tensors())
    torch.testing.assert_close(logprobs(served), logprobs(policy), rtol=0, atol=1e-5)
    assert (logprobs(policy) - before).abs().max() > 0.1
    assert policy.tensors().keys() == served.tensors().keys()


@every_architecture
def test_fresh_adapters_leave_every_bit_of_the_policy_as_it_is(name: str, tmp_path: Path) -> None:
    base, policy = plain(name, tmp_path), adapted(name, tmp_path)
    assert weights_digest(policy.tensors()) == weights_digest(base.tensors()) == policy.base.digest
    assert torch.equal(logprobs(policy), logprobs(base))


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_they_are_what_peft_itself_would_merge(name: str, tmp_path: Path) -> None:
    policy = adapted(name, tmp_path)
    train_until(learning(policy), 2)
    for layer_name, layer in policy.layers.items():
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        assert torch.equal(policy.tensors()[f"{layer_name}.weight"], expected)


@every_architecture
def test_taken_for_good_they_make_a_plain_policy_of_the_same_bits(name: str, tmp_path: Path) -> None:
    policy = adapted(name, tmp_path)
    train_until(learning(policy), 2)
    digest = weights_digest(policy.tensors())
    merged = policy.merged()
    assert weights_digest(merged.tensors()) == digest
    assert all(each.requires_grad for each in merged.model.parameters())
    assert list(merged.model.state_dict()) == list(plain(name, tmp_path).model.state_dict())


def test_a_snapshot_stays_as_it_was_while_training_goes_on_and_holds_no_second_base(tmp_path: Path) -> None:
    policy = adapted("qwen3", tmp_path)
    learner = learning(policy)
    position = train_until(learner, 2)
    digest, taken = snapshot_digest(policy.tensors(), "float32"), policy.copied("float32")
    train_until(learner, 4, position)
    manifest = write_snapshot(taken, step=2, dtype="float32", files={}, directory=tmp_path, part_bytes=1 << 12)
    assert len(manifest.parts) > 3
    assert manifest.digest == digest != snapshot_digest(policy.tensors(), "float32")
    read = read_snapshot(manifest, lambda sha256: tmp_path / sha256)
    assert weights_digest(read) == digest
    head = policy.head_weight.data_ptr()
    assert head in {taken[each].data_ptr() for each in taken}, "what is frozen is shared"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_is_that_of_the_merged_weights_as_engines_get_them(
    trained: LoraPolicy, dtype: str, tmp_path: Path
) -> None:
    manifest = write_snapshot(trained.copied(dtype), step=3, dtype=dtype, files={}, directory=tmp_path)
    served = tiny_policy(ALPHABET, seed=1)
    load_weights(served, read_snapshot(manifest, lambda sha256: tmp_path / sha256))
    probe = measure(trained, trained.copied(dtype), IDS)
    assert probe.logprobs == tuple(logprobs(served).tolist())


def test_measuring_leaves_the_model_alone_also_when_it_fails(trained: LoraPolicy) -> None:
    before = logprobs(trained)
    measure(trained, trained.copied("bfloat16"), IDS)
    with pytest.raises(KeyError):
        measure(trained, {"model.norm.weight": torch.ones(96)}, IDS)
    assert torch.equal(logprobs(trained), before)


# ---- Training


def test_only_adapters_are_trained(tmp_path: Path) -> None:
    policy = adapted("qwen3", tmp_path)
    frozen = {name: each.clone() for name, each in policy.model.state_dict().items() if ".lora_" not in name}
    before = {name: each.clone() for name, each in policy.state().items()}
    learner = learning(policy)
    train_until(learner, 3)
    assert all(torch.equal(policy.model.state_dict()[name], each) for name, each in frozen.items())
    assert not any(torch.equal(each, before[name]) for name, each in policy.state().items())
    assert {name.rpartition("/")[0] for name in learner.optimizer_tensors()} == policy.state().keys()
    assert {each.dtype for each in policy.state().values()} == {torch.float32}


def test_adapters_are_decided_by_the_seed_and_draw_nothing_from_the_process_s_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    states = [adapted("llama", tmp_path / str(n), seed=seed).state() for n, seed in enumerate((1, 1, 2))]
    torch.manual_seed(5)
    adapted_here = add_lora(tiny_policy(ALPHABET, seed=0), LORA, seed=3, source="test")
    assert adapted_here.layers
    digests = [weights_digest(each) for each in states]
    assert digests[0] == digests[1] != digests[2]
    base = tiny_policy(ALPHABET, seed=0)
    torch.manual_seed(5)
    add_lora(base, LORA, seed=3, source="test")
    assert torch.equal(torch.rand(1), expected)


def test_I3_resumed_from_a_checkpoint_the_same_bits_come_out(tmp_path: Path) -> None:
    learner = learning(adapted("qwen3", tmp_path))
    position = train_until(learner, 3)
    path = checkpoint.save(tmp_path / "checkpoints", capture(learner, position), token=1)
    train_until(learner, 6, position)
    state = checkpoint.load(path)
    assert state.model.keys() == learner.policy.state().keys()
    resumed = learning(adapted("qwen3", tmp_path, seed=9))
    train_until(resumed, 6, restore(resumed, state, where="test"))
    assert weights_digest(resumed.policy.tensors()) == weights_digest(learner.policy.tensors())
    assert weights_digest(resumed.optimizer_tensors()) == weights_digest(learner.optimizer_tensors())


def test_adapters_beside_another_base_are_refused(tmp_path: Path) -> None:
    learner = learning(adapted("qwen3", tmp_path))
    state = capture(learner, train_until(learner, 1))
    other = tiny_policy(ALPHABET, seed=1)
    with pytest.raises(Mismatch, match=r"trained beside the weights \w{12} of test, but the policy's base is \w{12}"):
        restore(learning(add_lora(other, LORA, seed=0, source="test")), state, where="test")
    with pytest.raises(Mismatch, match=r"holds adapters.*set policy\.lora"):
        restore(learning(tiny_policy(ALPHABET, seed=0)), state, where="test")
    whole = learning(tiny_policy(ALPHABET, seed=0))
    with pytest.raises(Mismatch, match=r"holds all weights.*leave policy\.lora out"):
        restore(learner, capture(whole, Position()), where="test")


# ---- What is refused

MIXTURE = Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("llama", ["q_porj"], r"no layer has the name 'q_porj', did you mean 'q_proj'\?"),
        ("llama", ["q_proj", "lm_head"], "'lm_head' is the output projection.*choose among down_proj, gate_proj"),
        ("llama", ["embed_tokens"], "'embed_tokens' is a Embedding, and only linear layers"),
        ("llama", [], "no layer is named"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_before_weights_are_read(
    name: str, targets: list[str], message: str, tmp_path: Path
) -> None:
    directory = written(tmp_path, ARCHITECTURES[name])
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=message):
        check_lora(directory, LoraSettings(target_modules=targets))


def test_experts_are_named_and_the_rest_can_be_adapted(tmp_path: Path) -> None:
    directory = written(tmp_path, MIXTURE)
    with pytest.raises(ConfigError, match=r"experts\.\w+ and 1 more.*would go to k_proj, o_proj, q_proj, v_proj"):
        check_lora(directory, LORA)
    some = LoraSettings(target_modules=["q_proj", "v_proj"])
    check_lora(directory, some)
    policy = add_lora(load_policy(directory), some, seed=0, source="test")
    train_until(learning(policy), 2)
    served = load_policy(directory)
    load_weights(served, policy.tensors())
    torch.testing.assert_close(logprobs(served), logprobs(policy), rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", ["dropout", "modules_to_save", "bias"])
def test_options_that_lora_has_elsewhere_are_refused_with_the_reason(option: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no {option}: "):
        parse(PolicySettings, {"lora": {option: 0}}, where="test")


def test_named_layers_alone_are_adapted(tmp_path: Path) -> None:
    policy = adapted("llama", tmp_path, settings=LoraSettings(rank=2, alpha=2, target_modules=["q_proj", "o_proj"]))
    assert list(policy.layers) == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]


def test_several_ranks_are_refused_also_where_torchrun_alone_says_how_many_there_are(tmp_path: Path) -> None:
    base, policy = plain("qwen3", tmp_path), adapted("qwen3", tmp_path)
    for each in (base, policy):
        use_packing(each)
    check_shardable(base)
    refusal = r"policy\.lora: adapters are trained by one process.*parallel\.processes to 1"
    with pytest.raises(ConfigError, match=refusal):
        check_shardable(policy)
