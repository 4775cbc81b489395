"""Configurations of models that transformers does not know: classes of model files, and config.json's own fields."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

from rtp_llm.srt.configs.own_config import GeneralConfig, OwnConfigError, make_config
from rtp_llm.srt.layers.rotary import get_rope_config

SIZES = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2}


def test_fields_of_the_file_serve() -> None:
    config = make_config(
        None,
        SIZES
        | {
            "model_type": "zeta",
            "torch_dtype": "bfloat16",
            "num_attention_heads": 4,
            "top_k": 2,
            "eos_token_id": [1, 2],
        }
        | {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2}, "quantization_config": {"bits": 4}},
    )
    assert (config.model_type, config.dtype, config.eos_token_id) == ("zeta", torch.bfloat16, [1, 2])
    assert config.top_k == 2  # transformers takes it for a setting of sampling, and drops it
    assert config.quantization_config == {"bits": 4}
    assert get_rope_config(config) == (5000.0, {"type": "linear", "rope_type": "linear", "factor": 2}, 1.0)
    assert config.get_text_config() is config
    assert (config.tie_word_embeddings, config.num_key_value_heads, config.head_dim) == (False, 4, 16)
    assert copy.deepcopy(config).to_dict()["top_k"] == 2
    given = make_config(None, SIZES | {"num_attention_heads": 4, "head_dim": 24, "tie_word_embeddings": True})
    assert (given.tie_word_embeddings, given.head_dim) == (True, 24)


def test_parts_of_the_file_are_configurations() -> None:
    config = make_config(
        None, {"text_config": SIZES | {"model_type": "llama"}, "eye_config": {"size": 4, "inner_config": {"depth": 3}}}
    )
    assert isinstance(config.text_config, LlamaConfig)
    assert config.text_config.rms_norm_eps == 1e-6  # LlamaConfig's own
    assert config.get_text_config() is config.text_config
    assert (config.eye_config.size, config.eye_config.inner_config.depth) == (4, 3)


def test_lists_of_parts_hold_configurations_down_to_the_last() -> None:
    blocks = [{"attention": {"no_op": True, "window": None}, "size": 3}, {"attention": {"no_op": False}}]
    config = make_config(None, SIZES | {"block_configs": blocks, "names": [{"a": 1}]})
    assert [block.attention.no_op for block in config.block_configs] == [True, False]
    assert config.block_configs[0].size == 3 and not hasattr(config.block_configs[1], "size")
    assert config.names == [{"a": 1}]
    assert config.to_dict()["block_configs"][0]["attention"]["window"] is None
    assert "no_op" in repr(config)


def test_older_names_of_sizes_serve() -> None:
    config = make_config(None, {"padded_vocab_size": 90, "hidden_size": 64, "n_layer": 2, "n_head": 4})
    assert (config.vocab_size, config.num_hidden_layers, config.n_layer) == (90, 2, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 16)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
            {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
        ),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 7.0}),
    ],
)
def test_older_fields_of_rotary_positions_are_gathered(fields: dict[str, Any], parameters: dict[str, Any]) -> None:
    assert make_config(None, SIZES | fields).rope_parameters == parameters


@pytest.mark.parametrize("fields", [{}, {"rope_theta": [1e4, 1e6]}, {"rope_scaling": {"full_attention": {}}}])
def test_rotary_positions_that_differ_are_not_gathered(fields: dict[str, Any]) -> None:
    assert not hasattr(make_config(None, SIZES | fields), "rope_parameters")


def test_missing_fields_are_named() -> None:
    with pytest.raises(OwnConfigError, match=r"it has no `vocab_size`, `num_hidden_layers`\. .*config_class"):
        make_config(None, {"hidden_size": 3})
    with pytest.raises(OwnConfigError, match="it has no `vocab_size` under `text_config`"):
        make_config(None, {"text_config": {"hidden_size": 3, "num_hidden_layers": 1}})
    config = make_config(None, SIZES)
    assert getattr(config, "sliding_window", None) is None
    with pytest.raises(AttributeError, match=r"config\.json has no `rms_norm_eps`.*config_class"):
        config.rms_norm_eps  # noqa: B018


def test_a_class_of_transformers_form() -> None:
    class ZetaConfig(PreTrainedConfig):
        model_type = "zeta"
        vocab_size: int = 7
        num_stripes: int = 3

    config = make_config(ZetaConfig, {"vocab_size": 9, "architectures": ["ZetaForCausalLM"]})
    assert (type(config), config.vocab_size, config.num_stripes) == (ZetaConfig, 9, 3)


@dataclass(frozen=True, slots=True)
class Eye:
    size: int
    scale: float = 1.0


@dataclass(frozen=True)
class Zeta:
    vocab_size: int
    hidden_size: int = 12
    rate: float = 0.5
    limit: int | None = None
    eye: Eye | None = None
    kinds: list[str] = field(default_factory=list)
    name: str = "zeta"

    def __post_init__(self) -> None:
        if self.hidden_size % 2:
            raise ValueError("hidden_size must be even")

    @property
    def twice(self) -> int:
        return 2 * self.hidden_size


def test_a_dataclass_is_filled() -> None:
    values = {"vocab_size": 90, "rate": 2, "eye": {"size": 3, "colour": "red"}, "kinds": ["a"], "twice": 5, "more": [1]}
    config = make_config(Zeta, values | {"architectures": ["ZetaForCausalLM"], "dtype": "bfloat16"})
    assert isinstance(config, Zeta) and isinstance(config.eye, Eye)
    assert (config.vocab_size, config.hidden_size, config.limit, config.twice) == (90, 12, None, 24)
    assert (config.rate, type(config.rate)) == (2.0, float)
    assert (config.eye.size, config.eye.colour, config.kinds) == (3, "red", ["a"])
    assert (config.more, config.dtype, config.architectures) == ([1], "bfloat16", ["ZetaForCausalLM"])
    assert config.get_text_config() is config and not config.tie_word_embeddings
    assert copy.deepcopy(config).to_dict()["eye"] == {"size": 3, "scale": 1.0, "colour": "red"}
    assert getattr(config, "sliding_window", None) is None
    with pytest.raises(AttributeError, match=r"config\.json has no `rms_norm_eps`"):
        config.rms_norm_eps  # noqa: B018


def test_a_dataclass_with_a_language_model() -> None:
    @dataclass
    class Seeing:
        text_config: Zeta
        image_token_id: int = 5

    config = make_config(Seeing, {"text_config": {"vocab_size": 30}})
    assert config.get_text_config() is config.text_config
    assert (config.text_config.vocab_size, config.image_token_id) == (30, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 4}, r"config\.json has no `vocab_size`, which Zeta needs"),
        ({"vocab_size": "90"}, r"Zeta\.vocab_size must be an integer, not '90'"),
        ({"vocab_size": True}, r"Zeta\.vocab_size must be an integer, not True"),
        ({"vocab_size": 9, "rate": "fast"}, r"Zeta\.rate must be a number, not 'fast'"),
        ({"vocab_size": 9, "limit": 1.5}, r"Zeta\.limit must be an integer, not 1\.5"),
        ({"vocab_size": 9, "eye": {}}, r"config\.json has no `size`, which Eye needs"),
        ({"vocab_size": 9, "kinds": [1]}, r"Zeta\.kinds\[\] must be a text, not 1"),
        ({"vocab_size": 9, "name": None}, r"Zeta\.name must be a text, not None"),
    ],
)
def test_what_a_dataclass_does_not_take(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OwnConfigError, match=message):
        make_config(Zeta, values)


def test_what_a_dataclass_checks_itself_is_told() -> None:
    with pytest.raises(ValueError, match="hidden_size must be even"):
        make_config(Zeta, {"vocab_size": 9, "hidden_size": 3})


@pytest.mark.parametrize("wrong", ["ZetaConfig", dict, Zeta(1)])
def test_what_is_no_configuration_class(wrong: Any) -> None:
    with pytest.raises(OwnConfigError, match="must be a dataclass or a transformers configuration"):
        make_config(wrong, SIZES)


def test_a_part_may_stay_a_dict() -> None:
    assert GeneralConfig(**SIZES, generation_config={"top_p": 0.5}).generation_config == {"top_p": 0.5}
