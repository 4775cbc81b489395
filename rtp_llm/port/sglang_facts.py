"""What is known here about SGLang's engine; see ``facts.py``, which takes these tables in."""

from rtp_llm.port.answers import EMPTY, Const, Engine, Expression, Value

_OFF = Const(False)
_NONE = Const(None)
_TP_SIZE = Expression("get_tensor_model_parallel_world_size()")
_TP_RANK = Expression("get_tensor_model_parallel_rank()")

PARAMETERS: dict[str, Value] = {
    "alt_stream": _NONE,
    "pp_proxy_tensors": _NONE,
    "get_embedding": _OFF,
    "use_dp_attention_reduce": _OFF,
    "parallel_group": Const("tp"),
    "capture_output": _NONE,
    "captured_last_layer_outputs": _NONE,
    "should_allreduce_fusion": _OFF,
    "use_reduce_scatter": _OFF,
    "start_layer": Const(0),
    "is_nextn": _OFF,
    "support_shared_expert_fusion": _OFF,
    "enable_cuda_shared_expert_fusion": _OFF,
}

# Questions about the device and the process: what this engine answers to all of them.
QUESTIONS = (
    "is_npu", "is_cuda", "is_hip", "is_xpu", "is_cpu", "is_musa", "is_mps", "cpu_has_amx_support",
    "use_intel_amx_backend",
    "is_gfx95_supported", "is_flashinfer_available", "is_dp_attention_enabled", "get_is_capture_mode",
    "is_in_breakable_cuda_graph", "is_in_piecewise_cuda_graph", "get_bool_env_var", "uses_per_rank_fused_shared_slots",
    "is_deepep_class_backend", "check_cuda_graph_backend", "is_dense_ffn_fully_dp", "is_batch_invariant_mode_enabled",
    "should_use_flashinfer_cutlass_moe_fp4_allgather", "enable_moe_dense_fully_dp", "is_cuda_alike",
    "enable_fused_set_kv_buffer", "is_blackwell", "is_sm100_supported", "is_sm90_supported", "uses_cutedsl_ar_fusion",
    "is_routed_scaling_factor_fused_in_topk", "apply_flashinfer_allreduce_fusion", "is_shared_expert_fusion_enabled",
)  # fmt: skip

CALLS: dict[str, Value] = {
    **{name: _OFF for name in QUESTIONS},
    "get_parallel": Engine("parallel"),
    "get_exec": Engine("exec"),
    "get_global_server_args": Engine("server_args"),
    "get_server_args": Engine("server_args"),
    "get_moe_a2a_backend": Engine("moe_backend"),
    "get_moe_runner_backend": Engine("moe_backend"),
    "get_stream": _NONE,
    "get_attention_tp_size": _TP_SIZE,
    "get_attention_tp_rank": _TP_RANK,
    "get_attention_dp_size": Const(1),
    "get_local_attention_dp_size": Const(1),
    "get_moe_expert_parallel_world_size": Const(1),
    "get_num_fused_shared_experts": Const(0),
    "resolve_linear_parallel_group": Engine("linear_group"),
    "get_pp_indices": Engine("stage_indices"),
    "AuxHiddenStateList": Const(EMPTY),
    "AuxHiddenStateAccumulator": Const(EMPTY),
    "Pooler": Engine("pooler"),
    "CrossEncodingPooler": Engine("pooler"),
    "DualGemm": Engine("fused_kernels"),
    "DenseSiluAndMulQuant": Engine("fused_quant"),
    "get_global_expert_distribution_recorder": Engine("expert_recorder"),
}

ATTRIBUTES: dict[str, Value] = {
    "layers_to_capture": Const(EMPTY),
    "capture_aux_hidden_states": _OFF,
}

_ONE = (
    "pp_size",
    "moe_ep_size",
    "ep_size",
    "attn_dp_size",
    "attn_cp_size",
    "moe_dp_size",
    "attn_dcp_size",
    "dwdp_size",
)
_ZERO = ("pp_rank", "moe_ep_rank", "attn_dp_rank", "attn_cp_rank", "moe_dp_rank")
_NO = (
    "enable_dp_lm_head", "enable_dp_attention", "enable_prefill_cp", "enable_dense_mlp_attn_tp", "attn_dp_enabled",
    "enable_cp_tp_group_sharing",
)  # fmt: skip

PATHS: dict[str, Value] = {
    "parallel.pp_group": Engine("group"),
    "parallel.tp_size": _TP_SIZE,
    "parallel.tp_rank": _TP_RANK,
    "parallel.attn_tp_size": _TP_SIZE,
    "parallel.attn_tp_rank": _TP_RANK,
    "parallel.moe_tp_size": _TP_SIZE,
    "parallel.moe_tp_rank": _TP_RANK,
    **{f"parallel.{name}": Const(1) for name in _ONE},
    **{f"parallel.{name}": Const(0) for name in _ZERO},
    **{f"parallel.{name}": _OFF for name in _NO},
    **{f"server_args.{name}": _OFF for name in _NO},
    "exec.deterministic.rl_on_policy_target": _NONE,
    "exec.deterministic.enable_deterministic_inference": _OFF,
    "exec.moe.ep_num_redundant_experts": Const(0),
    "exec.moe.enable_eplb": _OFF,
    "exec.moe.disable_shared_experts_fusion": Const(True),
    "exec.moe.enforce_shared_experts_fusion": _OFF,
    "exec.kernel.enable_fused_qk_norm_rope": _OFF,
    "exec.kernel.attention_backend": _NONE,
    "server_args.attention_backend": _NONE,
    "server_args.rl_on_policy_target": _NONE,
    "server_args.ep_num_redundant_experts": Const(0),
    "server_args.disable_shared_experts_fusion": Const(True),
    "server_args.enable_fused_qk_norm_rope": _OFF,
    "server_args.moe_dense_tp_size": _NONE,
    "moe_backend.is_none()": Const(True),
    "fused_kernels.can_run()": _OFF,
    "envs.SGLANG_ENABLE_WEIGHT_LOADER_V2.get()": _OFF,
    "envs.SGLANG_EXPERIMENTAL_LORA_OPTI.get()": _OFF,
}

NEGATIVE = frozenset({"moe_backend", "envs"})

# Objects that go without a trace.
OBJECTS = frozenset({
    "parallel", "exec", "exec.moe", "exec.deterministic", "exec.kernel", "server_args", "moe_backend", "linear_group",
    "stage_indices", "pooler", "fused_kernels", "fused_quant", "expert_recorder",
})  # fmt: skip
