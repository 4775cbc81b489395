"""What is known here about the other engine's state before anything runs: data for ``values.py``.

A model file asks its engine how it runs: on how many stages, with which caches, whether it drafts. In this engine the
answers are constants, or an expression of the constructor's ``config`` and ``quant_config``.
"""

from rtp_llm.port import sglang_facts
from rtp_llm.port.answers import EMPTY, ClassName, Const, Engine, Expression, Value

__all__ = ["BACKEND", "EMPTY", "ClassName", "Const", "Engine", "Expression", "Value", "is_backend", "is_part"]

# Whatever stands for the kernels that a layer of attention runs on: all that is asked of it gives the same again.
BACKEND = "attention_backend"

# Parameters that carry a part of the other engine, or an option of its own. They go, and arguments for them go too.
PARAMETERS: dict[str, Value] = {
    **sglang_facts.PARAMETERS,
    "vllm_config": Engine("vllm_config"),
    "cache_config": Engine("vllm_config.cache_config"),
    "model_config": Engine("vllm_config.model_config"),
    "parallel_config": Engine("vllm_config.parallel_config"),
    "scheduler_config": Engine("vllm_config.scheduler_config"),
    "compilation_config": Engine("vllm_config.compilation_config"),
    "multimodal_config": Engine("multimodal_config"),
    "attn_backend": Engine(BACKEND),
    "speculative_config": Const(None),
    "lora_config": Const(None),
    "is_lora_enabled": Const(False),
    "enable_eplb": Const(False),
    "num_redundant_experts": Const(0),
}

# The other engine's classes of such parameters, whatever the parameter is called.
TYPES: dict[str, Value] = {
    "VllmConfig": Engine("vllm_config"),
    "CacheConfig": Engine("vllm_config.cache_config"),
    "ModelConfig": Engine("vllm_config.model_config"),
    "ParallelConfig": Engine("vllm_config.parallel_config"),
    "SchedulerConfig": Engine("vllm_config.scheduler_config"),
    "CompilationConfig": Engine("vllm_config.compilation_config"),
    "MultiModalConfig": Engine("multimodal_config"),
    "AttentionBackendEnum": Engine(BACKEND),
    "SpeculativeConfig": Const(None),
    "LoRAConfig": Const(None),
}

# Calls of these give a part of the other engine.
CALLS: dict[str, Value] = {
    **sglang_facts.CALLS,
    "get_current_vllm_config": Engine("vllm_config", "current"),
    "get_current_vllm_config_or_none": Engine("vllm_config", "current"),
    "get_pp_group": Engine("group"),
    "get_ep_group": Engine("group"),
    "get_dp_group": Engine("group"),
    "get_eplb_group": Engine("group"),
    "get_pcp_group": Engine("group"),
    "get_dcp_group": Engine("group"),
    "spec_decode_needs_target_embed": Const(False),
    "is_pp_missing_parameter": Const(False),
    "get_pp_missing_layer_names": Const(EMPTY),
    "make_empty_intermediate_tensors_factory": Engine("intermediate_tensors_factory"),
    "get_attn_backend": Engine(BACKEND),
    "get_vit_attn_backend": Engine(BACKEND),
    "is_vit_use_data_parallel": Const(False),
    "get_multimodal_config": Engine("multimodal_config"),
    "init_logger": Expression("logging.getLogger(__name__)"),
    "has_flashinfer": Const(False),
    "resolve_layer_fused_shared_expert": Const(False),
    "is_model_fused_shared_expert_compatible": Const(False),
    "is_torch_equal_or_newer": Const(True),
    "get_quark_ocp_mx_group_size": Const(None),
}

# Numbers of the other engine.
NUMBERS: dict[str, Const] = {
    "PIN_MEMORY": Const(False),
    "HAS_TRITON": Const(False),  # what a file has beside its kernels is taken
    "OCP_MX_BLOCK_SIZE": Const(32),  # values with one scale, in the Open Compute Project's MX formats (2023)
}

# Methods of a module's base that capture hidden states for a drafter: what they return.
CAPTURES: dict[str, Value] = {
    "_maybe_add_hidden_state": Const(EMPTY),
    "maybe_add_hidden_state": Const(EMPTY),
    "collect_remote_aux_hidden_states": Const(EMPTY),
    "pack_local_aux_hidden_states": Const(EMPTY),
}

# Attributes of a module that the other engine sets.
ATTRIBUTES: dict[str, Value] = {
    **sglang_facts.ATTRIBUTES,
    "aux_hidden_state_layers": Const(EMPTY),
    "make_empty_intermediate_tensors": Engine("intermediate_tensors_factory"),
    "start_layer": Const(0),
    "do_not_compile": Const(True),
}

# Attributes of any module that only serve the passing between stages.
FACTORIES = frozenset({"make_empty_intermediate_tensors"})

_OFF = Const(False)

