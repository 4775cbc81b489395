"""How far answers from weights in the file's own bits are from float32 arithmetic on the dequantised weights.

The yardstick is transformers in float32. Measured are our engine as it serves a GGUF file by default, llama.cpp on the
same file, and transformers in bfloat16 on the dequantised weights: what 16 bits cost by themselves. All are given the
same ids: the beginning of a text at once, the rest one by one, and compared after each.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmark.peers.peers import PEERS, REPOSITORY
from benchmark.published.models import PublishedModel, short_texts
from benchmark.published.reference import Reference
from benchmark.published.results import Place, Record
from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_device
from rtp_llm.srt.engine.executor import InProcessExecutor
from rtp_llm.srt.worker.worker import WorkerConfig
from rtp_llm.tools.step_driver import StepDriver

NEW_TOKENS = 40
TEXTS = ("docs/architecture.md", "docs/http_api.md", "CONTRIBUTING.md", "benchmark/evaluation.py")
TEXT_LEN, TEXT_START = 512, 256
ANSWERS, TEXT = "answers to the 50 prompts", "four texts"
OURS, LLAMA_CPP, BFLOAT16 = "rtp_llm, the file's bits", "llama.cpp, the file's bits", "transformers, bfloat16"

# (ids, start) -> logits [len(ids) - start + 1, vocab_size], after the first ``start`` ids and all later ones
Logits = Callable[[list[int], int], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    kind: str
    ids: list[int]
    start: int


def measure(model: PublishedModel, file: Path, folder: Path, place: Place) -> Record:
    """Return the figures of each side over each kind of text. ``folder``: of transformers' reading."""
    reference = Reference(folder)
    with ExitStack() as stack:
        sides = {OURS: our_logits(file), BFLOAT16: Reference(folder, torch.bfloat16).logits}
        same_ids = None
        if PEERS["llama.cpp"].python(place.peers).exists():
            side = stack.enter_context(llama_cpp(file, place))
            sides[LLAMA_CPP] = side.logits
            same_ids = sum(side.ids(text) == reference.ids(text) for text in short_texts())
        else:
            print("llama.cpp is left out: python benchmark/peers/setup.py llama.cpp makes its environment")
        rows: dict[str, dict[str, list[torch.Tensor]]] = {}
        for piece in pieces(reference):
            expected = reference.logits(piece.ids, piece.start)
            for name, logits in sides.items():
                found = compared(expected, logits(piece.ids, piece.start), piece.ids[piece.start :])
                rows.setdefault(name, {}).setdefault(piece.kind, []).append(found)
    by_side = {name: {kind: figures(found) for kind, found in of.items()} for name, of in rows.items()}
    return {"sides": by_side, "texts": len(short_texts()), "same_token_ids": same_ids}


def pieces(reference: Reference) -> Iterator[Piece]:
    for text in short_texts():
        ids = reference.ids(text)
        yield Piece(ANSWERS, [*ids, *reference.greedy(ids, NEW_TOKENS)], len(ids))
    for name in TEXTS:
        yield Piece(TEXT, reference.ids((REPOSITORY / name).read_text(encoding="utf-8"))[:TEXT_LEN], TEXT_START)


def compared(expected: torch.Tensor, found: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
    """Return for each row (Kullback-Leibler divergence in nats, whether the best id is the same, log-probability of the
    text's next id less the expected one's): [rows, 3]. After the last id there is no next one: 0."""
    right, ours = expected.log_softmax(-1), found.float().log_softmax(-1)
    divergence = (right.exp() * (right - ours)).sum(-1).clamp(min=0)
    agrees = (right.argmax(-1) == ours.argmax(-1)).float()
    less = torch.zeros(len(expected))
    picked = torch.tensor(targets)[:, None]
    less[:-1] = (ours[:-1].gather(1, picked) - right[:-1].gather(1, picked))[:, 0]
    return torch.stack([divergence, agrees, less], 1)


def figures(found: Sequence[torch.Tensor]) -> dict[str, float]:
    rows = torch.cat(list(found)).double()
    return {
        "tokens": len(rows),
        "kl_mean": float(rows[:, 0].mean()),
        "kl_99": float(rows[:, 0].quantile(0.99)),
        "top_1": float(rows[:, 1].mean()),
        "log_prob": float(rows[:, 2].mean()),
    }


def our_logits(file: Path) -> Logits:
    """Our model in this process, as ``rtp-llm serve`` would run it, without a scheduler."""
    args = ServerArgs(model_path=str(file), device="cpu")
    config = read_model_config(args)
    executor = InProcessExecutor(WorkerConfig(args, config, choose_device(args.device)))
    num_groups = len(executor.load().layout.groups)
    executor.init_cache([-(-TEXT_LEN // args.page_size)] * num_groups, 1, TEXT_LEN, num_state_slots=1)
    driver = StepDriver(executor, num_groups, args.page_size)

    def logits(ids: list[int], start: int) -> torch.Tensor:
        driver.start([ids], 0)
        return torch.cat([driver.step_with_logits([count])[1] for count in [start] + [1] * (len(ids) - start)])

    return logits


class LlamaCpp:
    """llama.cpp in a process of its own environment (see llama_cpp_logits.py). Its log goes to ``folder``."""

    def __init__(self, file: Path, place: Place, folder: Path) -> None:
        peer = PEERS["llama.cpp"]
        command = [str(peer.python(place.peers)), "-P", "-m", "benchmark.published.llama_cpp_logits"]
        command += [str(file), str(place.threads)]
        self._log, self._result = folder / "log", folder / "logits.npy"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self._log.open("w") as log:
            variables = peer.process_variables(place.peers, place.threads)
            self._process = subprocess.Popen(command, env=variables, stderr=log, **pipes)

    def ids(self, text: str) -> list[int]:
        return self._ask({"text": text})["ids"]

    def logits(self, ids: list[int], start: int) -> torch.Tensor:
        self._ask({"ids": ids, "start": start, "into": str(self._result)})
        return torch.from_numpy(numpy.load(self._result))

    def close(self) -> None:
        self._process.communicate()  # the end of its input ends it

    def _ask(self, question: Record) -> Record:
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended: {self._log.read_text()[-1000:]}")
        return json.loads(line)


@contextmanager
def llama_cpp(file: Path, place: Place) -> Iterator[LlamaCpp]:
    with tempfile.TemporaryDirectory() as folder, closing(LlamaCpp(file, place, Path(folder))) as side:
        yield side


def table(records: Mapping[str, Record]) -> str:
    """Markdown, of the records of models by their titles."""
    lines = ["| | over | tokens | KL, mean | KL, 99 of 100 | same best token | log-probability of the text |"]
    lines.append("|---|---|---|---|---|---|---|")
    for title, record in records.items():
        for side, kinds in record["sides"].items():
            for kind, row in kinds.items():
                cells = [f"{title}: {side}", kind, str(row["tokens"]), f"{row['kl_mean']:.2g}", f"{row['kl_99']:.2g}"]
                cells += [f"{row['top_1']:.2%}", f"{row['log_prob']:+.4f}"]
                lines.append(f"| {' | '.join(cells)} |")
    for title, record in records.items():
        if record["same_token_ids"] is not None:
            counts = f"{record['same_token_ids']} of {record['texts']}"
            lines += ["", f"{title}: llama.cpp's tokenizer gives transformers' ids for {counts} texts."]
    return "\n".join(lines)
