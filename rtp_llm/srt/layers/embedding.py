"""Vocabulary tables, split by rows over tensor-parallel ranks."""

import torch
from torch import nn

from rtp_llm.srt.distributed.parallel_state import RankGroup, get_tp_group
from rtp_llm.srt.layers.quantization.base import EmbeddingMethodBase, PackedLayer, QuantizationConfig
from rtp_llm.srt.layers.quantization.unquantized import UnquantizedEmbeddingMethod
from rtp_llm.srt.layers.weights import ShardId, check_shape, make_parameter, refuse_shard


class VocabParallelEmbedding(PackedLayer):
    """[T] token ids -> [T, embedding_dim].

    Rank r has rows ``[r * n, (r + 1) * n)`` of the table with ``n = ceil(num_embeddings / ranks)``; rows past the
    vocabulary are zero. A model with tied embeddings uses the same object as its head. ``org_num_embeddings``: rows of
    the checkpoint's table, where it has fewer than ``num_embeddings``; the others are zero.

    Attributes:
        is_head: it computes logits; the loader sets this when the model is built.
    """

    quant_method: EmbeddingMethodBase
    bias: nn.Parameter | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp_group: RankGroup | None = None,
        org_num_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.org_num_embeddings = num_embeddings if org_num_embeddings is None else org_num_embeddings
        self.embedding_dim = embedding_dim
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.prefix = prefix
        self.name = prefix or type(self).__name__
        self.tp_group = tp_group or get_tp_group()
        self.num_embeddings_per_partition = -(-num_embeddings // self.tp_group.world_size)
        self.start_id = min(self.tp_group.rank * self.num_embeddings_per_partition, num_embeddings)
        self.end_id = min(self.start_id + self.num_embeddings_per_partition, num_embeddings)
        self.quant_method = _embedding_method(self, quant_config, prefix)
        self.quant_method.create_weights(
            self, self.num_embeddings_per_partition, embedding_dim, self.params_dtype, self.weight_loader
        )
        self.register_parameter("bias", None)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.tp_group.world_size == 1:
            return self.quant_method.embedding(self, input_ids)
        is_here = (input_ids >= self.start_id) & (input_ids < self.end_id)
        row_ids = torch.where(is_here, input_ids - self.start_id, 0)
        rows = self.quant_method.embedding(self, row_ids)
        return self.tp_group.all_reduce(rows.masked_fill(~is_here[..., None], 0))

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's rows of the whole table (or bias) ``tensor``, which is cut before it is copied."""
        refuse_shard(shard_id, self.name)
        check_shape(tensor, (self.org_num_embeddings, *param.shape[1:]), self.name)
        rows = tensor[self.start_id : self.end_id]
        num_rows = len(rows)
        param.data[:num_rows].copy_(rows)
        param.data[num_rows:].zero_()


class ParallelLMHead(VocabParallelEmbedding):
    """The output head of a model whose embeddings are not tied. ``LogitsProcessor`` multiplies with it."""

    is_head = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp_group: RankGroup | None = None,
        org_num_embeddings: int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, params_dtype, quant_config, prefix, tp_group, org_num_embeddings
        )
        if bias:
            data = torch.empty(self.num_embeddings_per_partition, dtype=self.params_dtype)
            self.bias = make_parameter(data, self.weight_loader, output_dim=0)

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> VocabParallelEmbedding:
        """Return the embedding, as the head of a model with tied embeddings; the head's bias becomes the embedding's.

        Use: ``self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)``.
        """
        embed_tokens.bias = self.bias
        return embed_tokens

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"{self.name} is an output head: pass it to LogitsProcessor instead of calling it")


def _embedding_method(
    layer: VocabParallelEmbedding, quant_config: QuantizationConfig | None, prefix: str
) -> EmbeddingMethodBase:
    method = quant_config.get_quant_method(layer, prefix) if quant_config else None
    if method is None:
        return UnquantizedEmbeddingMethod()
    if not isinstance(method, EmbeddingMethodBase):
        raise TypeError(f"{layer.name}: a vocabulary table needs an EmbeddingMethodBase, got {type(method).__name__}")
    return method