# Paths from an Engine, and the value at their end. ``{owner}`` is "self." or nothing. A path that is not here is an
# Engine still, and is told where it is left.
PATHS: dict[str, Value] = {
    **sglang_facts.PATHS,
    "FusedMoEParallelConfig.flatten_tp_across_dp_and_pcp()": Expression(
        "(get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank())"
    ),
    "group.is_first_rank": Const(True),
    "group.is_last_rank": Const(True),
    "group.world_size": Const(1),
    "group.rank": Const(0),
    "group.rank_in_group": Const(0),
    "group.local_rank": Const(0),
    "group.rank()": Const(0),
    "group.size()": Const(1),
    "group.device_group": Engine("group"),
    "current_platform.fp8_dtype()": Expression("torch.float8_e4m3fn"),
    "current_platform.device_type": Expression("torch.get_default_device().type"),
    "vllm_config.quant_config": Expression("{owner}quant_config"),
    "vllm_config.lora_config": Const(None),
    "vllm_config.speculative_config": Const(None),
    "vllm_config.kv_transfer_config": Const(None),
    "vllm_config.model_config.hf_config": Expression("{owner}config"),
    "vllm_config.model_config.hf_text_config": Expression("{owner}config.get_text_config()"),
    "vllm_config.model_config.get_text_config()": Expression("{owner}config.get_text_config()"),
    "vllm_config.model_config.dtype": Expression("torch.get_default_dtype()"),
    "vllm_config.model_config.head_dtype": Expression("torch.get_default_dtype()"),
    "vllm_config.model_config.max_model_len": Expression("{owner}config.max_position_embeddings"),
    "vllm_config.model_config.get_vocab_size()": Expression("{owner}config.vocab_size"),
    "vllm_config.model_config.get_hidden_size()": Expression("{owner}config.hidden_size"),
    "vllm_config.model_config.get_total_num_hidden_layers()": Expression("{owner}config.num_hidden_layers"),
    "vllm_config.model_config.get_num_layers()": Expression("{owner}config.num_hidden_layers"),
    "vllm_config.model_config.try_get_generation_config()": Expression("{{}}"),
    "vllm_config.model_config.override_generation_config": Expression("{{}}"),
    "vllm_config.model_config.pooler_config": Const(None),
    "vllm_config.model_config.multimodal_config": Engine("multimodal_config"),
    "multimodal_config.mm_encoder_tp_mode": Const("weights"),
    "multimodal_config.mm_encoder_attn_backend": Const(None),
    "multimodal_config.video_pruning_rate": Const(None),
    "multimodal_config.video_pruning_method": Const(None),
    "multimodal_config.get_video_pruning_spec()": Const(None),
    "multimodal_config.language_model_only": _OFF,
    "vllm_config.model_config.get_multimodal_config()": Engine("multimodal_config"),
    "vllm_config.model_config.is_multimodal_model": _OFF,
    "vllm_config.model_config.is_encoder_decoder": _OFF,
    "vllm_config.model_config.use_mla": Const(True),
    "vllm_config.model_config.quantization": Expression("{owner}quant_config and {owner}quant_config.get_name()"),
    "vllm_config.cache_config.sliding_window": Expression('getattr({owner}config, "sliding_window", None)'),
    "vllm_config.cache_config.kv_sharing_fast_prefill": _OFF,
    "vllm_config.cache_config.enable_prefix_caching": _OFF,
    "vllm_config.cache_config.cache_dtype": Const("auto"),
    "vllm_config.cache_config.mamba_cache_mode": Const("align"),
    "vllm_config.attention_config.backend": Const(None),
    "vllm_config.parallel_config.enable_eplb": _OFF,
    "vllm_config.parallel_config.enable_expert_parallel": _OFF,
    "vllm_config.parallel_config.use_sequence_parallel_moe": _OFF,
    "vllm_config.parallel_config.enable_dbo": _OFF,
    "vllm_config.parallel_config.dcp_q_replicate": _OFF,
    "vllm_config.parallel_config.eplb_config.num_redundant_experts": Const(0),
    "vllm_config.parallel_config.pipeline_parallel_size": Const(1),
    "vllm_config.parallel_config.data_parallel_size": Const(1),
    "vllm_config.parallel_config.prefill_context_parallel_size": Const(1),
    "vllm_config.parallel_config.decode_context_parallel_size": Const(1),
    "vllm_config.parallel_config.tensor_parallel_size": Expression("get_tensor_model_parallel_world_size()"),
    "vllm_config.scheduler_config.enable_chunked_prefill": Const(True),
}
# Objects of which every question, by how its name begins, has the answer no: about devices, compilation and switches.
QUESTIONS = ("is_", "has_", "support", "use_", "on_", "opaque_", "fast_", "pass_config", "enable_")
NEGATIVE = frozenset({
    "current_platform", "vllm_config.compilation_config", "rocm_aiter_ops", "_aiter_ops", "HpcRopeNorm", "vllm.envs",
    "envs", "server_args", "multimodal_config", "FusedMoEParallelConfig", *sglang_facts.NEGATIVE,
})  # fmt: skip

# Objects that are there whenever they are asked for.
OBJECTS = frozenset({
    *sglang_facts.OBJECTS,
    "vllm_config", "vllm_config.model_config", "vllm_config.cache_config", "vllm_config.parallel_config",
    "vllm_config.scheduler_config", "vllm_config.compilation_config", "group", BACKEND,
    "multimodal_config",
})  # fmt: skip

# Parts of the other engine that hold others, or that nothing here asks for.
PARTS = frozenset({
    "vllm_config.parallel_config.eplb_config", "vllm_config.attention_config", "vllm_config.device_config",
    "vllm_config.load_config", "vllm_config.kv_transfer_config",
    "intermediate_tensors_factory", *FACTORIES,
})  # fmt: skip


def is_backend(value: object) -> bool:
    """Whether a value stands for the kernels of attention."""
    return isinstance(value, Engine) and value.path == BACKEND


def is_part(value: object) -> bool:
    """Whether a value is an object of the other engine that goes without a trace; not a setting of it."""
    return isinstance(value, Engine) and (value.path in OBJECTS or value.path in PARTS)
