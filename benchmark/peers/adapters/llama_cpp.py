"""llama.cpp by its C interface, through the low-level bindings of llama-cpp-python (no sampler, no server).

A batch of tokens goes to ``llama_decode``; argmax over the logits is numpy's. Each workload gets a context of the size
that it needs, made before the clock starts. Requests without a common prefix get a cache each; in W4 the prefix is
computed once, and the 32 sequences share its cells (``llama_memory_seq_cp`` in a unified cache), which is what a user
of the library would write by hand.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy

from benchmark.peers.protocol import Job, NotOffered, Stopwatch, Timing, Work, serve
from benchmark.peers.to_gguf import write_gguf

FILE_TYPES = {8: ("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0), 4: ("Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)}
BATCH_TOKENS = 2048
MICRO_BATCH_TOKENS = 512  # llama.cpp's own default
FLASH_ATTENTION = 1  # llama_flash_attn_type: enabled


class LlamaCpp:
    def load(self, job: Job) -> dict[str, str]:
        path, weights = model_file(job)
        self._threads = job.threads
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}; its own words are in this peer's log")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        system = llama_cpp.llama_print_system_info().decode().strip()
        return {
            "engine": "llama.cpp", "version": f"llama-cpp-python {llama_cpp.__version__}", "weights": weights,
            "kv": "float16", "system": system,
        }  # fmt: skip

    def run(self, work: Work) -> Timing:
        with self._context(work) as context:
            return Run(context, work, self._vocab_size).timing()

    @contextmanager
    def _context(self, work: Work) -> Iterator[ctypes.c_void_p]:
        params = llama_cpp.llama_context_default_params()
        num_requests = len(work.prompts)
        params.kv_unified = work.shared_len > 0
        own_len = work.max_len - work.shared_len
        cells = work.shared_len + num_requests * own_len if params.kv_unified else num_requests * rounded(work.max_len)
        params.n_ctx = rounded(cells)
        params.n_seq_max = num_requests
        params.n_batch = BATCH_TOKENS
        params.n_ubatch = MICRO_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = FLASH_ATTENTION
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context; its own words are in this peer's log")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)


class Run:
    """One workload in a context of its own."""

    def __init__(self, context: ctypes.c_void_p, work: Work, vocab_size: int) -> None:
        self._context = context
        self._work = work
        self._vocab_size = vocab_size
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def timing(self) -> Timing:
        try:
            return self._timed()
        finally:
            llama_cpp.llama_batch_free(self._batch)

    def _timed(self) -> Timing:
        watch = Stopwatch()
        sequences = range(len(self._work.prompts))
        self._share_prefix()
        tokens: dict[int, int] = {}
        for some in self._groups():
            tokens |= self._decode([(i, self._work.shared_len, self._own(i)) for i in some])
            watch.tokens(len(some))
        for step in range(1, self._work.output_len):
            positions = {i: len(self._work.prompts[i]) + step - 1 for i in sequences}
            tokens = self._decode([(i, positions[i], [tokens[i]]) for i in sequences])
            watch.tokens(len(tokens))
        return watch.stop()

    def _own(self, sequence: int) -> list[int]:
        return self._work.prompts[sequence][self._work.shared_len :]

    def _groups(self) -> Iterator[list[int]]:
        """Sequences whose own prompts fit into one batch together."""
        per_batch = max(1, BATCH_TOKENS // len(self._own(0)))
        sequences = list(range(len(self._work.prompts)))
        for start in range(0, len(sequences), per_batch):
            yield sequences[start : start + per_batch]

    def _share_prefix(self) -> None:
        if not self._work.shared_len:
            return
        self._decode([(0, 0, self._work.prompts[0][: self._work.shared_len])])
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(1, len(self._work.prompts)):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, 0, self._work.shared_len)

    def _decode(self, pieces: Sequence[tuple[int, int, list[int]]]) -> dict[int, int]:
        """Computes (sequence, first position, tokens); the most likely token after each piece, by sequence."""
        last_rows = {}
        row = 0
        for sequence, start, tokens in pieces:
            for position, token in enumerate(tokens, start):
                self._set_row(row, token, position, sequence)
                row += 1
            self._batch.logits[row - 1] = True
            last_rows[sequence] = row - 1
        self._batch.n_tokens = row
        if status := llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode returned {status} for {row} tokens")
        return {sequence: self._best(last) for sequence, last in last_rows.items()}

    def _set_row(self, row: int, token: int, position: int, sequence: int) -> None:
        batch = self._batch
        batch.token[row], batch.pos[row] = token, position
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.logits[row] = False

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(numpy.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def rounded(num_cells: int) -> int:
    """llama.cpp pads caches to multiples of 256 cells."""
    return -(-num_cells // 256) * 256


def model_file(job: Job) -> tuple[Path, str]:
    """The checkpoint as a GGUF file, converted and quantised on first use; and its type."""
    if job.is_gguf:
        return Path(job.checkpoint), "as in the file"
    folder = Path(job.files)
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "bf16.gguf"
    if not plain.exists():
        write_gguf(Path(job.checkpoint), plain)
    if job.precision == 16:
        return plain, "BF16"
    if job.precision not in FILE_TYPES:
        raise NotOffered(f"no GGUF type for {job.precision} bits; have {', '.join(map(str, FILE_TYPES))}")
    name, file_type = FILE_TYPES[job.precision]
    path = folder / f"{name}.gguf"
    if not path.exists():
        quantize(plain, path, file_type, job.threads)
    return path, name


def quantize(source: Path, path: Path, file_type: int, threads: int) -> None:
    """As llama-quantize does it by default: for Q4_0 the tied embedding becomes Q6_K."""
    part = path.with_suffix(".part")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, threads
    if status := llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize returned {status} for {source}")
    part.rename(path)


if __name__ == "__main__":
    serve(LlamaCpp())
