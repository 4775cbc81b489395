"""SGLang's files as input: each rule on a file of these tests' own writing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rtp_llm.port.porter import Ported, port
from rtp_llm.tools.tiny_check import check_file

SOURCE = "RTP_LLM_SGLANG_SOURCE"  # the folder of an unpacked sglang that has sglang/srt/models
HEAD = """
import torch
from torch import nn
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.activation import GeluAndMul
from sglang.srt.layers.layer_boundary import append_stages, declare_attn, declare_ffn
from sglang.srt.layers.layer_boundary.residual import batch as stream
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.utils import PPMissingLayer, get_layer_id
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix, is_cuda, make_pp_layers
from sglang.srt.utils.hf_transformers_utils import get_rope_config

_on_card = is_cuda()
"""
WHOLE = """
class FerryAttention(nn.Module):
    def __init__(self, config, layer_id, quant_config=None, prefix="", alt_stream=None):
        super().__init__()
        tp_size = get_parallel().tp_size
        heads = config.num_attention_heads
        self.head_dim = config.hidden_size // heads
        self.num_heads = heads // tp_size
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, heads, config.num_key_value_heads, bias=False,
            quant_config=quant_config, prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, bias=False, reduce_results=False,
            quant_config=quant_config, prefix=add_prefix("o_proj", prefix),
        )
        theta, scaling = get_rope_config(config)
        self.rotary_emb = get_rope(
            self.head_dim, rotary_dim=int(self.head_dim * getattr(config, "partial_rotary_factor", 1)),
            max_position=config.max_position_embeddings,
            base=theta, rope_scaling=scaling,
        )
        self.attn = RadixAttention(
            self.num_heads, self.head_dim, self.head_dim**-0.5, num_kv_heads=self.num_kv_heads, layer_id=layer_id,
            logit_cap=getattr(config, "cap", None), prefix=add_prefix("attn", prefix),
        )

    def forward(self, positions, hidden_states, forward_batch: ForwardBatch):
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        if _on_card:
            q = q.contiguous()
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
        return output


class FerryMLP(nn.Module):
    def __init__(self, config, quant_config=None, prefix="", reduce_results=True):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=False,
            quant_config=quant_config, prefix=add_prefix("gate_up_proj", prefix),
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, reduce_results=reduce_results,
            quant_config=quant_config, prefix=add_prefix("down_proj", prefix),
        )
        self.act_fn = GeluAndMul()

    def forward(self, x, forward_batch=None):
        gate_up, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(gate_up), forward_batch=forward_batch)
        return x


class FerryLayer(nn.Module):
    def __init__(self, config, layer_id, quant_config=None, prefix=""):
        super().__init__()
        self.self_attn = FerryAttention(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.mlp = FerryMLP(config, quant_config, add_prefix("mlp", prefix), reduce_results=False)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm.fuse_input_quant(self.self_attn.qkv_proj)
        first, second = self.stage_facts(config, layer_id)
        self.attn_boundary, self.ffn_boundary = append_stages(
            (first, self.input_layernorm), (second, self.post_attention_layernorm)
        )

    @staticmethod
    def stage_facts(config, layer_id):
        return declare_attn(), declare_ffn(sparse=False, next_layer_sparse=False)

    def forward(self, positions, hidden_states, forward_batch):
        hidden_states = self.attn_boundary.prepare(hidden_states, forward_batch)
        hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states = self.attn_boundary.finish(hidden_states, forward_batch)
        hidden_states = self.ffn_boundary.prepare(hidden_states, forward_batch)
        hidden_states = self.mlp(hidden_states, forward_batch=forward_batch)
        return self.ffn_boundary.finish(hidden_states, forward_batch)


class FerryModel(nn.Module):
    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__()
        self.pp_group = get_parallel().pp_group
        if self.pp_group.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=add_prefix("embed_tokens", prefix)
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.layers, self.start_layer, self.end_layer = make_pp_layers(
            config.num_hidden_layers,
            lambda idx, prefix: FerryLayer(config, idx, quant_config, prefix),
            pp_rank=self.pp_group.rank_in_group,
            pp_size=self.pp_group.world_size,
            prefix=add_prefix("layers", prefix),
            stage_facts=lambda idx: FerryLayer.stage_facts(config, idx),
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids, positions, forward_batch, input_embeds=None, pp_proxy_tensors=None):
        if self.pp_group.is_first_rank:
            hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
            stream.start(forward_batch)
        else:
            hidden_states = pp_proxy_tensors["hidden_states"]
        for i in range(self.start_layer, self.end_layer):
            hidden_states = self.layers[i](positions, hidden_states, forward_batch)
        if not self.pp_group.is_last_rank:
            return stream.to_pp(hidden_states, forward_batch)
        return stream.final_norm(hidden_states, forward_batch, self.norm)


class FerryForCausalLM(nn.Module):
    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__()
        self.config = config
        self.model = FerryModel(config, quant_config, add_prefix("model", prefix))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=add_prefix("lm_head", prefix))
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids, positions, forward_batch, input_embeds=None, pp_proxy_tensors=None):
        hidden_states = self.model(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors=pp_proxy_tensors
        )
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch, None)

    def load_weights(self, weights):
        stacked_params_mapping = [
            ("qkv_proj", "q_proj", "q"),
            ("qkv_proj", "k_proj", "k"),
            ("qkv_proj", "v_proj", "v"),
            ("gate_up_proj", "gate_proj", 0),
            ("gate_up_proj", "up_proj", 1),
        ]
        params_dict = dict(self.named_parameters())
        for name, loaded_weight in weights:
            layer_id = get_layer_id(name)
            if layer_id is not None and hasattr(self.model, "start_layer") and layer_id >= self.model.end_layer:
                continue
            for param_name, weight_name, shard_id in stacked_params_mapping:
                if weight_name in name:
                    param = params_dict[name.replace(weight_name, param_name)]
                    param.weight_loader(param, loaded_weight, shard_id)
                    break
            else:
                param = params_dict[name]
                getattr(param, "weight_loader", default_weight_loader)(param, loaded_weight)


