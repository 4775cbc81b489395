"""Reading a checkpoint's configuration."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from fake_hub import FakeHub
from remote_code import fresh_code
from rtp_llm.srt.configs import model_config as module
from rtp_llm.srt.configs import model_path
from rtp_llm.srt.configs.hf_config import apply_overrides
from rtp_llm.srt.configs.model_config import (
    ModelConfig,
    ModelConfigError,
    ModelNotFoundError,
    is_multimodal_model,
    register_multimodal_model,
    resolve_model_path,
)
from rtp_llm.srt.configs.server_args import ServerArgs

TEST_DATA = Path(os.environ.get("RTP_LLM_TEST_DATA", Path(__file__).parents[4] / "shared/data"))
STORIES = TEST_DATA / "models/stories260K-hf"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


@pytest.fixture
def make_checkpoint(tmp_path):
    def make(without=(), generation=None, **changes) -> str:
        config = {key: value for key, value in {**CONFIG, **changes}.items() if key not in without}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return str(tmp_path)

    return make


def load(path: str, **kwargs) -> ModelConfig:
    return ModelConfig.from_pretrained(path, **kwargs)


@pytest.mark.skipif(not STORIES.exists(), reason=f"no test data at {STORIES}")
def test_a_real_checkpoint():
    config = load(str(STORIES))
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.dtype, config.context_length, config.vocab_size) == ("float32", 512, 512)
    assert (config.hidden_size, config.num_layers, config.num_heads) == (64, 5, 8)
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 1), 1)
    assert config.generation_defaults == {"temperature": 0.0}
    assert config.hf_text_config is config.hf_config and isinstance(config.hf_config, LlamaConfig)
    assert not config.is_multimodal


def test_is_multimodal_model_is_extensible(monkeypatch):
    monkeypatch.setattr(module, "multimodal_model_archs", module.multimodal_model_archs.copy())
    assert not is_multimodal_model(["LlamaForCausalLM", "SeeingForCausalLM"])
    register_multimodal_model("SeeingForCausalLM")
    assert is_multimodal_model(["LlamaForCausalLM", "SeeingForCausalLM"]) and is_multimodal_model("SeeingForCausalLM")
    assert is_multimodal_model("Qwen2VLForConditionalGeneration")
    assert not is_multimodal_model([])


def test_a_model_with_a_language_part_is_multimodal_unless_that_is_off(make_checkpoint, monkeypatch):
    language = {name: value for name, value in CONFIG.items() if name != "architectures"}
    whole = {"architectures": ["AnyForAnything"], "model_type": "llava", "vision_config": {}}
    directory = make_checkpoint(without=language.keys() - whole.keys(), **whole, text_config=language)
    assert load(directory).is_multimodal
    assert not load(directory, enable_multimodal=False).is_multimodal
    monkeypatch.setattr(module, "multimodal_model_archs", {"LlamaForCausalLM"})
    assert load(make_checkpoint()).is_multimodal


# Token ids and sampling defaults


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (2, None, (2,)),
        (None, None, ()),
        ([5, 2], {"eos_token_id": 2}, (5, 2)),
        (2, {"eos_token_id": [7, 2, 8]}, (2, 7, 8)),
        (None, {"eos_token_id": 0}, (0,)),
    ],
)
def test_eos_ids_are_a_union(make_checkpoint, config_eos, generation, expected):
    assert load(make_checkpoint(eos_token_id=config_eos, generation=generation)).eos_token_ids == expected


def test_bos_zero_is_a_bos(make_checkpoint):
    assert load(make_checkpoint(bos_token_id=0, generation={"bos_token_id": 3})).bos_token_id == 0
    assert load(make_checkpoint(bos_token_id=None, generation={"bos_token_id": 3})).bos_token_id == 3


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, {}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_length": 9, "min_p": None},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1},
         {"temperature": 0.0, "repetition_penalty": 1.1}),
    ],
)  # fmt: skip
def test_generation_defaults(make_checkpoint, generation, expected):
    assert load(make_checkpoint(generation=generation)).generation_defaults == expected


# Dtype


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"dtype": "float16"}, "auto", "float16"),
        ({"dtype": "float32"}, "auto", "float32"),
        ({"dtype": "float32"}, "half", "float16"),
        ({"dtype": "float16"}, "float", "float32"),
        ({"dtype": "float16"}, "bfloat16", "bfloat16"),
        ({}, "auto", "float32"),
    ],
)
def test_dtype(make_checkpoint, stored, asked, expected):
    assert load(make_checkpoint(**stored), dtype=asked).dtype == expected


def test_dtype_of_the_weights_where_the_config_has_none(make_checkpoint, tmp_path):
    path = make_checkpoint()
    tensors = {"a": torch.zeros(50, dtype=torch.bfloat16), "b": torch.zeros(9), "c": torch.zeros(9, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(path).dtype == "bfloat16"
    (tmp_path / "model.safetensors").write_bytes(b"\x05")  # the loader's matter
    assert load(path).dtype == "float32"


def test_unknown_dtypes_are_refused_by_name(make_checkpoint):
    with pytest.raises(ModelConfigError, match="dtype 'float8' is unknown; have float32, bfloat16, float16"):
        load(make_checkpoint(), dtype="float8")
    with pytest.raises(ModelConfigError, match=r"config.json asks for dtype 'float64'.*have float32"):
        load(make_checkpoint(dtype="float64"))


# Context length


def yarn(factor: float, original: int | None = None) -> dict:
    rope = {"rope_type": "yarn", "factor": factor}
    return rope if original is None else {**rope, "original_max_position_embeddings": original}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 64),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, 160),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, 256),
        ({"rope_scaling": yarn(4.0)}, 256),
        ({"rope_scaling": yarn(4.0, 64)}, 256),
        ({"rope_scaling": yarn(4.0, 16), "max_position_embeddings": 64}, 64),
        ({"rope_scaling": yarn(40.0, 8), "max_position_embeddings": 300}, 320),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8}}, 64),
        ({"rope_parameters": {**yarn(2.0, 64), "rope_theta": 5000.0}}, 128),
        ({"seq_length": 48}, 48),
        ({"model_max_length": 32, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 64),
    ],
)
def test_context_length_is_derived(make_checkpoint, changes, expected):
    assert load(make_checkpoint(**changes)).context_length == expected


def test_context_length_of_longrope(make_checkpoint):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, **factors}
    assert load(make_checkpoint(rope_scaling=rope)).context_length == 64


def test_context_length_under_another_name(make_checkpoint):
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 40, "n_embd": 32, "n_layer": 3}
    config = load(make_checkpoint(without=("max_position_embeddings", "num_hidden_layers", "hidden_size"), **gpt2))
    assert (config.context_length, config.num_layers, config.hidden_size) == (40, 3, 32)


def test_the_users_context_length(make_checkpoint, caplog):
    path = make_checkpoint()
    assert load(path, context_length=10).context_length == 10
    assert not caplog.records
    assert load(path, context_length=100).context_length == 100
    assert "100 is longer than the model's own 64" in caplog.text
    for wrong in (0, -5, True, 1.5):
        with pytest.raises(ModelConfigError, match="context_length must be a positive number"):
            load(path, context_length=wrong)


# Overrides


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_an_overriding_rope_scaling_is_as_if_it_stood_in_the_file(make_checkpoint, spelling):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    if spelling == "rope_parameters":
        rope["rope_theta"] = 777.0
    expected = load(make_checkpoint(rope_theta=777.0, **{spelling: rope}))
    got = load(make_checkpoint(rope_theta=777.0), json_model_override_args=json.dumps({spelling: rope}))
    assert got.hf_config.rope_parameters == expected.hf_config.rope_parameters
    assert got.hf_config.rope_parameters["rope_theta"] == 777.0
    assert got.context_length == expected.context_length == 256


def test_rope_scaling_over_a_file_with_rope_parameters_keeps_the_base(make_checkpoint):
    path = make_checkpoint(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    linear = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config = load(path, json_model_override_args=linear)
    assert config.hf_config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert load(path, json_model_override_args='{"rope_scaling": null}').hf_config.rope_parameters["rope_theta"] == 5e5


def test_overrides_replace_but_merge_into_configs(make_checkpoint):
    config = load(make_checkpoint(), json_model_override_args={"num_hidden_layers": 1, "architectures": ["Other"]})
    assert (config.num_layers, config.architectures) == (1, ["Other"])
    assert config.hf_config.name_or_path == config.model_path
    before = {"text_config": {"a": 1, "b": {"c": 1}}, "rope": {"x": 1}}
    changes = {"text_config": {"b": {"d": 2}}, "rope": {"y": 2}, "vision_config": {"e": 3}}
    assert apply_overrides(before, changes) == {
        "text_config": {"a": 1, "b": {"d": 2}}, "rope": {"y": 2}, "vision_config": {"e": 3}
    }  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[1]", "3", '"a"'])
def test_overrides_must_be_a_json_object(make_checkpoint, text):
    with pytest.raises(ModelConfigError, match="json_model_override_args"):
        load(make_checkpoint(), json_model_override_args=text)


def test_without_overrides_the_config_is_transformers_own(make_checkpoint):
    path = make_checkpoint(rope_scaling=yarn(2.0))
    assert load(path).hf_config.to_dict() == AutoConfig.from_pretrained(path).to_dict()


# What can be wrong


def test_server_arguments_give_what_their_options_say(make_checkpoint):
    directory = make_checkpoint(model_type="llava", text_config=CONFIG)
    overrides = '{"text_config": {"vocab_size": 70}}'
    args = ServerArgs(model_path=directory, dtype="float16", context_length=50, json_model_override_args=overrides)
    config = ModelConfig.from_server_args(args)
    assert (config.dtype, config.context_length, config.vocab_size) == ("float16", 50, 70)
    assert config.is_multimodal
    for without_media in ({"enable_multimodal": False}, {"model_impl": "transformers"}):
        assert not ModelConfig.from_server_args(ServerArgs(model_path=directory, **without_media)).is_multimodal


def test_server_arguments_of_a_hub_id_say_where_it_is_fetched(make_checkpoint, monkeypatch):
    directory, asked = make_checkpoint(), []
    monkeypatch.setattr(module, "resolve_model_path", lambda *args: asked.append(args) or directory)
    args = ServerArgs(
        model_path="owner/name", revision="v1", download_dir="/cache", load_format="pt", trust_remote_code=True
    )
    assert ModelConfig.from_server_args(args).model_path == directory
    assert asked == [("owner/name", "v1", "/cache", "pt", True, True)]


def test_no_such_directory(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load("./nowhere")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match="is a file, but no GGUF; give the directory"):
        load(str(tmp_path / "model.safetensors"))


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "config.json is not JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "model_type"),
        ('{"model_type": "no_such_type"}', "no_such_type"),
    ],
)
def test_a_broken_config(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelConfigError, match=message):
        load(str(tmp_path))


def test_config_values_of_wrong_kinds(make_checkpoint):
    with pytest.raises(ModelConfigError, match="hidden_size"):
        load(make_checkpoint(hidden_size="large"))
    with pytest.raises(ModelConfigError, match=r"`vocab_size` as a positive integer, not 0"):
        load(make_checkpoint(vocab_size=0))
    with pytest.raises(ModelConfigError, match=r"`architectures` in .* must be a list of names, not"):
        load(make_checkpoint(architectures=[1]))
    with pytest.raises(ModelConfigError, match=r"transformers cannot use .*config.json"):
        load(make_checkpoint(num_attention_heads=0))


EVIL = ["x", -1, 0, [], {}, 1.5, True, 10**30, [1, "a"], {"a": 1}, float("nan")]
UNSURE = {"hidden_size", "num_attention_heads"}  # these are divided by each other: either could be to blame
KEYS = [*CONFIG, "rope_scaling", "rope_parameters", "layer_types", "head_dim", "dtype", "auto_map", "rope_theta",
        "quantization_config", "text_config", "torch_dtype", "num_key_value_heads"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_evil_values_are_told_by_file_and_key_or_harmless(make_checkpoint, key):
    for value in EVIL:
        try:
            config = load(make_checkpoint(**{key: value}))
        except ModelConfigError as error:
            message = str(error)
            named = (
                key.removeprefix("torch_") in message
                or key in UNSURE
                or (key == "text_config" and "vocab_size" in message)
            )
            assert named, (value, message)
            assert "config" in message
        else:
            assert config.vocab_size > 0 and config.context_length > 0, value


@pytest.mark.parametrize("text", ["[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "\ufeff{}", "\ud800"])
def test_a_config_that_no_parser_takes(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelConfigError, match=r"config\.json"):
        load(str(tmp_path))


def test_a_config_that_is_no_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelConfigError, match=r"config\.json cannot be read"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "header", [b"[]", b"1", b'{"a": 1}', b'{"a": []}', b'{"a": {}}', b'{"a": {"dtype": [], "shape": 1}}',
               b'{"a": {"dtype": "F32", "shape": 1}}', b'{"a": {"dtype": "F32", "shape": ["x"]}}', b"[" * 100_000]
)  # fmt: skip
def test_weights_with_a_broken_header_tell_no_dtype(make_checkpoint, tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert load(make_checkpoint()).dtype == "float32"
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + header)
    assert load(make_checkpoint()).dtype == "float32"


REMOTE_CODE = """
from transformers import PreTrainedConfig

