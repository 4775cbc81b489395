"""CPUs: C++ kernels if there is a compiler, otherwise the reference's."""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module

import torch

from rtp_llm.srt.device.packed_files import PackedFiles
from rtp_llm.srt.device.provider import Kernel
from rtp_llm.srt.devices.cpu import codes, exchange, linear, memory, moe, threads
from rtp_llm.srt.devices.cpu.blocks import NUMBERS, BlockExperts, BlockPanels, int4_panels
from rtp_llm.srt.devices.cpu.build import cache_folder, compile_ahead, isa, kernels_work, library_id
from rtp_llm.srt.devices.cpu.memory import Arena, take_in_background
from rtp_llm.srt.devices.cpu.timing import timed_kernels
from rtp_llm.srt.devices.reference.provider import ReferenceProvider
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.packed import PackedExperts, PackedWeight
from rtp_llm.srt.utils.stopwatch import Stopwatch

DTYPES = (torch.float32, torch.bfloat16)  # that all kernels read and write
HALVES = (torch.bfloat16, torch.float16)
PANELS: dict[torch.dtype, Callable[[torch.Tensor], PackedWeight]] = {
    torch.float32: linear.Float32Panels,
    torch.bfloat16: linear.BFloat16Panels,
    torch.float16: linear.Float16Panels,
}
LEAST_OF_FLOAT32 = 1 << 16  # numbers of a weight that is packed
MODULES_OF_FLOAT16 = ("elementwise", "moe")  # whose kernels take it
KERNELS: dict[str, str] = {  # kernel -> module of this folder
    "rms_norm": "elementwise",
    "gemma_rms_norm": "elementwise",
    "layer_norm": "elementwise",
    "add_rms_norm": "elementwise",
    "add_gemma_rms_norm": "elementwise",
    "add_layer_norm": "elementwise",
    "silu_and_mul": "elementwise",
    "gelu_and_mul": "elementwise",
    "gelu_tanh_and_mul": "elementwise",
    "swiglu_oai_and_mul": "elementwise",
    "rotary_pair": "elementwise",
    "norm_rotary_pair": "elementwise",
    "causal_conv1d": "recurrent",
    "delta_gates": "recurrent",
    "gated_delta_rule": "recurrent",
    "linear_attention": "recurrent",
    "ssd": "recurrent",
    "selective_scan": "recurrent",
    "linear_recurrence": "recurrent",
    "gated_rms_norm": "recurrent",
    "sigmoid_gate": "recurrent",
    "quantize_rows": "quantizing",
    "quantize_int4": "quantizing",
    "argmax": "sampling",
    "draw": "sampling",
    "mask_tokens": "sampling",
    "group_rows": "moe",
    "gather_rows": "moe",
    "sum_rows": "moe",
}
# Kernel files beyond the usual ones, by module.
LIBRARIES = {"recurrent": ("state_matrix", "recurrent"), "moe": ("moe",)}
LIBRARIES_OF_DTYPES = {  # of models -> kernel files beyond the usual ones, which are bfloat16's
    torch.float32: ("attention_f32", "elementwise_f32"),
    torch.float16: ("attention_f16", "elementwise_f16"),
}
LIBRARIES_OF_PLAIN_WEIGHTS = {torch.bfloat16: ("gemm",), torch.float16: ("gemm_f16",)}
QUANTIZE_HEADS = ("int8", "int4", "gguf")  # schemes after which no weight of 16 bits is multiplied, mostly
LIBRARIES_OF_WEIGHTS = {  # quantization scheme -> kernel files of its products
    "int8": ("gemm_int8", "quantizing"),
    "int4": ("gemm_blocks", "gemm_int8", "quantizing"),
    "gguf": ("gemm_blocks",),
    "gptq": ("gemm_blocks",),
    "awq": ("gemm_blocks",),
    "mxfp4": ("gemm_blocks",),
    "compressed-tensors": ("gemm_blocks", "gemm_codes"),
    "fp8": ("gemm_codes",),
    "fbgemm_fp8": ("gemm_codes",),
    "modelopt": ("gemm_codes",),
    "bitsandbytes": ("gemm_codes",),
}
PACKING = (  # kernel files that quantize and pack
    "gemm", "gemm_int8", "gemm_f16", "gemm_f32", "gemm_blocks", "gemm_codes", "quantizing",
)  # fmt: skip
CACHE_TAKEN_AT_START_BYTES = 1 << 30


