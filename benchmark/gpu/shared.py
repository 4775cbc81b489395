"""Part d: requests that begin with the same tokens, which attention reads once or for each of them."""

from benchmark.gpu.machine import Machine, Row, Rows, generate, prompts_of, step_seconds


def measure_shared_prefix(machine: Machine) -> Rows:
    shape, num_requests = machine.pick("8b", "tiny"), machine.pick(64, 3)
    common, own = machine.pick((8192, 64), (24, 8))
    seconds = {}
    for disabled in (False, True):
        with machine.engine(
            shape, disable_prefix_sharing=disabled, max_total_tokens=machine.pick(40_000, 512)
        ) as engine:
            prefix = prompts_of(shape, 1, common)[0]
            generate(engine, [prefix], 1)
            prompts = prompts_of(shape, num_requests, common + own, prefix)
            seconds[disabled] = step_seconds(engine, prompts, machine.pick(64, 4))
        read = "for each" if disabled else "once"
        what = f"decode, {shape}, bfloat16, {num_requests} over {common} common tokens, read {read}"
        yield Row(what, f"{seconds[disabled] * 1e3:.2f} ms a step")
    ratio = seconds[True] / seconds[False]
    yield Row(f"the same, read once beside read for each, {shape}", f"{ratio:.2f} times as fast")
