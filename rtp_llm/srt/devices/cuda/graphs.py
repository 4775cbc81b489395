"""CUDA graphs: a step's launches recorded once, and repeated by one launch."""

import gc
from contextlib import suppress

import torch

from rtp_llm.srt.device.graphs import GraphCapture, Work


class CudaGraphs(GraphCapture):
    """Records on a stream of its own; all graphs take their memory from one pool."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()  # what loading left over would lie beside the pool
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            # Other threads, which serve clients, may call CUDA meanwhile: only this one is watched.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # the stream's capture is broken as well: the first error says why
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay
