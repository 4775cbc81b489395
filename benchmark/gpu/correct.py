"""Part a: kernels and attention beside the reference, models beside transformers, recorded steps beside others."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import AutoConfig

from benchmark.gpu.attention_cases import attention_cases, attention_error
from benchmark.gpu.machine import Machine, Row, Rows
from rtp_llm import Engine
from rtp_llm.srt.kernels import reference as kernels
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.adjust_table import Adjustment, AdjustTable, adjust_rows
from tiny_models import assert_same_ids, make_tiny, random_prompts, reference, tiny_model

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}  # absolute, for values of about 1
MODELS = ("llama-llama3-tied", "mistral-window7", "qwen2-mixed-window16", "qwen3-longrope-bias-gelu")
ARCHITECTURES = ("MixtralForCausalLM", "Gemma2ForCausalLM")
Make = Callable[[Callable[..., torch.Tensor]], tuple[Any, ...]]


def _rotary(randn: Callable[..., torch.Tensor]) -> tuple[Any, ...]:
    angles = randn(37, 32)
    return randn(37, 5, 64), randn(37, 2, 64), angles.cos(), angles.sin(), True


KERNELS: dict[str, Make] = {
    "rms_norm": lambda randn: (randn(37, 320), randn(320), 1e-6),
    "gemma_rms_norm": lambda randn: (randn(37, 320), randn(320), 1e-6),
    "layer_norm": lambda randn: (randn(37, 320), randn(320), randn(320), 1e-5),
    "add_rms_norm": lambda randn: (randn(37, 320), randn(37, 320), randn(320), 1e-6),
    "silu_and_mul": lambda randn: (randn(37, 640),),
    "gelu_and_mul": lambda randn: (randn(37, 640),),
    "gelu_tanh_and_mul": lambda randn: (randn(37, 640),),
    "rotary_pair": _rotary,
}


def check_correctness(machine: Machine) -> Rows:
    yield from check_kernels(machine)
    yield check_adjusted_logits(machine)
    yield from check_fp8(machine)
    yield from check_attention(machine)
    yield from check_models(machine)
    yield from check_graphs(machine)


def check_kernels(machine: Machine) -> Rows:
    """Kernels of the device's own in bfloat16, beside the reference in float32 on the same numbers."""
    for name, make in KERNELS.items():
        kernel = machine.provider.find(name, torch.bfloat16)
        if kernel is None:
            yield Row(f"{name}, bfloat16", "the device has none of its own")
            continue
        torch.manual_seed(0)
        arguments = make(lambda *shape: torch.randn(shape).to(machine.torch_device).bfloat16())
        expected = _tensors(getattr(kernels, name)(*(_as(x, torch.float32) for x in arguments)))
        found = _tensors(kernel(*arguments))
        error = max(
            ((ours.float() - theirs).abs() / theirs.abs().clamp(min=1)).max().item()
            for ours, theirs in zip(found, expected, strict=True)
        )
        yield Row(f"{name}, bfloat16", f"largest error {error:.1e}", error <= TOLERANCE["bfloat16"])


