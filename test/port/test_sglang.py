"""A file written for SGLang, of these tests' own writing: its conventions are ours, so little changes."""

import ast
from pathlib import Path

import pytest

from rtp_llm.port.porter import Ported, port

BOAT = """
from typing import Optional

import torch
from torch import nn
from transformers import LlamaConfig

from sglang.srt.distributed import get_pp_group, get_tensor_model_parallel_world_size
from sglang.srt.layers.activation import GeluAndMul
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.pooler import Pooler, PoolingType
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.utils import PPMissingLayer, get_layer_id
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.managers.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import add_prefix, is_cuda, make_layers

_is_cuda = is_cuda()


class BoatLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer_id: int = 0, prefix: str = "") -> None:
        super().__init__()
        self.rotary_emb = get_rope(
            8, rotary_dim=8, max_position=64, base=config.rope_theta, rope_scaling=getattr(config, "rope_scaling", None)
        )
        self.act = GeluAndMul()
        self.attn = RadixAttention(4, 8, 1.0, num_kv_heads=4, layer_id=layer_id, prefix=add_prefix("attn", prefix))

    def forward(self, positions: torch.Tensor, x: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        q, k = self.rotary_emb(positions, x, x)
        return self.attn(q, k, x, forward_batch)


class BoatModel(nn.Module):
    def __init__(self, config: LlamaConfig, quant_config: Optional[QuantizationConfig] = None, prefix: str = ""):
        super().__init__()
        self.pp_group = get_pp_group()
        if self.pp_group.is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, 32, enable_tp=True)
        else:
            self.embed_tokens = PPMissingLayer()
        self.layers, self.start_layer, self.end_layer = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: BoatLayer(config, idx, prefix),
            pp_rank=self.pp_group.rank_in_group,
            pp_size=self.pp_group.world_size,
            prefix=add_prefix("layers", prefix),
        )
        self.layers_to_capture = []

    def forward(self, input_ids, positions, forward_batch, input_embeds=None, pp_proxy_tensors=None):
        if self.pp_group.is_first_rank:
            x = self.embed_tokens(input_ids)
        else:
            x = pp_proxy_tensors["hidden_states"]
        captured = []
        for i in range(self.start_layer, self.end_layer):
            if i in self.layers_to_capture:
                captured.append(x)
            with get_global_expert_distribution_recorder().with_current_layer(i):
                x = self.layers[i](positions, x, forward_batch)
        if not self.pp_group.is_last_rank:
            return PPProxyTensors({"hidden_states": x})
        return x if len(captured) == 0 else (x, captured)


class BoatForCausalLM(nn.Module):
    def __init__(self, config: LlamaConfig, quant_config: Optional[QuantizationConfig] = None, prefix: str = ""):
        super().__init__()
        self.model = BoatModel(config, quant_config, add_prefix("model", prefix))
        self.lm_head = ParallelLMHead(
            config.vocab_size, 32, use_attn_tp_group=get_global_server_args().enable_dp_lm_head
        )
        self.logits_processor = LogitsProcessor(config)
        self.pooler = Pooler(pooling_type=PoolingType.LAST)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids, positions, forward_batch, input_embeds=None, get_embedding=False, pp_proxy_tensors=None
    ) -> LogitsProcessorOutput:
        x = self.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors=pp_proxy_tensors)
        if get_embedding:
            return self.pooler(x, forward_batch)
        return self.logits_processor(input_ids, x, self.lm_head, forward_batch)

    def get_embed_and_head(self):
        return self.model.embed_tokens.weight, self.lm_head.weight

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        for name, tensor in weights:
            layer_id = get_layer_id(name)
            if hasattr(self.model, "start_layer") and layer_id < self.model.start_layer:
                continue
            param = params[name]
            getattr(param, "weight_loader", default_weight_loader)(param, tensor)


EntryClass = BoatForCausalLM
"""


@pytest.fixture(scope="module")
def ported(tmp_path_factory: pytest.TempPathFactory) -> Ported:
    path = tmp_path_factory.mktemp("sglang") / "boat.py"
    path.write_text(BOAT)
    return port(path)


def test_it_is_known_by_its_imports_and_nothing_is_left(ported: Ported, tmp_path: Path):
    assert ported.report.is_complete, ported.report
    assert ported.report.architectures == ("BoatForCausalLM",)
    tops = {node.module.split(".")[0] for node in ast.walk(ast.parse(ported.text)) if isinstance(node, ast.ImportFrom)}
    assert tops == {"typing", "torch", "transformers", "rtp_llm"}
    assert "sglang" not in ported.text


def test_stages_pooling_and_captured_states_go(ported: Ported):
    for gone in (
        "pp_",
        "PPProxy",
        "start_layer",
        "captured",
        "pooler",
        "Recorder",
        "get_embed_and_head",
        "get_layer_id",
    ):
        assert gone not in ported.text, f"{gone}\n{ported.text}"
    assert "for i in range(0, len(self.layers)):" in ported.text


def test_rotary_settings_are_read_as_configurations_have_them_now(ported: Ported):
    assert "base=get_rope_config(config)[0]" in ported.text
    assert "rope_scaling=get_rope_config(config)[1]" in ported.text
    assert "from rtp_llm.srt.layers.rotary import get_rope, get_rope_config" in ported.text


def test_a_gelu_without_a_name_is_the_one_that_it_is_there(ported: Ported):
    assert "self.act = GeluAndMul()" in ported.text  # approximated by tanh, there and here


def test_the_entry_gives_its_embedding_and_keeps_its_loading(ported: Ported):
    assert "def get_input_embeddings(self) -> nn.Module:\n        return self.model.embed_tokens" in ported.text
    assert "def load_weights(self, weights):" in ported.text
    assert "attn_tp_group" not in ported.text and "enable_tp" not in ported.text