class CpuProvider(ReferenceProvider):
    whole_prompt_tokens = 1024  # with more, results of layers do not stay in the caches until they are read
    logit_bytes_at_once = 12 << 20  # 12 rows of a vocabulary of 262,144: slower by a tenth a row than 17 and more
    narrows_last_layer = True
    step_recorder = "rtp_llm.srt.devices.cpu.graphs:CpuGraphs"

    def share_memory(self, group: RankGroup, timeout_s: float) -> None:
        if sys.platform == "linux" and kernels_work():
            group.shared = exchange.share_memory(group, timeout_s)

    def use_threads(self, num_threads: int | None, pinned: bool, rank: int, world_size: int) -> None:
        super().use_threads(num_threads, pinned, rank, world_size)
        if kernels_work():
            threads.use_threads(torch.get_num_threads())
            threads.bind_threads(pinned, rank)

    def expect_weights(self, scheme: str | None) -> None:
        if not kernels_work():
            return
        dtype = torch.get_default_dtype()
        plain = () if scheme in QUANTIZE_HEADS else LIBRARIES_OF_PLAIN_WEIGHTS.get(dtype, ())
        of_scheme = () if scheme is None else LIBRARIES_OF_WEIGHTS.get(scheme, ())
        compile_ahead((*of_scheme, *plain, *LIBRARIES_OF_DTYPES.get(dtype, ())))

    def find(self, name: str, dtype: torch.dtype) -> Kernel | None:
        if name not in KERNELS or not kernels_work():
            return None
        if dtype not in DTYPES and not (dtype == torch.float16 and KERNELS[name] in MODULES_OF_FLOAT16):
            return None
        _compile_libraries_of(KERNELS[name])
        return getattr(import_module(f"{__package__}.{KERNELS[name]}"), name)

    def attention_backend(self, dtype: torch.dtype) -> str:
        if dtype not in (*DTYPES, torch.float16) or not kernels_work():
            return super().attention_backend(dtype)
        return "cpu"

    def pack_dense(self, weight: torch.Tensor) -> PackedWeight | None:
        """See DeviceProvider. Small weights in float32 stay as they are: torch is as fast with them."""
        form = PANELS.get(weight.dtype)
        if not weight.is_cpu or form is None or not _builds_for_kernels((*DTYPES, torch.float16)):
            return None
        return None if weight.dtype == torch.float32 and weight.numel() < LEAST_OF_FLOAT32 else form(weight)

    def pack_experts(self, weight: torch.Tensor) -> PackedExperts | None:
        return moe.ExpertPanels(weight) if _takes_experts(weight) else None

    def pack_int8(self, weight: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
        if weight.is_cpu and _builds_for_kernels((*DTYPES, torch.float16)):
            return linear.Int8Panels(weight, scales)
        return super().pack_int8(weight, scales)

    def pack_int4(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> PackedWeight:
        """Pack for kernels only for models in 16 bits: rows become bytes, and float32 would be lost. What does not fit
        into blocks, as groups of 8 do not, becomes the model's 16 bits, which takes four times the memory."""
        if weight.is_cpu and _builds_for_kernels(HALVES):
            panels = int4_panels(weight, scales, zeros, group_size)
            if panels is not None:
                return panels
            return _dense(reference.dequantize_int4(weight, scales, zeros, group_size))
        return super().pack_int4(weight, scales, zeros, group_size)

    def pack_uint8(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> PackedWeight:
        """Pack for models in 16 bits as signed integers; with zeros as numbers of 16 bits, in twice the memory."""
        if weight.is_cpu and _builds_for_kernels(HALVES):
            if zeros is None and codes.takes_groups(weight.shape[1], group_size):
                return codes.CodePanels(codes.Codes.INT8, weight ^ 128, scales, group_size)
            return _dense(reference.dequantize_uint8(weight, scales, zeros, group_size))
        return super().pack_uint8(weight, scales, zeros, group_size)

    def pack_blocks(self, blocks: torch.Tensor, block_type: str, num_inputs: int) -> PackedWeight:
        """Pack for kernels only for models in 16 bits, as ``pack_int4``."""
        if blocks.is_cpu and block_type in NUMBERS and _builds_for_kernels(HALVES):
            return BlockPanels(blocks, block_type, num_inputs)
        return super().pack_blocks(blocks, block_type, num_inputs)

    def group_experts(self, experts: Sequence[PackedWeight]) -> PackedExperts:
        if BlockExperts.are_alike(experts):
            return BlockExperts(experts)
        return moe.Int8Experts(experts) if moe.Int8Experts.are_alike(experts) else super().group_experts(experts)

    def pack_fp8(
        self, weight: torch.Tensor, scales: torch.Tensor, group_size: int, rounds_inputs: bool = False
    ) -> PackedWeight:
        if _takes_codes(weight, weight.shape[1], group_size):
            return codes.fp8_panels(weight, scales, group_size)
        return super().pack_fp8(weight, scales, group_size, rounds_inputs)

    def pack_table(
        self, weight: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> PackedWeight:
        """Pack for kernels only for models in 16 bits: the table's numbers are rounded to bfloat16."""
        if _takes_codes(weight, 2 * weight.shape[1], group_size):
            return codes.CodePanels(codes.Codes.TABLE, reference.unpack_int4(weight), scales, group_size, table)
        return super().pack_table(weight, table, scales, group_size)

    def packed_files(self) -> PackedFiles | None:
        if not kernels_work():
            return None
        folder = cache_folder("RTP_LLM_PACKED_CACHE", "packed")
        return PackedFiles(folder, isa(), tuple(map(library_id, PACKING)), memory.weights.empty)

    def timed_kernels(self, watch: Stopwatch) -> AbstractContextManager[None]:
        return timed_kernels(watch)

    def cache_allocator(self) -> Callable[..., torch.Tensor]:
        """Return an allocator of memory in huge pages, which the system provides at the first write."""
        return Arena().empty

    def take_cache(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the system provide the first gigabyte now, so that the first steps need not wait for it."""
        take_in_background(tensors, CACHE_TAKEN_AT_START_BYTES)


@functools.cache
def _compile_libraries_of(module: str) -> None:
    """Begin to compile kernel files that a layer of the model needs, and most models do not."""
    compile_ahead(LIBRARIES.get(module, ()))


def _dense(weight: torch.Tensor) -> PackedWeight:
    """Pack [N, K] float32 in the dtype of the model that is being built, of 16 bits."""
    if torch.get_default_dtype() == torch.float16:
        return linear.Float16Panels(weight.half())
    return linear.BFloat16Panels(weight.bfloat16())


def _takes_experts(weight: torch.Tensor) -> bool:
    models = {torch.bfloat16: DTYPES, torch.float16: (torch.float16,)}.get(weight.dtype)
    return weight.is_cpu and models is not None and _builds_for_kernels(models)


def _takes_codes(weight: torch.Tensor, num_inputs: int, group_size: int) -> bool:
    return weight.is_cpu and codes.takes_groups(num_inputs, group_size) and _builds_for_kernels(HALVES)


def _builds_for_kernels(dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a model in one of these dtypes is being built, for kernels that compile."""
    return torch.get_default_dtype() in dtypes and kernels_work()