class OddConfig(PreTrainedConfig):
    model_type = "odd_for_test"
    num_hidden_layers: int = 3
    hidden_size: int = 8
    vocab_size: int = 5
"""


def test_remote_code_only_when_trusted(make_checkpoint, tmp_path, monkeypatch):
    fresh_code(tmp_path / "cache", monkeypatch)
    (tmp_path / "odd.py").write_text(REMOTE_CODE)
    names = {"model_type": "odd_for_test", "architectures": ["OddForCausalLM"]}
    path = make_checkpoint(**names, auto_map={"AutoConfig": "odd.OddConfig"})
    with pytest.raises(ModelConfigError, match="--trust-remote-code"):
        load(path)
    assert type(load(path, trust_remote_code=True).hf_config).__name__ == "OddConfig"
    overridden = load(path, trust_remote_code=True, json_model_override_args={"num_hidden_layers": 7})
    assert (type(overridden.hf_config).__name__, overridden.num_layers) == ("OddConfig", 7)


# The hub


SMALL = ["config.json", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja"]


@pytest.mark.parametrize(
    ("files", "load_format", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "original/model.safetensors"], "auto", ["model.safetensors"]),
        (["model.safetensors", "consolidated.safetensors", "tf_model.h5"], "auto", ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], "auto", ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.bin"], "pt", ["pytorch_model.bin"]),
        (["pytorch_model.bin"], "safetensors", []),
        (["model.safetensors"], "dummy", []),
    ],
)  # fmt: skip
def test_weights_of_one_format_are_fetched(tmp_path, monkeypatch, files, load_format, weights):
    hub = FakeHub(tmp_path, SMALL + files)
    hub.install(monkeypatch)
    assert resolve_model_path("owner/name", "v2", "/downloads", load_format) == str(tmp_path)
    fetched = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert fetched == {*SMALL, *weights}
    assert all(call == {"repo_id": "owner/name", "revision": "v2", "cache_dir": "/downloads"} for call in hub.calls)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_fetched_only_when_trusted(tmp_path, monkeypatch, trusted):
    code = ["modeling_own.py", "zmq.py", "nested/processing_own.py"]
    FakeHub(tmp_path, SMALL + code).install(monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    load("owner/name", trust_remote_code=trusted)
    assert sorted(tmp_path.rglob("*.py")) == (sorted(tmp_path / name for name in code) if trusted else [])


def test_a_hub_that_does_not_answer_is_one_clear_message(monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nMore.")

    monkeypatch.setattr(model_path, "snapshot_download", offline)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model_path("owner/name", revision="v2")
    message = str(caught.value)
    assert "owner/name at revision 'v2'" in message and "Cannot find an appropriate cached snapshot folder" in message
    assert "offline" in message and "\n" not in message


def test_offline_mode_is_respected(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="no directory 'owner/not-in-the-cache'"):
        resolve_model_path("owner/not-in-the-cache", download_dir=str(tmp_path))
