"""Which executor a configuration asks for."""

from rtp_llm.srt.engine.executor import Executor, InProcessExecutor, MultiProcessExecutor
from rtp_llm.srt.worker.worker import WorkerConfig


def make_executor(config: WorkerConfig, depth: int, dist_timeout_s: float) -> Executor:
    if config.server_args.distributed_executor_backend == "ray":
        # Ray is optional, and a core without it starts sooner.
        from rtp_llm.srt.engine.ray_executor import RayExecutor

        return RayExecutor(config, dist_timeout_s, depth)
    if config.world_size > 1:
        return MultiProcessExecutor(config, dist_timeout_s, depth)
    return InProcessExecutor(config, depth)
