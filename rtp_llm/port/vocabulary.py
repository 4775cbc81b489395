"""The other engine's names, and what stands for them here.

A name is looked up by itself, whatever module it was imported from: engines move their modules about, but do not give
one name two meanings.
"""

LAYERS = "rtp_llm.srt.layers"
# Layers that keep a state, and are called with the batch.
RECURRENT = (
    "MambaMixer", "MambaMixer2", "OlmoHybridGatedDeltaNetAttention", "QwenGatedDeltaNetAttention", "ShortConv",
)  # fmt: skip
PARALLEL = "rtp_llm.srt.distributed.parallel_state"

# Names with the same meaning and call here -> their module.
SAME: dict[str, str] = {
    name: module
    for module, names in {
        f"{LAYERS}.activation": (
            "SiluAndMul", "GeluAndMul", "get_act_fn", "get_act_and_mul_fn", "ReLUSquaredActivation", "NewGELU",
            "FastGELU", "QuickGELU", "SwigluOAIAndMul", "SiluAndMulWithClamp", "XIELU", "MulAndSilu",
            "FatreluAndMul", "SwigluStepAndMul", "GeluAndMulSparse",
        ),
        f"{LAYERS}.layernorm": ("RMSNorm", "GemmaRMSNorm", "LayerNorm", "RMSNormGated", "MiniMaxText01RMSNormTP"),
        f"{LAYERS}.mla": ("MLAModules", "MultiHeadLatentAttentionWrapper"),
        f"{LAYERS}.linear": (
            "ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "ReplicatedLinear",
            "RowParallelLinear", "GateLinear",
        ),
        f"{LAYERS}.rotary_embedding": ("get_rope", "set_default_rope_theta", "ApplyRotaryEmb"),
        f"{LAYERS}.vocab_parallel_embedding": ("ParallelLMHead", "VocabParallelEmbedding"),
        f"{LAYERS}.fused_moe": (
            "FusedMoE", "FusedMoEFactory", "SharedFusedMoE", "RoutedExperts", "fused_moe_make_expert_params_mapping",
            "activation_without_mul",
        ),
        f"{LAYERS}.attention": ("Attention", "ChunkedLocalAttention", "PrefillPrefixLMAttention"),
        f"{LAYERS}.encoder_attention": ("MMEncoderAttention",),
        f"{LAYERS}.recurrent": RECURRENT,
        f"{LAYERS}.input_norm": ("IdentityInputNorm", "build_mm_input_norm"),
        f"{LAYERS}.language_model": ("make_registered_model",),
        "rtp_llm.srt.multimodal.tensor_schema": ("TensorSchema", "TensorShape"),
        f"{LAYERS}.radix_attention": ("RadixAttention", "AttentionType", "model_window"),
        f"{LAYERS}.logits_processor": ("LogitsProcessor",),
        f"{LAYERS}.conv": ("Conv2dLayer", "Conv3dLayer"),
        f"{LAYERS}.quantization.base": ("QuantizationConfig",),
        f"{LAYERS}.auto_weights": ("AutoWeightsLoader", "WeightsMapper", "maybe_remap_kv_scale_name"),
        f"{LAYERS}.weights": (
            "set_weight_attrs", "default_weight_loader", "row_parallel_weight_loader", "sharded_weight_loader",
            "composed_weight_loader",
        ),
        "rtp_llm.srt.utils": ("extract_layer_index", "make_layers", "add_prefix", "cache_number"),
        PARALLEL: (
            "get_tensor_model_parallel_world_size", "get_tensor_model_parallel_rank", "get_tp_group",
            "tensor_model_parallel_all_reduce", "tensor_model_parallel_all_gather", "divide",
            "tensor_model_parallel_reduce_scatter", "split_tensor_along_last_dim",
        ),
    }.items()
    for name in names
}  # fmt: skip

# Attributes of layers by which the other engine steers how ranks share work: what sets them goes.
STEERING = frozenset({"reduce_commutative"})

# What describes the other engine itself. A class may not have these as bases here, and nothing is imported for them.
MARKERS = frozenset({
    "EagleModelMixin", "LocalArgmaxMixin", "SupportsEagle", "SupportsEagle3", "SupportsEagleBase", "SupportsLoRA",
    "SupportsPP", "SupportsQuant", "SupportsMultiModal", "SupportsMRoPE", "SupportsXDRoPE", "SupportsTranscription",
    "SupportsRealtime", "SupportsCrossEncoding", "SupportsScoreTemplate", "SupportsV0Only", "SupportsMultiModalPruning",
    "SupportsMambaPrefixCaching", "SupportsReplaySSM", "SupportsHCSP", "SupportsEncoderCudaGraph",
    "SupportsLateInteraction", "SupportsMultiModalEmbeddings", "MixtureOfExperts", "HasInnerState", "HasNoOps",
    "IsAttentionFree", "IsHybrid", "VllmModel", "VllmModelForTextGeneration", "VllmModelForPooling",
})  # fmt: skip

# Bases of modules with a method for each device; ``forward_native`` is the one in plain torch.
DEVICE_OPS = frozenset({"CustomOp", "PluggableLayer"})

# Decorators that tell the other engine how to compile or to register.
DECORATORS = frozenset({"support_torch_compile", "default_pooling_type", "attn_type", "ignore_torch_compile"})

