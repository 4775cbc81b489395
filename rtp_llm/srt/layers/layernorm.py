"""The norms that vLLM's model files import by this name: those of ``norm.py``, and one that only its files use."""

import torch
from torch import nn

from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.layers.norm import GemmaRMSNorm, LayerNorm, RMSNorm
from rtp_llm.srt.layers.weights import ShardId, load_part, make_parameter, refuse_shard

__all__ = ["GemmaRMSNorm", "LayerNorm", "MiniMaxText01RMSNormTP", "RMSNorm"]


class MiniMaxText01RMSNormTP(nn.Module):
    """Root-mean-square norm over all heads of all ranks, of which each rank has a part; in float32, rounded once.

    Args:
        hidden_size: of all heads.
        weight_shard_world_size, weight_shard_rank: the weight is in so many parts, of which this rank has that one;
            None: as many as ranks. Fewer, where several ranks have the same key heads.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight_shard_world_size: int | None = None,
        weight_shard_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.tp_group = get_tp_group()
        self.num_parts = weight_shard_world_size or self.tp_group.world_size
        self.part = self.tp_group.rank if weight_shard_rank is None else weight_shard_rank
        self.variance_epsilon = eps
        self.weight = make_parameter(torch.ones(hidden_size // self.num_parts), self.weight_loader)

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, "norm of heads")
        load_part(param.data, tensor, 0, self.part, self.num_parts, "norm of heads")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, this rank's part of hidden_size] to the same shape and dtype."""
        x32 = x.float()
        # All heads are on equally many ranks, so the mean of the ranks' means is that of all heads.
        mean_square = self.tp_group.all_reduce(x32.square().mean(dim=-1, keepdim=True)) / self.tp_group.world_size
        return (x32 * torch.rsqrt(mean_square + self.variance_epsilon) * self.weight.float()).to(x.dtype)

    @staticmethod
    def forward_qkv(
        q_norm: "MiniMaxText01RMSNormTP",
        k_norm: "MiniMaxText01RMSNormTP",
        qkv: torch.Tensor,
        q_size: int,
        kv_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, q_size + 2 * kv_size] -> normed queries, normed keys, and values."""
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        return q_norm(q), k_norm(k), v