def check_adjusted_logits(machine: Machine) -> Row:
    """Penalties, biases, bans and masks by the device's kernel, beside plain torch's on the same device."""
    vocab_size = machine.pick(151936, 300)
    table = AdjustTable(4, vocab_size, machine.provider)
    everything = SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1, min_new_tokens=9,
        logit_bias={"3": 2.5, "299": -1.0}, bad_words_ids=[[7], [1, 2], [2, 9]],
    )  # fmt: skip
    prompt = [*range(0, 290, 3)]
    table.write({0: Adjustment(everything, prompt, [1, 2], [5, 6], 500)})
    table.write({1: Adjustment(SamplingParams(allowed_token_ids=prompt, min_new_tokens=9), prompt, [], [3], 500)})
    torch.manual_seed(0)
    logits, words = torch.randn(4, vocab_size), torch.randint(-(1 << 31), 1 << 31, (1, (vocab_size + 31) // 32))
    rows, lines = torch.tensor([1, 0, 2, 3]), torch.tensor([-1, 0, 0, -1])
    given = [x.to(machine.torch_device) for x in (logits, rows, rows + 100, lines, words.int())]
    ours, plain = table.adjust(*given), adjust_rows(*given[:3], table, *given[3:])
    same = torch.equal(ours, plain)
    return Row("adjusted logits", "equal to the last bit" if same else f"off by {(ours - plain).abs().max():.1e}", same)


def check_fp8(machine: Machine) -> Rows:
    """Products of weights in fp8 with rows that become fp8, where the device has them."""
    for outputs, inputs, group_size in ((70, 384, 128), (512, 2048, 2048)):
        what = f"products of fp8 with fp8, [{outputs}, {inputs}] by {group_size}"
        if machine.is_dry:
            yield Row(what, "the device has none of its own")
            continue
        torch.manual_seed(0)
        weight = torch.randn(outputs, inputs).to(torch.float8_e4m3fn).to(machine.torch_device)
        scales = torch.rand(outputs, inputs // group_size).to(machine.torch_device) / 50
        packed = machine.provider.pack_fp8(weight, scales, group_size, rounds_inputs=True)
        for num_rows in (1, 67, 300):
            x = torch.randn(num_rows, inputs).bfloat16().to(machine.torch_device)
            expected = kernels.linear_fp8(x, weight, scales, group_size)
            error = ((packed.apply(x, None, torch.float32) - expected).abs().max() / expected.abs().max()).item()
            yield Row(f"{what}, {num_rows} rows, {type(packed).__name__}", f"largest error {error:.1e}", error < 2e-3)


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def check_attention(machine: Machine) -> Rows:
    for dtype, tolerance in TOLERANCE.items():
        errors = {str(case): attention_error(case, dtype, machine.device) for case in attention_cases()}
        worst = max(errors, key=lambda case: errors[case])
        yield Row(f"attention, {dtype}", f"largest error {errors[worst]:.1e} ({worst})", errors[worst] <= tolerance)


def tiny_models(machine: Machine) -> Iterator[tuple[str, str]]:
    """Give names and folders of tiny random models."""
    for name in MODELS[:: machine.pick(1, 4)]:
        yield name, tiny_model(name)
    for architecture in ARCHITECTURES[:: machine.pick(1, 2)]:
        yield architecture, make_tiny(architecture, machine.folder / architecture)


def check_models(machine: Machine) -> Rows:
    for name, folder in tiny_models(machine):
        prompts, num_new = tiny_prompts(folder, machine.pick((5, 17, 52, 200), (5, 17))), machine.pick(20, 6)
        try:
            for result, prompt in zip(_answers(machine, folder, prompts, num_new), prompts, strict=True):
                assert_same_ids(result["output_ids"], reference(folder, tuple(prompt), num_new), name)
        except AssertionError as error:
            yield Row(f"{name}, float32", str(error).splitlines()[0], False)
        else:
            yield Row(f"{name}, float32", f"ids of {len(prompts)} prompts equal transformers' on the CPU", True)


def check_graphs(machine: Machine) -> Rows:
    """Recorded steps of as many rows as there are beside the same launched layer by layer: equal to the last bit."""
    for name, folder in tiny_models(machine):
        prompts = tiny_prompts(folder, (3, 20, 9, 30))
        options: dict[str, Any] = {"dtype": "bfloat16", "cuda_graph_bs": [1, 2, 3, 4], "return_logprob": True}
        recorded, launched = (
            _answers(machine, folder, prompts, machine.pick(32, 6), disable_cuda_graph=disabled, **options)
            for disabled in (False, True)
        )
        same = [_answer(result) for result in recorded] == [_answer(result) for result in launched]
        yield Row(f"{name}, bfloat16, graphs on and off", "equal to the last bit" if same else "they differ", same)


def tiny_prompts(folder: str, lengths: Sequence[int]) -> list[list[int]]:
    return random_prompts(AutoConfig.from_pretrained(folder).vocab_size, lengths)


def _answer(result: dict[str, Any]) -> tuple[Any, Any]:
    return result["output_ids"], result["meta_info"]["output_token_logprobs"]


def _answers(
    machine: Machine,
    folder: str,
    prompts: list[list[int]],
    num_new: int,
    dtype: str = "float32",
    return_logprob: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    with Engine(
        model_path=folder,
        dtype=dtype,
        device=machine.device,
        skip_tokenizer_init=True,
        context_length=256,
        max_total_tokens=2048,
        inline=True,
        max_running_requests=4,
        **options,
    ) as engine:
        params = {"temperature": 0, "max_new_tokens": num_new, "ignore_eos": True}
        answers = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=return_logprob)
        assert isinstance(answers, list)
        return answers
