"""Weights whose products are Triton's. They are stored as the plain forms of ``kernels/packed.py`` are."""

from collections.abc import Sequence
from typing import TypeGuard

import torch

from rtp_llm.srt.devices.cuda.kernels import gpu, products
from rtp_llm.srt.devices.cuda.kernels.linear import Weight, fits, fits_fp8_rows, product, rounded_rows
from rtp_llm.srt.kernels.packed import OneByOne, PackedWeight, PlainCodes, PlainExperts, PlainGroups, PlainInt8


class TritonWeight(PackedWeight):
    """A weight that ``products.py`` multiplies."""

    __slots__ = ()

    def form(self) -> Weight:
        """Return it as the kernel takes it."""
        raise NotImplementedError

    def multiplied(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.Tensor:
        form = self.form()
        rows, row_scales = rounded_rows(x.reshape(-1, x.shape[-1]), form)
        return product(rows, form, bias, out_dtype or x.dtype, None, row_scales).view(*x.shape[:-1], self.num_rows)


class TritonInt8(PlainInt8, TritonWeight):
    """See ``reference.linear_int8``."""

    __slots__ = ()

    def form(self) -> Weight:
        return Weight(products.INT8.value, self.weight, self.scales)

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return self.multiplied(x, bias, out_dtype)


class TritonGroups(PlainGroups, TritonWeight):
    """See ``reference.linear_int4`` and ``linear_uint8``."""

    __slots__ = ()

    def form(self) -> Weight:
        code = products.NIBBLES.value if self.bits == 4 else products.BYTES.value
        return Weight(code, self.weight, self.scales, self.zeros, None, self.group_size)

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return self.multiplied(x, bias, out_dtype)


class TritonCodes(PlainCodes, TritonWeight):
    """See ``reference.dequantize_fp8`` and ``dequantize_table``. A table's numbers are rounded to the inputs' dtype."""

    __slots__ = ()

    def form(self) -> Weight:
        if self.table is None:
            numbers = self.weight.view(torch.uint8)
            return Weight(products.FP8.value, numbers, self.scales, None, None, self.group_size)
        return Weight(products.TABLE.value, self.weight, self.scales, None, self.table, self.group_size)

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return self.multiplied(x, bias, out_dtype)


class TritonFp8(TritonCodes):
    """See ``reference.linear_fp8``: rows become fp8, too, with a scale for each group of the weight's."""

    __slots__ = ()

    def form(self) -> Weight:
        numbers = self.weight.view(torch.uint8)
        return Weight(products.FP8_ROWS.value, numbers, self.scales, None, None, self.group_size)


def fp8_weight(weight: torch.Tensor, scales: torch.Tensor, group_size: int, rounds_inputs: bool) -> TritonCodes:
    """Return a weight in fp8 that multiplies rows in fp8, if it is to round them and this GPU gains by it."""
    rounds = rounds_inputs and gpu.multiplies_fp8() and fits_fp8_rows(weight.shape[1], group_size)
    return (TritonFp8 if rounds else TritonCodes)(weight, scales, group_size)


def or_plain(weight: PackedWeight, plain: PackedWeight) -> PackedWeight:
    """Return the weight if the kernel can multiply it, else the plain one."""
    return weight if isinstance(weight, TritonWeight) and fits(weight.form()) else plain


def _offsets(tensors: Sequence[Sequence[torch.Tensor | None]]) -> torch.Tensor:
    """[3, groups]: where each group's tensors begin, in elements from the first group's."""
    rows = []
    for of_kind in tensors:
        first = of_kind[0]
        start = 0 if first is None else first.data_ptr()
        size = 1 if first is None else first.element_size()
        rows.append([0 if tensor is None else (tensor.data_ptr() - start) // size for tensor in of_kind])
    return torch.tensor(rows)


class TritonExperts(OneByOne):
    """The experts' own weights, all of one form and shape, multiplied in one launch."""

    def __init__(self, experts: Sequence[TritonWeight]) -> None:
        super().__init__(experts)
        forms = [expert.form() for expert in experts]
        first = forms[0]
        offsets = _offsets([[f.numbers for f in forms], [f.scales for f in forms], [f.zeros for f in forms]])
        offsets = offsets.to(first.numbers.device)
        form = Weight(first.code, first.numbers, first.scales, first.zeros, first.table, first.group_size, offsets)
        object.__setattr__(self, "form", form)

    form: Weight

    @staticmethod
    def are_alike(experts: Sequence[PackedWeight]) -> TypeGuard[Sequence[TritonWeight]]:
        """Whether a launch can multiply these."""
        kernels = [expert for expert in experts if isinstance(expert, TritonWeight)]
        if len(kernels) < len(experts) or not all(fits(expert.form()) for expert in kernels):
            return False
        kinds = {(f.code, f.numbers.shape, f.group_size, f.zeros is None) for f in (one.form() for one in kernels)}
        aligned = all(one.form().numbers.data_ptr() % 16 == 0 for one in kernels)
        forms = [one.form() for one in kernels]
        tables = {None if form.table is None else tuple(form.table.tolist()) for form in forms}
        return len(kinds) == 1 and aligned and len(tables) == 1

    def apply(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows, row_scales = rounded_rows(x, self.form)
        return product(rows, self.form, bias, x.dtype, rows_per_expert, row_scales)


class TritonDenseExperts(PlainExperts):
    """Unquantized weights of experts, [experts, N, K]."""

    def apply(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return product(x, self.form(), bias, x.dtype, rows_per_expert)

    def form(self) -> Weight:
        starts = torch.arange(len(self.weight), device=self.weight.device) * self.weight[0].numel()
        offsets = torch.stack([starts, torch.zeros_like(starts), torch.zeros_like(starts)])
        return Weight(products.DENSE.value, self.weight[0], offsets=offsets)
