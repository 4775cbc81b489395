"""Packed weights: the forms that products read. A layer packs its weight once, after loading, and keeps only this form.

The forms here are plain tensors with the products of ``reference.py``. A device may have others
(``DeviceProvider.pack_dense``, ``pack_int8`` ...).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F

from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.whole import whole

ROWS_AT_ONCE = 1024  # of a weight that is dequantized for a product


class Packed(ABC):
    """A packed weight of any kind."""

    @abstractmethod
    def tensors(self) -> Sequence[torch.Tensor]:
        """Return the tensors that it consists of."""

    def contents(self) -> dict[str, Any]:
        """Return what ``of_contents`` makes its equal of: tensors, packed weights, plain values, sequences of these."""
        if is_dataclass(self):
            return {field.name: getattr(self, field.name) for field in fields(self)}
        return dict(vars(self))

    @classmethod
    def of_contents(cls, contents: Mapping[str, Any]) -> Self:
        """Make one of what ``contents`` returned, without packing anything."""
        made = object.__new__(cls)
        for name, value in contents.items():
            object.__setattr__(made, name, value)  # of frozen ones, too
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())


class PackedWeight(Packed):
    """A weight of [N, K]."""

    @abstractmethod
    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """``x @ weight.T + bias``: [..., K] -> [..., N] in ``out_dtype``; None: in x's dtype."""

    def apply_into(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Write ``apply`` of [M, K] to ``out``, [M, N], which may be some columns of a wider tensor."""
        out.copy_(self.apply(x, bias, out.dtype))

    def empty_result(self, x: torch.Tensor, num_outputs: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate [M, num_outputs] for products with [M, K], where this weight has its results."""
        return torch.empty(len(x), num_outputs, dtype=dtype, device=x.device)

    def ends_in(self, activation: str) -> bool:
        """Whether ``apply_activated`` takes this activation, given by its kernel's name."""
        return False

    def apply_activated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        """[..., K] -> [..., N], or [..., N / 2] of a gated activation: ``apply``, then the activation, in one pass."""
        raise NotImplementedError(f"{type(self).__name__} has no products that end in {activation}")

    @abstractmethod
    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, K]: rows of the weight, in float32, or in the dtype of an unquantized weight."""

    def rows_in(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As ``rows``, in this dtype."""
        return self.rows(ids).to(dtype)

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """N."""


class PackedExperts(Packed):
    """A weight of [experts, N, K]."""

    @abstractmethod
    def apply(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute ``reference.grouped_linear``: rows of x are sorted by expert."""


class ExpertsOfWeights(PackedExperts):
    """Experts that are multiplied by the addresses of their own weights, which stay where they are."""

    def __init__(self, experts: Sequence[PackedWeight]) -> None:
        self.experts = experts

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for expert in self.experts for tensor in expert.tensors()]

    def contents(self) -> dict[str, Any]:
        return {"experts": self.experts}

    @classmethod
    def of_contents(cls, contents: Mapping[str, Any]) -> Self:
        return cls(contents["experts"])


@dataclass(frozen=True, slots=True, eq=False)
class PlainDense(PackedWeight):
    """An unquantized weight [N, K]."""

    weight: torch.Tensor

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return F.linear(x, self.weight, bias).to(out_dtype or x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)

    @property
    def num_rows(self) -> int:
        return len(self.weight)

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self.weight,)


@dataclass(frozen=True, slots=True, eq=False)
class PlainInt8(PackedWeight):
    """See ``reference.linear_int8``."""

    weight: torch.Tensor
    scales: torch.Tensor

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return reference.linear_int8(x, self.weight, self.scales, bias).to(out_dtype or x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].float() * self.scales[ids, None]

    @property
    def num_rows(self) -> int:
        return len(self.weight)

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self.weight, self.scales)


@dataclass(frozen=True, slots=True, eq=False)
class PlainGroups(PackedWeight):
    """Values of 4 or 8 bits in groups: see ``reference.linear_int4`` and ``linear_uint8``."""

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int
    bits: int

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        linear = reference.linear_int4 if self.bits == 4 else reference.linear_uint8
        outputs = []
        for start in range(0, len(self.weight), ROWS_AT_ONCE):
            piece = slice(start, start + ROWS_AT_ONCE)
            outputs.append(linear(x, *self._cut(piece), self.group_size, None if bias is None else bias[piece]))
        return torch.cat(outputs, dim=-1).to(out_dtype or x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        dequantize = reference.dequantize_int4 if self.bits == 4 else reference.dequantize_uint8
        return dequantize(*self._cut(ids), self.group_size)

    @property
    def num_rows(self) -> int:
        return len(self.weight)

    def _cut(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.weight[rows], self.scales[rows], None if self.zeros is None else self.zeros[rows]

    def tensors(self) -> Sequence[torch.Tensor]:
        return tuple(tensor for tensor in (self.weight, self.scales, self.zeros) if tensor is not None)


@dataclass(frozen=True, slots=True, eq=False)
class PlainCodes(PackedWeight):
    """float8_e4m3fn, or with a ``table`` codes of 4 bits: see ``reference.dequantize_fp8`` and ``dequantize_table``.
    Products are in float32."""

    weight: torch.Tensor
    scales: torch.Tensor
    group_size: int
    table: torch.Tensor | None = None

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        inputs, outputs = x.float(), []
        for start in range(0, len(self.weight), ROWS_AT_ONCE):
            outputs.append(F.linear(inputs, self._dequantized(slice(start, start + ROWS_AT_ONCE))))
        product = torch.cat(outputs, dim=-1)
        return (product if bias is None else product + bias.float()).to(out_dtype or x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self._dequantized(ids)

    def _dequantized(self, rows: slice | torch.Tensor) -> torch.Tensor:
        if self.table is None:
            weight = self.weight.view(torch.uint8)[rows].view(
                torch.float8_e4m3fn
            )  # torch indexes no fp8 on some devices
            return reference.dequantize_fp8(weight, self.scales[rows], self.group_size)
        return reference.dequantize_table(self.weight[rows], self.table, self.scales[rows], self.group_size)

    @property
    def num_rows(self) -> int:
        return len(self.weight)

    def tensors(self) -> Sequence[torch.Tensor]:
        return tuple(tensor for tensor in (self.weight, self.scales, self.table) if tensor is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Reordered(PackedWeight):
    """A weight whose columns are in another order: column i is that of input ``order[i]``."""

    packed: PackedWeight
    order: torch.Tensor  # [K] int64

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return self.packed.apply(x[..., self.order], bias, out_dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.packed.rows(ids)
        return torch.empty_like(rows).index_copy_(-1, self.order, rows)

    @property
    def num_rows(self) -> int:
        return self.packed.num_rows

    def tensors(self) -> Sequence[torch.Tensor]:
        return (*self.packed.tensors(), self.order)


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide(PackedWeight):
    """Weights with the same inputs, whose outputs follow one another; ``sizes``: number of outputs of each."""

    parts: Sequence[PackedWeight]
    sizes: Sequence[int]

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        inputs, sizes = x.reshape(-1, x.shape[-1]), list(self.sizes)
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        out = self.parts[0].empty_result(inputs, self.num_rows, out_dtype or x.dtype)
        for part, columns, own in zip(self.parts, out.split(sizes, dim=1), biases, strict=True):
            part.apply_into(inputs, columns, own)
        return out.view(*x.shape[:-1], self.num_rows)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        every = [part.rows(torch.arange(part.num_rows, device=ids.device)) for part in self.parts]
        return torch.cat(every)[ids]

    @property
    def num_rows(self) -> int:
        return sum(self.sizes)

    def tensors(self) -> Sequence[torch.Tensor]:
        return tuple(tensor for part in self.parts for tensor in part.tensors())


@dataclass(frozen=True, slots=True, eq=False)
class PlainExperts(PackedExperts):
    """Unquantized weights of experts, [experts, N, K]."""

    weight: torch.Tensor

    def apply(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return whole(reference.grouped_linear, x, self.weight, rows_per_expert, bias)

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self.weight,)


@dataclass(frozen=True, slots=True, eq=False)
class OneByOne(PackedExperts):
    """A packed weight for each expert, with one product for each expert that has rows."""

    experts: Sequence[PackedWeight]

    def apply(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return whole(self._one_by_one, x, rows_per_expert, bias)

    def _one_by_one(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        pieces = x.split(rows_per_expert.tolist())
        outputs = [
            weight.apply(piece, None if bias is None else bias[expert])
            for expert, (weight, piece) in enumerate(zip(self.experts, pieces, strict=True))
            if len(piece) or expert == 0
        ]
        return torch.cat(outputs)

    def tensors(self) -> Sequence[torch.Tensor]:
        return tuple(tensor for weight in self.experts for tensor in weight.tensors())
