"""StarCoder and SantaCoder (Ben Allal et al., 2023; Li et al., 2023): GPT-2 whose query heads share one key head."""

from typing import TYPE_CHECKING

from rtp_llm.models_py.gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2LMHeadModel, GPT2Model
from rtp_llm.models_py.gpt_neox import QKVByHeadLinear
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.linear import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class GPTBigCodeAttention(GPT2Attention):
    """Without ``multi_query`` each head has a key of its own. Softmax is in float32, whatever the fields on it say."""

    qkv_type = QKVByHeadLinear
    row_type = RowParallelLinear

    def num_kv_heads(self, config: "PretrainedConfig") -> int:
        return 1 if config.multi_query else config.num_attention_heads


class GPTBigCodeMLP(GPT2MLP):
    column_type = ColumnParallelLinear
    row_type = RowParallelLinear


class GPTBigCodeBlock(GPT2Block):
    attention_type = GPTBigCodeAttention
    mlp_type = GPTBigCodeMLP


class GPTBigCodeModel(GPT2Model):
    layer_type = GPTBigCodeBlock


class GPTBigCodeForCausalLM(GPT2LMHeadModel):
    base_model_type = GPTBigCodeModel
    gguf = GGUFForm(
        "starcoder",
        config={
            "context_length": "n_positions",
            "feed_forward_length": "n_inner",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
    )


EntryClass = GPTBigCodeForCausalLM
