"""Every architecture that GGUF has, served from a file as llama.cpp's converter writes it, against transformers.

Each case is a tiny checkpoint. Transformers answers from its folder; we answer from the GGUF that is made of it, and
know nothing of the folder. Weights are float32 in both, so ids must be equal and log-probabilities close.
"""

from functools import partial
from typing import Any

from gguf_conversions import CONVERSIONS
from parity import Case, disturb_correction_biases, disturb_layer_scalars
from rtp_llm.srt.configs.model_config import is_multimodal_model
from rtp_llm.srt.models.loader import FALLBACK
from rtp_llm.srt.models.registry import ModelRegistry

FULL, WINDOW = "full_attention", "sliding_attention"
ORIGINAL_LEN = 53  # of LongRoPE: no prompt grows past it, where transformers computes all keys anew


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters


def longrope(half: int) -> dict[str, Any]:
    factors = {
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [1.5 + 0.7 * i for i in range(half)],
    }
    return rope(rope_type="longrope", original_max_position_embeddings=ORIGINAL_LEN, **factors)


LINEAR = rope(rope_type="linear", factor=3.0)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
DEEPSEEK_YARN = YARN | dict(beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
LLAMA3 = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
CORRECTED = dict(scoring_func="sigmoid")  # what these checkpoints say, and transformers' classes leave out


# No GGUF has these, and why.
WITHOUT_GGUF = {
    "DeepseekV32ForCausalLM": "the package gguf does not know deepseek32 yet",
    "GPTJForCausalLM": "llama.cpp neither converts nor runs it",
    "OPTForCausalLM": "llama.cpp neither converts nor runs it",
    "PersimmonForCausalLM": "llama.cpp does not run it any more",
}

SlowCase = partial(Case, slow=True)
CASES = (
    Case("llama", "LlamaForCausalLM", dict(num_key_value_heads=1, rope_parameters=LLAMA3)),
    SlowCase("llama-tied-linear", "LlamaForCausalLM", dict(tie_word_embeddings=True, rope_parameters=LINEAR)),
    SlowCase("llama-biases-yarn", "LlamaForCausalLM", dict(attention_bias=True, mlp_bias=True, rope_parameters=YARN)),
    SlowCase("mistral", "MistralForCausalLM", dict(sliding_window=None, head_dim=24)),
    SlowCase("mixtral", "MixtralForCausalLM", dict(sliding_window=None)),
    SlowCase("internlm3", "InternLM3ForCausalLM", {}),
    SlowCase("apertus", "ApertusForCausalLM", dict(rope_parameters=LLAMA3)),
    SlowCase("bailing", "BailingMoeForCausalLM", dict(first_k_dense_replace=0, num_shared_experts=2)),
    SlowCase(
        "bailing-2",
        "BailingMoeV2ForCausalLM",
        dict(num_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5)
        | dict(use_qk_norm=True, partial_rotary_factor=0.5),
    ),
    SlowCase("bloom", "BloomForCausalLM", dict(seq_length=512)),
    SlowCase("cohere2", "Cohere2ForCausalLM", dict(sliding_window=7, logit_scale=0.25, rotary_pct=1.0)),
    Case(
        "deepseek-2",
        "DeepseekV2ForCausalLM",
        dict(rope_parameters=DEEPSEEK_YARN, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
        | dict(topk_method="group_limited_greedy", routed_scaling_factor=1.5),
    ),
    SlowCase("deepseek-2-lite", "DeepseekV2ForCausalLM", dict(q_lora_rank=None, topk_method="greedy")),
    SlowCase(
        "deepseek-3",
        "DeepseekV3ForCausalLM",
        CORRECTED
        | dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, rope_parameters=DEEPSEEK_YARN),
        edit=disturb_correction_biases,
    ),
    SlowCase(
        "glm4-moe-lite",
        "Glm4MoeLiteForCausalLM",
        CORRECTED | dict(first_k_dense_replace=1),
        edit=disturb_correction_biases,
    ),
    SlowCase("ernie4.5", "Ernie4_5ForCausalLM", {}),
    SlowCase("ernie4.5-moe", "Ernie4_5_MoeForCausalLM", dict(moe_k=3), edit=disturb_correction_biases),
    SlowCase("exaone4", "Exaone4ForCausalLM", dict(sliding_window=7, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    SlowCase(
        "exaone4-no-window",
        "Exaone4ForCausalLM",
        dict(sliding_window=None, sliding_window_pattern=None, layer_types=[FULL] * 4),
    ),
    SlowCase("falcon-7b", "FalconForCausalLM", dict(num_kv_heads=1)),
    SlowCase("falcon-40b", "FalconForCausalLM", dict(num_kv_heads=2, new_decoder_architecture=True)),
    Case("gpt2", "GPT2LMHeadModel", dict(n_ctx=512)),
    SlowCase("starcoder", "GPTBigCodeForCausalLM", {}),
    Case("gpt-neox", "GPTNeoXForCausalLM", dict(rotary_pct=0.25)),
    SlowCase("gpt-neox-one-by-one", "GPTNeoXForCausalLM", dict(rotary_pct=0.25, use_parallel_residual=False)),
    SlowCase(
        "gemma2",
        "Gemma2ForCausalLM",
        dict(sliding_window=7, query_pre_attn_scalar=16, attn_logit_softcapping=3.0, final_logit_softcapping=2.5),
    ),
    Case(
        "gemma3",
        "Gemma3ForCausalLM",
        dict(sliding_window=7, query_pre_attn_scalar=24, head_dim=24, num_hidden_layers=7)
        | dict(rope_parameters={WINDOW: rope(), FULL: LINEAR | dict(rope_theta=1e6)}),
    ),
    SlowCase(
        "gemma4",
        "Gemma4ForCausalLM",
        dict(layer_types=[WINDOW, FULL, WINDOW, FULL], num_kv_shared_layers=2, use_double_wide_mlp=True)
        | dict(global_head_dim=24, sliding_window=7, final_logit_softcapping=3.0),
        edit=disturb_layer_scalars,
    ),
    SlowCase(
        "gemma4-moe",
        "Gemma4ForCausalLM",
        dict(layer_types=[WINDOW, WINDOW, FULL], num_hidden_layers=3, sliding_window=16, hidden_size_per_layer_input=0)
        | dict(attention_k_eq_v=True, num_global_key_value_heads=1, global_head_dim=20, num_key_value_heads=4)
        | dict(enable_moe_block=True, num_experts=5, top_k_experts=3, moe_intermediate_size=36),
        edit=disturb_layer_scalars,
    ),
    SlowCase("glm4", "Glm4ForCausalLM", dict(rope_parameters=rope(partial_rotary_factor=0.5))),
    SlowCase(
        "glm4-moe",
        "Glm4MoeForCausalLM",
        dict(use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.7, head_dim=16),
        edit=disturb_correction_biases,
    ),
    Case("gpt-oss", "GptOssForCausalLM", dict(sliding_window=7, rope_parameters=YARN | dict(truncate=False))),
    SlowCase(
        "granite",
        "GraniteForCausalLM",
        dict(embedding_multiplier=6.0, attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=3.0),
    ),
    SlowCase("granite-moe", "GraniteMoeForCausalLM", dict(attention_multiplier=0.2, residual_multiplier=0.5)),
    SlowCase(
        "granite-moe-shared",
        "GraniteMoeSharedForCausalLM",
        dict(attention_multiplier=0.2, residual_multiplier=0.5, tie_word_embeddings=True),
    ),
    SlowCase("hunyuan", "HunYuanDenseV1ForCausalLM", {}),
    SlowCase(
        "hunyuan-moe",
        "HunYuanMoEV1ForCausalLM",
        dict(moe_intermediate_size=[96] * 4, num_shared_expert=[1] * 4, moe_topk=[3] * 4),
    ),
    SlowCase("internlm2", "InternLM2ForCausalLM", dict(rope_theta=500.0)),
    SlowCase("llama4", "Llama4ForCausalLM", dict(interleave_moe_layer_step=2)),
    SlowCase("minimax-2", "MiniMaxM2ForCausalLM", CORRECTED | dict(rotary_dim=8), edit=disturb_correction_biases),
    SlowCase("ministral3", "Ministral3ForCausalLM", {}),
    SlowCase("mpt", "MptForCausalLM", {}),
    SlowCase("nemotron", "NemotronForCausalLM", {}),
    SlowCase("olmo2", "Olmo2ForCausalLM", {}),
    SlowCase("olmo3", "Olmo3ForCausalLM", dict(sliding_window=7)),
    SlowCase("olmoe", "OlmoeForCausalLM", {}),
    SlowCase("phi2", "PhiForCausalLM", dict(intermediate_size=256, num_key_value_heads=4)),
    SlowCase(
        "phi3-longrope",
        "Phi3ForCausalLM",
        dict(original_max_position_embeddings=ORIGINAL_LEN, sliding_window=None)
        | dict(rope_parameters=longrope(6) | {"partial_rotary_factor": 0.75}),
    ),
    SlowCase("phi3", "Phi3ForCausalLM", dict(original_max_position_embeddings=512, sliding_window=None)),
    SlowCase(
        "phimoe",
        "PhimoeForCausalLM",
        dict(attention_bias=True, lm_head_bias=True, rope_parameters=longrope(8), sliding_window=None)
        | dict(original_max_position_embeddings=ORIGINAL_LEN),
    ),
    SlowCase("qwen2", "Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    Case("qwen2-moe", "Qwen2MoeForCausalLM", {}),
    SlowCase("qwen3", "Qwen3ForCausalLM", dict(head_dim=24)),
    SlowCase("qwen3-moe", "Qwen3MoeForCausalLM", dict(norm_topk_prob=True)),
    SlowCase("seed-oss", "SeedOssForCausalLM", {}),
    SlowCase("smollm3", "SmolLM3ForCausalLM", {}),
    SlowCase("stablelm", "StableLmForCausalLM", dict(use_qkv_bias=True)),
    SlowCase("stablelm-parallel", "StableLmForCausalLM", dict(use_parallel_residual=True, qk_layernorm=True)),
    SlowCase("starcoder2", "Starcoder2ForCausalLM", dict(sliding_window=None)),
)


def test_every_architecture_has_a_case() -> None:
    ours = {name for name in ModelRegistry.models.layers[-1] if not is_multimodal_model(name)} - {FALLBACK}
    asked = {case.architecture for case in CASES}
    assert asked == CONVERSIONS.keys()
    assert ours == asked | WITHOUT_GGUF.keys()
