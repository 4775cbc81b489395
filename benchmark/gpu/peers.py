"""Part e: other engines on the same device, shape and requests."""

import gc
import time
from importlib import import_module
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmark.gpu.machine import Machine, Row, Rows, generate, prompts_of
from make_checkpoint import SIZES


def compare_peers(machine: Machine) -> Rows:
    shape, num_new = machine.pick("0.6b", "tiny"), machine.pick(128, 4)
    prompts = prompts_of(shape, machine.pick(64, 2), machine.pick(512, 8))
    what = f"{shape}, bfloat16, {len(prompts)} x {len(prompts[0])} + {num_new}"
    with machine.engine(shape, max_total_tokens=machine.pick(80_000, 512)) as engine:
        generate(engine, prompts_of(shape, len(prompts), len(prompts[0])), num_new)  # warming up
        ours = len(prompts) * num_new / generate(engine, prompts, num_new)
    yield Row(f"ours, {what}", f"{ours:.0f} tokens/s of output")
    for name, run in (("transformers' continuous batching", run_transformers), ("vLLM", run_vllm)):
        try:
            if machine.is_dry:
                raise RuntimeError("peers need a GPU")
            theirs = len(prompts) * num_new / run(machine, shape, prompts, num_new)
        except Exception as error:  # a peer that does not run says nothing about this engine
            yield Row(f"{name}, {what}", f"did not run: {type(error).__name__}: {str(error).splitlines()[:1]}")
        else:
            yield Row(f"{name}, {what}", f"{theirs:.0f} tokens/s of output; ours has {ours / theirs:.2f} times as many")
        gc.collect()
        torch.cuda.empty_cache()


def run_transformers(machine: Machine, shape: str, prompts: list[list[int]], num_new: int) -> float:
    """Return seconds of a second run."""
    with torch.device(machine.torch_device):
        model = AutoModelForCausalLM.from_config(SIZES[shape], dtype=torch.bfloat16).eval()
    config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for _ in range(2):
        start = time.perf_counter()
        model.generate_batch(inputs=prompts, generation_config=config)
        seconds = time.perf_counter() - start
    return seconds


def run_vllm(machine: Machine, shape: str, prompts: list[list[int]], num_new: int) -> float:
    """Return seconds of a second run.

    Raises:
        RuntimeError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise RuntimeError("it is not installed")
    vllm = import_module("vllm")
    engine = vllm.LLM(
        model=str(machine.folder / shape),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=2048,
        gpu_memory_utilization=0.5,
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, detokenize=False)
    for _ in range(2):
        start = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        seconds = time.perf_counter() - start
    return seconds
