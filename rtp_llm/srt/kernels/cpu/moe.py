"""Mixtures of experts in bfloat16: rows sorted by expert, one product for all experts, and the weighted sum back."""

import functools
from collections.abc import Callable

import torch

from rtp_llm.srt.kernels.cpu.binding import INT, INT64, POINTER, address, bind
from rtp_llm.srt.kernels.cpu.linear import PANEL, PackedBFloat16


@functools.cache
def _function(name: str) -> Callable[..., int]:
    types = {
        "group_rows": (POINTER, INT64, INT64, POINTER, POINTER, POINTER),
        "gather_rows": (POINTER, INT64, POINTER, INT64, INT64, INT64, POINTER),
        "sum_rows": (POINTER, POINTER, POINTER, INT64, INT64, INT64, POINTER),
    }
    return bind("moe", name, *types[name], result=INT if name == "group_rows" else None)


@functools.cache
def _grouped_gemm() -> Callable[..., int]:
    return bind(
        "gemm", "grouped_gemm_bf16",
        POINTER, INT64, POINTER, INT64, POINTER, INT64, INT64, POINTER, POINTER, INT64,
    )  # fmt: skip


class PackedExperts:
    """weight: [groups, N, K] bfloat16, a linear layer for each group of rows; packed as ``PackedBFloat16`` each."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_groups, *shape = weight.shape
        self.shape = shape[0], shape[1]
        panels, units = -(-self.shape[0] // PANEL), -(-self.shape[1] // 2)
        self.packed = torch.empty(self.num_groups, panels, units, PANEL, 2, dtype=torch.bfloat16)
        for matrix, packed in zip(weight, self.packed, strict=True):
            packed.copy_(PackedBFloat16(matrix).packed)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def apply(self, x: torch.Tensor, starts: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As ``reference.grouped_linear``: [rows, K] -> [rows, N], of rows sorted by group.

        Args:
            starts: [groups + 1] int64: where each group's rows begin, and how many there are.
            bias: [groups, N].
        """
        if x.dtype != torch.bfloat16 or x.shape[1] != self.shape[1] or len(starts) != self.num_groups + 1:
            raise ValueError(
                f"experts {[self.num_groups, *self.shape]} take bfloat16 [rows, {self.shape[1]}] and "
                f"{self.num_groups + 1} starts, not {x.dtype} {list(x.shape)} and {len(starts)}"
            )
        x, bias = x.contiguous(), None if bias is None else bias.float().contiguous()
        out = torch.empty(x.shape[0], self.shape[0], dtype=torch.bfloat16)
        _grouped_gemm()(
            x.data_ptr(), x.shape[1], starts.data_ptr(), self.num_groups, self.packed.data_ptr(), *self.shape,
            address(bias), out.data_ptr(), out.shape[1],
        )  # fmt: skip
        return out


def group_rows(ids: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stable sort of ids [n] int64 by group.

    Returns:
        starts: [num_groups + 1]: where each group begins; order: [n]: which element is in each sorted place;
        places: [n]: in which place each element is.

    Raises:
        IndexError: an id is not in [0, num_groups).
    """
    ids = ids.contiguous()
    starts, order, places = torch.empty(num_groups + 1, dtype=torch.int64), *torch.empty(2, len(ids), dtype=torch.int64)
    pointers = starts.data_ptr(), order.data_ptr(), places.data_ptr()
    if not _function("group_rows")(ids.data_ptr(), len(ids), num_groups, *pointers):
        raise IndexError(f"experts must be in [0, {num_groups}), not {int(ids.min())} to {int(ids.max())}")
    return starts, order, places


def gather_rows(x: torch.Tensor, order: torch.Tensor, repeats: int) -> torch.Tensor:
    """``x[order // repeats]``, of x [rows, size] bfloat16."""
    x = x.contiguous()
    rows = torch.empty(len(order), x.shape[1], dtype=torch.bfloat16)
    _function("gather_rows")(
        x.data_ptr(), x.shape[1], order.data_ptr(), len(order), repeats, x.shape[1], rows.data_ptr()
    )
    return rows


def sum_rows(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """For each token the sum of ``weights[token, j] * rows[places[token * top_k + j]]``, rounded once.

    Args:
        rows: [tokens * top_k, size] bfloat16; places: [tokens * top_k]; weights: [tokens, top_k], taken in bfloat16.
    """
    weights = weights.float().contiguous()
    num_tokens, top_k = weights.shape
    out = torch.empty(num_tokens, rows.shape[1], dtype=torch.bfloat16)
    _function("sum_rows")(
        rows.data_ptr(), places.data_ptr(), weights.data_ptr(), num_tokens, top_k, rows.shape[1], out.data_ptr()
    )
    return out
