"""Tiny checkpoints keep the structure of the usual ones, and their weights make every part matter."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rtp_llm.tools.schedules import CHUNKED
from rtp_llm.tools.tiny_check import check_checkpoint
from rtp_llm.tools.tiny_checkpoint import NotMadeError, make_tiny_checkpoint, model_class_of
from rtp_llm.tools.tiny_config import NUM_EXPERTS, WINDOW, tiny_config


def test_layer_patterns_have_a_whole_period() -> None:
    config = tiny_config(transformers.Gemma3TextConfig)
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert config.num_hidden_layers == 6 and config.sliding_window == WINDOW


def test_shared_layers_keep_two_periods() -> None:
    config = tiny_config(transformers.Gemma3nTextConfig)
    assert config.layer_types == (["sliding_attention"] * 4 + ["full_attention"]) * 2
    assert config.num_kv_shared_layers == 5
    assert set(config.activation_sparsity_pattern) == {0.95, 0.0}


def test_first_dense_layers_stay_and_sparse_ones_follow() -> None:
    usual = transformers.DeepseekV3Config(num_hidden_layers=10, first_k_dense_replace=3).to_dict()
    config = tiny_config(transformers.DeepseekV3Config, usual)
    assert 0 < config.first_k_dense_replace < config.num_hidden_layers <= 5
    assert config.n_routed_experts == NUM_EXPERTS and config.n_group == 2 and config.topk_group == 1
    assert config.qk_nope_head_dim + config.qk_rope_head_dim == config.qk_head_dim == 24


@pytest.mark.parametrize(("heads", "kv_heads", "small"), [(32, 32, 4), (32, 8, 2), (32, 1, 1)])
def test_heads_share_keys_as_before(heads: int, kv_heads: int, small: int) -> None:
    given = transformers.LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads).to_dict()
    config = tiny_config(transformers.LlamaConfig, given)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, small)


def test_wide_heads_stay_wide() -> None:
    given = transformers.Qwen3Config(hidden_size=1024, num_attention_heads=16, head_dim=128).to_dict()
    config = tiny_config(transformers.Qwen3Config, given)
    assert config.head_dim * config.num_attention_heads > config.hidden_size


def test_heads_of_a_recurrent_state_fit() -> None:
    config = tiny_config(transformers.Mamba2Config)
    assert config.num_heads * config.head_dim == config.expand * config.hidden_size


def test_rotary_embeddings_fit_small_heads() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 48,
        "long_factor": [float(i) for i in range(48)],
        "original_max_position_embeddings": 4096,
    }
    given = transformers.Phi3Config(
        hidden_size=3072, max_position_embeddings=131072, rope_parameters=rope, partial_rotary_factor=1.0
    ).to_dict()
    config = tiny_config(transformers.Phi3Config, given)
    assert config.original_max_position_embeddings == config.rope_parameters["original_max_position_embeddings"] == 16
    half = config.hidden_size // config.num_attention_heads // 2
    assert len(config.rope_parameters["short_factor"]) == len(config.rope_parameters["long_factor"]) == half


def test_switches_factors_and_overrides_stay() -> None:
    given = transformers.GraniteConfig(residual_multiplier=0.22, attention_bias=True, hidden_size=2048).to_dict()
    config = tiny_config(transformers.GraniteConfig, given, {"num_hidden_layers": 2})
    assert config.residual_multiplier == 0.22 and config.attention_bias and config.num_hidden_layers == 2


def test_weights_make_every_part_matter(tmp_path: Path) -> None:
    make_tiny_checkpoint("DeepseekV3ForCausalLM", tmp_path, tokenizer=True)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 and len(tensor.unique()) > 1 for tensor in weights.values())
    assert any("e_score_correction_bias" in name for name in weights)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab cd").input_ids


def test_a_name_in_another_case_is_found() -> None:
    assert model_class_of("PhiMoEForCausalLM") is transformers.PhimoeForCausalLM
    assert model_class_of("NobodysForCausalLM") is None


def test_an_unknown_architecture_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(NotMadeError, match="has no model class NobodysForCausalLM"):
        make_tiny_checkpoint("NobodysForCausalLM", tmp_path)


def test_ours_agrees_on_a_tiny_checkpoint(tmp_path: Path) -> None:
    make_tiny_checkpoint("Gemma2ForCausalLM", tmp_path)
    found = check_checkpoint(tmp_path, (CHUNKED,))
    assert found.agrees, found.lines()
    assert found.lines()[0].startswith("chunked      agrees")
