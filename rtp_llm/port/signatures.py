"""Order of the positional parameters of vLLM's layers, so that calls can be written with keywords before renaming."""

SIGNATURES: dict[str, tuple[str, ...]] = {
    "Attention": (
        "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "use_alibi_sqrt", "cache_config",
        "quant_config", "logits_soft_cap", "per_layer_sliding_window", "prefix", "attn_type",
        "kv_sharing_target_layer_name", "mm_prefix_clamp_sliding_window", "attn_backend", "head_size_v",
    ),
    "LogitsProcessor": ("vocab_size", "org_vocab_size", "scale", "logits_as_input", "soft_cap"),
    "VocabParallelEmbedding": (
        "num_embeddings", "embedding_dim", "params_dtype", "org_num_embeddings", "padding_size", "quant_config",
        "prefix",
    ),
    "ParallelLMHead": (
        "num_embeddings", "embedding_dim", "bias", "params_dtype", "org_num_embeddings", "padding_size",
        "quant_config", "prefix",
    ),
    "ReplicatedLinear": (
        "input_size", "output_size", "bias", "skip_bias_add", "params_dtype", "quant_config", "prefix",
    ),
    "ColumnParallelLinear": (
        "input_size", "output_size", "bias", "gather_output", "skip_bias_add", "params_dtype", "quant_config",
        "prefix",
    ),
    "MergedColumnParallelLinear": (
        "input_size", "output_sizes", "bias", "gather_output", "skip_bias_add", "params_dtype", "quant_config",
        "prefix",
    ),
    "QKVParallelLinear": (
        "hidden_size", "head_size", "total_num_heads", "total_num_kv_heads", "bias", "skip_bias_add", "params_dtype",
        "quant_config", "prefix", "return_bias", "disable_tp", "v_head_size",
    ),
    "RowParallelLinear": (
        "input_size", "output_size", "bias", "input_is_parallel", "skip_bias_add", "params_dtype", "reduce_results",
        "quant_config", "prefix",
    ),
    "FusedMoEFactory": ("num_experts", "top_k", "hidden_size", "intermediate_size"),
    "GateLinear": ("input_size", "output_size", "bias", "out_dtype", "params_dtype"),
    "LayerNorm": ("hidden_size", "eps", "elementwise_affine", "bias", "dtype"),
    "RMSNorm": ("hidden_size", "eps", "var_hidden_size", "has_weight", "dtype"),
    "get_rope": (
        "head_size", "max_position", "is_neox_style", "rope_parameters", "dtype", "dual_chunk_attention_config",
    ),
    "MultiHeadLatentAttentionWrapper": (
        "hidden_size", "num_heads", "scale", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank",
        "kv_lora_rank", "mla_modules", "quant_config", "prefix",
    ),  # after cache_config has gone
    "QwenGatedDeltaNetAttention": ("config", "vllm_config", "prefix", "gqa_interleaved_layout", "reduce_results"),
    "OlmoHybridGatedDeltaNetAttention": ("config", "vllm_config", "prefix"),
    "make_layers": ("num_hidden_layers", "layer_fn", "prefix"),
}  # fmt: skip

# Layers that are given the whole configuration of the other engine.
WHOLE = frozenset(name for name, names in SIGNATURES.items() if "vllm_config" in names)

# How many leading arguments stay positional when a call is written with keywords.
POSITIONAL = 2

DROPPED_OF_SGLANG: dict[str, frozenset[str]] = {
    "VocabParallelEmbedding": frozenset({"use_attn_tp_group", "enable_tp", "use_presharded_weights"}),
    "ParallelLMHead": frozenset({"use_attn_tp_group", "use_presharded_weights"}),
    "RowParallelLinear": frozenset({"tp_rank", "tp_size", "use_presharded_weights"}),
    "ColumnParallelLinear": frozenset({"tp_rank", "tp_size", "use_presharded_weights"}),
    "MergedColumnParallelLinear": frozenset({"tp_rank", "tp_size", "use_presharded_weights"}),
    "QKVParallelLinear": frozenset({"tp_rank", "tp_size"}),
}

# Options that only steer the other engine: they go.
DROPPED: dict[str, frozenset[str]] = {
    "FusedMoEFactory": frozenset({
        "enable_eplb", "num_redundant_experts", "tp_size", "dp_size", "pcp_size", "is_sequence_parallel",
        "n_shared_experts", "fuse_shared_experts", "shared_expert_prefix", "router_logits_dtype",
        "shared_expert_gate", "reduce_results",
    }),
    "VocabParallelEmbedding": frozenset({"padding_size"}),
    "ParallelLMHead": frozenset({"padding_size"}),
    "MLAModules": frozenset({"indexer_rotary_emb", "topk_indices_buffer", "index_group_builder"}),
    "MultiHeadLatentAttentionWrapper": frozenset({
        "skip_topk", "non_causal_multi_token_decode", "allow_short_prefill_indexer_scoring_skip", "fuse_qkv_rmsnorm",
    }),
    "GateLinear": frozenset({"force_fp32_compute"}),
}  # fmt: skip