# Methods and class attributes by which the other engine asks a model for things that this one does not ask for.
ENGINE_METHODS = frozenset({
    "make_empty_intermediate_tensors", "set_aux_hidden_state_layers", "_set_aux_hidden_state_layers",
    "get_eagle3_aux_hidden_state_layers", "get_eagle3_default_aux_hidden_state_layers", "set_eplb_state",
    "update_physical_experts_metadata", "set_moe_parameters", "extract_moe_parameters", "get_top_tokens",
    "compute_logits_local", "get_mamba_state_shape_from_config", "get_mamba_state_dtype_from_config",
    "get_mamba_state_copy_func", "sample", "get_mm_mapping", "get_num_mm_encoder_tokens",
    "get_num_mm_connector_tokens", "copy_inputs_before_cuda_graphs", "get_seqlen_agnostic_capture_inputs",
    "get_speech_to_text_config", "get_generation_prompt", "get_num_audio_tokens",
})  # fmt: skip
ENGINE_ATTRIBUTES = frozenset({
    "embedding_modules", "embedding_padding_modules", "fall_back_to_pt_during_load", "supports_lora", "supports_pp",
    "supported_lora_modules", "lora_skip_prefixes", "is_3d_moe_weight", "is_non_gated_moe", "has_own_lm_head",
    "has_own_embed_tokens", "supports_aux_hidden_states_over_pp", "is_pooling_model", "default_pooling_type",
    "default_seq_pooling_type", "default_tok_pooling_type", "quant_config_class", "has_inner_state", "is_hybrid",
    "is_attention_free", "supports_multimodal", "requires_raw_input_tokens", "supports_encoder_tp_data",
    "supports_eagle3", "supports_eagle", "lm_head_only", "aux_hidden_state_layers",
})  # fmt: skip

POOLING = "pooling models"
# Whole features that have no counterpart, so that what needs them cannot be ported by rules: name -> what is missing.
MISSING: dict[str, str] = {
    name: reason
    for reason, names in {
        "a recurrent layer of its own (write it anew on layers/mamba.py, delta_rule.py or causal_conv.py)": (
            "MambaBase", "LinearAttentionMetadata", "GDNAttentionMetadata", "GatedDeltaNetAttention",
            "KimiDeltaAttention", "KimiGatedDeltaNetAttention", "MiniMaxText01LinearAttention", "causal_conv1d_fn",
            "causal_conv1d_update", "BailingMoELinearAttention", "Mamba2Metadata",
        ),
        "latent attention without its wrapper (write it anew with a latent RadixAttention, as in deepseek_v2.py)": (
            "MLAAttention",
        ),
        "attention that is not causal": (
            "EncoderOnlyAttention", "CrossAttention",
        ),
        "attention with a window that keeps the prompt in sight": ("RSWAAttention",),
        POOLING: (
            "DispatchPooler", "Pooler", "as_embedding_model", "as_seq_cls_model", "pooler_for_token_classify",
        ),
        "kernels of the other engine": (
            "direct_register_custom_op", "_custom_ops", "triton", "tl",
        ),
    }.items()
    for name in names
}  # fmt: skip

# Contexts that only tell the other engine how to compile what is in them.
CONTEXTS = frozenset({"set_model_tag", "layer_stack", "gpu_sync_allowed", "get_global_expert_distribution_recorder"})

# Names that rules fold away or rewrite; what is left of them is told.
RULED = frozenset({
    "maybe_prefix", "PPMissingLayer", "IntermediateTensors", "VllmConfig", "CacheConfig", "ModelConfig",
    "ParallelConfig", "get_pp_group", "get_ep_group", "get_dp_group", "get_current_vllm_config", "init_logger",
    "make_empty_intermediate_tensors_factory", "is_pp_missing_parameter", "get_pp_missing_layer_names",
    "spec_decode_needs_target_embed",
    "cdiv", "round_up", "getattr_iter", "_ACTIVATION_REGISTRY", "maybe_remap_moe_expert_param_name",
    "get_current_vllm_config_or_none", "str_dtype_to_torch_dtype", "AttentionBackendEnum", "get_attn_backend",
    "PIN_MEMORY", "HAS_TRITON", "async_tensor_h2d", "get_vit_attn_backend", "is_vit_use_data_parallel",
    "get_multimodal_config",
    "remap_moe_expert_weights", "FusedMoEParallelConfig", "OCP_MX_BLOCK_SIZE",
    "MambaStateShapeCalculator", "MambaStateDtypeCalculator", "MambaStateCopyFuncCalculator", "MambaStateCopyFunc",
    "MambaStateShapes",
    "StageMissingLayer", "maybe_fused_act_quant", "init_vllm_registered_model",
})  # fmt: skip


def is_known(name: str) -> bool:
    """Whether a name of the other engine's has a meaning to the rules, so that its definition is not taken along."""
    known = (SAME, MISSING, MARKERS, DEVICE_OPS, DECORATORS, RULED)
    return any(name in names for names in known)


# SGLang's names of another call than vLLM's -> their module here.
OF_SGLANG: dict[str, str] = {
    "get_rope": f"{LAYERS}.rotary",
    "ForwardBatch": "rtp_llm.srt.forward_batch",
    "LogitsProcessorOutput": f"{LAYERS}.logits_processor",
}


def target(name: str, engine: str = "vllm") -> tuple[str, str] | None:
    """Return (module, name) of what stands for a name of the other engine; None if there is nothing."""
    if engine == "sglang" and name in OF_SGLANG:
        return OF_SGLANG[name], name
    return (SAME[name], name) if name in SAME else None
