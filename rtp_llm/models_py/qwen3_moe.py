"""Qwen3-MoE (Qwen Team, 2025): Qwen3 with experts on most layers."""

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.models_py.qwen2_moe import QwenMoeDecoderLayer
from rtp_llm.models_py.qwen3 import Qwen3Attention
from rtp_llm.srt.gguf.form import GGUFForm


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    attention_type = Qwen3Attention
    layer_type = QwenMoeDecoderLayer
    gguf = GGUFForm("qwen3moe", defaults={"norm_topk_prob": True}, presence={"blk.0.attn_q.bias": "attention_bias"})


EntryClass = Qwen3MoeForCausalLM
