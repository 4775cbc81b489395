"""One sequence through a model without pages or runner: attention over everything seen, kept in plain lists."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from rtp_llm.models_py import llama, mistral, qwen2, qwen3
from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch, ForwardMode, LogprobRow
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.layers.rotary import share_ropes

ENTRY_CLASSES = {module.EntryClass.__name__: module.EntryClass for module in (llama, mistral, qwen2, qwen3)}
SHARD_IDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}


class DenseAttention(AttentionBackend):
    """The cache of one sequence: per layer, all keys and values so far."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def plan(self, batch: ForwardBatch) -> None:
        pass

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionSpec,
        batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert k is not None and save_kv_cache
        v = k[..., : layer.v_head_dim] if layer.latent else v
        assert v is not None
        if layer.layer_id in self.kept:
            old_k, old_v = self.kept[layer.layer_id]
            k, v = torch.cat((old_k, k)), torch.cat((old_v, v))
        self.kept[layer.layer_id] = k, v
        start = batch.extend_prefix_lens_cpu[0]
        return reference.attention(q, k, v, layer.scaling, start, layer.window, layer.logit_cap, sinks).flatten(1)


def logprob_row(token_rows: list[int], targets: list[int], top_num: int = 0, chosen: Sequence[int] = ()) -> LogprobRow:
    rows, tokens, ids = (torch.tensor(values, dtype=torch.int64) for values in (token_rows, targets, chosen))
    return LogprobRow(0, rows, tokens, top_num, ids)


def make_batch(ids: list[int], start: int, prompt_len: int, backend: AttentionBackend | None = None) -> ForwardBatch:
    """Tokens ``[start, start + len(ids))`` of one sequence; samples from the last, asks for all prompt logprobs."""
    end = start + len(ids)
    targets = ids[1:]
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND if start < prompt_len else ForwardMode.DECODE,
        batch_size=1,
        input_ids=torch.tensor(ids),
        positions=torch.arange(start, end),
        req_pool_indices=torch.tensor([0]),
        seq_lens=torch.tensor([end]),
        extend_prefix_lens=torch.tensor([start]),
        extend_seq_lens=torch.tensor([len(ids)]),
        extend_start_loc=torch.tensor([0]),
        seq_lens_cpu=[end],
        extend_prefix_lens_cpu=[start],
        extend_seq_lens_cpu=[len(ids)],
        prompt_lens_cpu=[prompt_len],
        page_tables=[],
        out_cache_locs=[],
        kv_pool=None,  # type: ignore[arg-type]
        attn_backend=backend or DenseAttention(),
        sample_rows=torch.tensor([len(ids) - 1]),
        prompt_logprobs=[logprob_row(list(range(len(targets))), targets)] if targets else [],
    )


def run_step(model: nn.Module, batch: ForwardBatch) -> LogitsProcessorOutput:
    for module in model.modules():
        if hasattr(module, "prepare_for_forward"):
            module.prepare_for_forward(batch)
    with torch.inference_mode():
        return model(batch.input_ids, batch.positions, batch)


def build_model(model_dir: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a checkpoint directory with its weights, this rank's part of them."""
    config: Any = AutoConfig.from_pretrained(model_dir)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with share_ropes():
            model = ENTRY_CLASSES[config.architectures[0]](config)
    finally:
        torch.set_default_dtype(previous)
    params = dict(model.named_parameters())
    for name, tensor in checkpoint_tensors(model_dir):
        part = name.split(".")[-2]
        fused = [key for key, parts in model.packed_modules_mapping.items() if part in parts]
        param = params[name.replace(part, fused[0]) if fused else name]
        param.weight_loader(param, tensor, *([SHARD_IDS[part]] if fused else []))
    return model


def checkpoint_tensors(model_dir: str) -> Iterator[tuple[str, torch.Tensor]]:
    index = Path(model_dir, "model.safetensors.index.json")
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    for file in files:
        with safe_open(Path(model_dir, file), framework="pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