EntryClass = FerryForCausalLM
"""
MOE = """
class FerryMoE(nn.Module):
    def __init__(self, config, layer_id, quant_config=None, prefix=""):
        super().__init__()
        self.tp_size = get_parallel().tp_size
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts, bias=False)
        self.topk = TopK(top_k=config.top_k, layer_id=layer_id, renormalize=False, correction_bias=self.bias)
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=config.num_experts, top_k=config.top_k, layer_id=layer_id, hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size, quant_config=quant_config, prefix=add_prefix("experts", prefix),
        )

    def forward(self, x):
        logits, _ = self.gate(x)
        output = self.experts(x, self.topk(x, logits))
        {sum}
        return output


class FerryForCausalLM(nn.Module):
    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__()
        self.mlp = FerryMoE(config, 0, quant_config, prefix)


EntryClass = [FerryForCausalLM]
"""

Porter = Callable[[str], Ported]


@pytest.fixture
def ported(tmp_path: Path) -> Porter:
    folder = tmp_path / "sglang" / "srt" / "models"
    folder.mkdir(parents=True)

    def run(text: str) -> Ported:
        (folder / "ferry.py").write_text(HEAD + text)
        return port(folder / "ferry.py")

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ported:
    path = tmp_path_factory.mktemp("models") / "ferry.py"
    path.write_text(HEAD + WHOLE)
    return port(path)


def test_a_whole_file_is_ported_and_agrees_with_transformers(whole: Ported, tmp_path: Path):
    result = whole
    assert result.report.is_complete and result.report.architectures == ("FerryForCausalLM",)
    path = tmp_path / "ferry_ported.py"
    path.write_text(result.text)
    given = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
    }
    check = check_file(path, "LlamaForCausalLM", given, ("one by one",), "FerryForCausalLM", lengths=(9,))
    assert check.agrees, check.lines()


@pytest.mark.parametrize(
    "gone",
    ["sglang", "pp_", "is_cuda", "contiguous", "stage_facts", "fuse_input_quant", "PPMissingLayer",
     "reduce_results=False", "act_fn(gate_up), forward_batch", "start_layer", "alt_stream", "boundary"],
)  # fmt: skip
def test_what_belongs_to_the_engine_goes(whole: Ported, gone: str):
    assert gone in HEAD + WHOLE
    assert gone not in whole.text


@pytest.mark.parametrize(
    "ours",
    [
        "GeluAndMul()",  # the default is SGLang's
        "residual = hidden_states",
        "hidden_states = self.input_layernorm(hidden_states)",
        "hidden_states = residual + hidden_states",
        "return residual + hidden_states",
        "return self.norm(hidden_states)",
        "self.layers = make_layers(",
        "rotary_dim=int(self.head_dim * get_rope_config(config)[2])",
        "theta, scaling, _ = get_rope_config(config)",
        'logit_cap=(getattr(config, "cap", None)) or 0.0',
        "from rtp_llm.srt.layers.rotary import get_rope, get_rope_config",
        "self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)",
    ],
)
def test_what_is_of_another_form_here_is_rewritten(whole: Ported, ours: str):
    assert ours in whole.text


def test_experts_are_joined_with_their_routing(ported: Porter):
    text = ported(MOE.replace("{sum}", "")).text
    assert "self.topk" not in text and "output = self.experts(x, logits)" in text
    assert "self.experts = FusedMoEFactory(" in text
    assert "e_score_correction_bias=self.bias" in text and "renormalize=False" in text and "layer_id=" not in text


@pytest.mark.parametrize(("own", "given"), [("", False), ("output = tensor_model_parallel_all_reduce(output)", True)])
def test_experts_are_summed_over_ranks_once(ported: Porter, own: str, given: bool):
    assert ("reduce_results=False" in ported(MOE.replace("{sum}", own)).text) is given


def test_a_drafter_is_told(ported: Porter):
    text = WHOLE.replace("hidden_states = self.embed_tokens(input_ids)", "hidden_states = forward_batch.spec_info.x")
    [remark] = ported(text).report.not_portable
    assert "spec_info is of the model that this one drafts for" in remark.text


def test_a_stage_that_is_not_a_plain_sum_is_told(ported: Porter):
    report = ported(WHOLE.replace("return declare_attn(),", "return declare_attn(update=config.u),")).report
    assert not report.is_complete


def test_a_class_that_entry_class_does_not_name_is_left_out(ported: Porter):
    assert ported(WHOLE + "\n\nclass FerryDrafter(nn.Module):\n    pass\n").report.left_out == ("FerryDrafter",)


@pytest.mark.slow
@pytest.mark.skipif(SOURCE not in os.environ, reason=f"{SOURCE} does not name an unpacked sglang")
@pytest.mark.parametrize(
    ("name", "architecture"),
    [("llama", "LlamaForCausalLM"), ("olmo2", "Olmo2ForCausalLM"), ("mixtral", "MixtralForCausalLM")],
)
def test_files_of_sglang_agree_with_transformers(name: str, architecture: str, tmp_path: Path):
    torch.manual_seed(0)
    path = tmp_path / f"{name}.py"
    result = port(Path(os.environ[SOURCE]) / "sglang" / "srt" / "models" / f"{name}.py", architecture)
    path.write_text(result.text)
    check = check_file(path, architecture)
    assert result.report.is_complete and check.agrees, check.lines()
