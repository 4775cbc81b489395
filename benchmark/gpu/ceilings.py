"""Part b: what the device can do, which other parts are compared with; and attention's rate of reading."""

import torch

from benchmark.gpu.attention_cases import forward_batch
from benchmark.gpu.machine import Machine, Row, Rows
from rtp_llm.srt.attention.backends import make_backend
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec
from rtp_llm.srt.forward_batch import ForwardMode
from rtp_llm.srt.kv_pool import KVPool
from rtp_llm.srt.layers.radix_attention import RadixAttention

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of a model of 8B
BYTES_OF_TOKEN = 2 * KV_HEADS * HEAD_DIM * 2  # keys and values in 16 bits


def measure_ceilings(machine: Machine) -> Rows:
    yield from measure_copy(machine)
    yield from measure_products(machine)
    yield from measure_attention(machine)


def measure_copy(machine: Machine) -> Rows:
    source = torch.zeros(machine.pick(2 << 30, 1 << 16), dtype=torch.uint8, device=machine.torch_device)
    target = torch.empty_like(source)
    machine.bytes_per_s = 2 * len(source) / machine.seconds(lambda: target.copy_(source))
    yield Row(f"copy of {len(source) >> 20} MiB, read and written", f"{machine.bytes_per_s / 1e9:.0f} GB/s")


def measure_products(machine: Machine) -> Rows:
    size = machine.pick(8192, 64)
    # several, so that none is in the cache when its turn comes
    weights = [_random(machine, size, size) for _ in range(machine.pick(8, 2))]
    for num_rows in (1, 8, 64, size):
        x = _random(machine, num_rows, size)
        seconds = machine.seconds(lambda x=x: [x @ weight.T for weight in weights]) / len(weights)  # type: ignore[misc]
        rates = 2 * size * size / seconds, 2 * num_rows * size * size / seconds
        what = f"torch's product, bfloat16, {num_rows} x {size} x {size}"
        yield Row(what, f"{rates[0] / 1e9:.0f} GB/s of weights, {rates[1] / 1e12:.1f} TFLOP/s")
        machine.flops_per_s = rates[1]


def measure_attention(machine: Machine) -> Rows:
    free_bytes, _ = machine.provider.memory_bytes()
    for batch_size in machine.pick((1, 16, 64), (1, 2)):
        for context in machine.pick((1024, 8192, 32768), (16,)):
            what = f"decode attention, bfloat16, {HEADS}/{KV_HEADS} x {HEAD_DIM}, {batch_size} rows x {context} tokens"
            num_bytes = batch_size * context * BYTES_OF_TOKEN
            if num_bytes > free_bytes * 0.8:
                yield Row(what, f"left out: {num_bytes / 1e9:.0f} GB do not fit")
            elif not machine.has_time(15):
                yield Row(what, "left out: the part's time is over")
            else:
                seconds = attention_seconds(machine, batch_size, context)
                share = f", {num_bytes / seconds / machine.bytes_per_s:.0%} of copying" if machine.bytes_per_s else ""
                yield Row(what, f"{num_bytes / seconds / 1e9:.0f} GB/s{share}")


def attention_seconds(machine: Machine, batch_size: int, context: int) -> float:
    """The device's time for a layer's attention in a decode step, its keys written as well."""
    spec = CacheSpec(KV_HEADS, HEAD_DIM, HEAD_DIM, "bfloat16", None)
    pool = KVPool([CacheGroup(spec, (0,), 1)], [batch_size * context], machine.device)
    cache = pool.layer(0)
    for tensor in (cache.keys, cache.values):
        tensor.zero_()
    order = torch.randperm(batch_size * context, device=machine.torch_device, dtype=torch.int32) + 1
    table = order.view(batch_size, context)
    attention = make_backend(None, machine.device, torch.bfloat16)
    batch = forward_batch([(context - 1, 1)] * batch_size, 1, table, pool, machine.torch_device, attention)
    assert batch.forward_mode == ForwardMode.DECODE, "each row computes one token"
    layer = RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id=0)
    q, k, v = (_random(machine, batch_size, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    attention.plan(batch)
    with torch.inference_mode():
        return machine.seconds(lambda: layer(q, k, v, batch))


def _random(machine: Machine, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=machine.torch_device, dtype=torch.bfloat16)
