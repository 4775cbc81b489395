"""Sentences a second, and the time of one query, beside other engines: on one machine, in one run, taking turns.

    python benchmark/embedding_speed.py --model MINILM_DIR --threads 2
    python benchmark/embedding_speed.py --shape bge-m3 --layers 4 --model MINILM_DIR --most-tokens 16384
    python benchmark/embedding_speed.py --model MINILM_DIR --sides ours openvino --lengths 16 --batches 1

Sides: ours as a library and over HTTP, sentence-transformers, OpenVINO, llama.cpp as a library and by its server; each
in float32 and in bfloat16, in a process of its own, which is stopped while others work (benchmark/peers/process.py). A
side that is not installed is left out, and said so. ``--shape bge-m3`` measures a random XLM-RoBERTa of BGE-M3's width
(1,024; 24 layers, unless ``--layers`` says fewer) with the tokenizer of ``--model``.

Every side gets the same texts, of random words of the tokenizer, each of exactly as many tokens as the row says, and
gives vectors; the first vector of each must be near ours. Of each row every side has one turn without a clock, and then
``--rounds`` turns; the median counts. Rows of more than 16,384 tokens have one turn. A side that would take more than
``--most-seconds`` for a turn, by its speed so far, is left out of the row. Prints markdown tables: sentences a second,
and ours to the best of the others; ``--json`` keeps the seconds of every call.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark.embedding_sides import BATCH, MAX_TOKENS, SIDES  # noqa: E402
from benchmark.peers.peers import DEFAULT_INTO, llama_cpp_libraries  # noqa: E402
from benchmark.peers.process import ProcessGroup, SideFailed  # noqa: E402

OURS = ("ours", "ours-http")
NEAR = {"float32": 0.9999, "bfloat16": 0.99}  # least cosine of a side's first vector with ours
TIMES_OF_ONE = 10  # calls of one text in a turn
LONG_ROW = 16384  # tokens; longer ones need no turn without a clock
SEED = 7


class Engine:
    """A side's process."""

    def __init__(self, name: str, dtype: str, model: Path, args: argparse.Namespace, folder: Path) -> None:
        self.name, self.dtype, self.title = name, dtype, f"{name} {dtype}"
        self.token_s = 0.0  # seconds for each token of the longest row so far
        environment = Path(args.peers_into) / "llama.cpp"
        python = environment / "bin" / "python" if name == "llama.cpp" else Path(sys.executable)
        variables = dict(os.environ) | {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
        variables |= {f"{library}_NUM_THREADS": str(args.threads) for library in ("OMP", "MKL")}
        variables["LLAMA_CPP_LIB_PATH"] = str(llama_cpp_libraries(environment))
        if name == "llama.cpp":
            variables.pop("PYTHONPATH", None)
        command = [str(python), str(ROOT / "benchmark" / "embedding_sides.py"), name, "--model", str(model)]
        command += ["--dtype", dtype, "--threads", str(args.threads), "--llama-cpp", str(environment)]
        command += ["--gguf-folder", str(folder)]
        log = folder / f"{name}-{dtype}.log"
        try:
            self._group = ProcessGroup(
                self.title, command, variables, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except FileNotFoundError:
            self.missing: str | None = f"{python} is missing: python benchmark/peers/setup.py llama.cpp makes it"
            return
        first = self._answer()
        self.missing, self.about = first.get("missing"), first.get("about", "")

    def ask(self, texts: list[str], times: int) -> tuple[list[float], np.ndarray]:
        """Return the seconds of each call, and the first text's vector. Raise SideFailed."""
        process = self._group.process
        assert process.stdin is not None
        with self._group.awake():
            process.stdin.write(json.dumps({"texts": texts, "times": times}) + "\n")
            process.stdin.flush()
            answer = self._answer()
        return answer["seconds"], np.asarray(answer["vector"])

    def _answer(self) -> dict[str, Any]:
        process = self._group.process
        assert process.stdout is not None
        with self._group.awake():
            line = process.stdout.readline()
        if not line:
            raise self._group.failure("its process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if hasattr(self, "_group"):
            self._group.end()


def texts_of(tokenizer: Any, count: int, length: int) -> list[str]:
    """Return texts of exactly ``length`` tokens, special ones included: words of one token each."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    draw = random.Random(SEED + 1000 * count + length)
    texts = [" ".join(draw.choices(words, k=length - 2)) for _ in range(count)]
    found = {len(ids) for ids in tokenizer(texts[:8])["input_ids"]}
    if found != {length}:
        raise SystemExit(f"texts of {length} tokens came out as {found}: the tokenizer must add two special tokens")
    return texts


def make_bge_shape(layers: int, source: Path, folder: Path) -> Path:
    """Write a random XLM-RoBERTa of BGE-M3's shape with the tokenizer of ``source``, pooled by its first token."""
    import torch
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

    tokenizer = AutoTokenizer.from_pretrained(source)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16,
        intermediate_size=4096, max_position_embeddings=MAX_TOKENS + 2, type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model, path = XLMRobertaModel(config, add_pooling_layer=False), folder / f"bge-m3-shape-{layers}"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (place, kind) in enumerate(parts.items())
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 1024, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_TOKENS, "do_lower_case": False}))
    return path


def make_gguf(model: Path, dtype: str, args: argparse.Namespace, folder: Path) -> None:
    """Let llama.cpp's own converter write the model; without its sources, nothing is made and the side is missing.

    Its architecture is BERT's for XLM-RoBERTa, too, whose first positions it leaves out; here they are left out before,
    since its converter wants a tokenizer of SentencePiece for it.
    """
    sources = sorted((Path(args.peers_into) / "llama.cpp" / "sources").glob("*/vendor/llama.cpp"))
    if not sources:
        return
    file = folder / f"{model.name}-{dtype}.gguf"
    given = as_bert(model, folder) if json.loads((model / "config.json").read_text())["model_type"] != "bert" else model
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    command = [sys.executable, str(sources[-1] / "convert_hf_to_gguf.py"), str(given), "--outtype", kind]
    done = subprocess.run([*command, "--outfile", str(file)], capture_output=True, text=True)
    if done.returncode:
        print(f"llama.cpp's converter failed: {done.stderr.strip().splitlines()[-1]}", flush=True)


def as_bert(model: Path, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    twin = folder / f"{model.name}-bert"
    if twin.exists():
        return twin
    twin.mkdir()
    for path in model.iterdir():
        if path.suffix in (".json", ".txt"):
            (twin / path.name).write_bytes(path.read_bytes())
    (twin / "1_Pooling").mkdir()
    (twin / "1_Pooling" / "config.json").write_bytes((model / "1_Pooling" / "config.json").read_bytes())
    config = json.loads((model / "config.json").read_text())
    first, tensors = config["pad_token_id"] + 1, load_file(model / "model.safetensors")
    name = "embeddings.position_embeddings.weight"
    tensors[name] = tensors[name][first:].contiguous()
    config |= {"model_type": "bert", "architectures": ["BertModel"]}
    config["max_position_embeddings"] -= first
    (twin / "config.json").write_text(json.dumps(config))
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    return twin


def start(model: Path, args: argparse.Namespace, folder: Path) -> list[Engine]:
    engines = []
    for dtype in args.dtypes:
        if any(name.startswith("llama.cpp") for name in args.sides):
            make_gguf(model, dtype, args, folder)
        for name in args.sides:
            try:
                engine = Engine(name, dtype, model, args, folder)
            except SideFailed as error:
                print(f"left out: {error}", flush=True)
                continue
            if engine.missing is not None:
                print(f"left out: {engine.title}: {engine.missing}", flush=True)
                engine.close()
                continue
            print(f"ready: {engine.title} {engine.about}", flush=True)
            engines.append(engine)
    return engines


def measure(engines: list[Engine], texts: list[str], length: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of every call by side; a side that fails, or whose vector is another, is left out aloud."""
    times, tokens = TIMES_OF_ONE if len(texts) == 1 else 1, length * len(texts)
    seconds: dict[str, list[float]] = {}
    taking_part = [each for each in engines if not args.most_seconds or each.token_s * tokens <= args.most_seconds]
    ours = None
    for turn in [1] if tokens > LONG_ROW else range(args.rounds + 1):
        for engine in list(taking_part):
            try:
                taken, vector = engine.ask(texts, times)
            except SideFailed as error:
                print(f"left out from here on: {error}", flush=True)
                engines.remove(engine)
                taking_part.remove(engine)
                seconds.pop(engine.title, None)
                continue
            if turn:
                seconds.setdefault(engine.title, []).extend(taken)
                engine.token_s = min(taken) / tokens
            ours = vector if ours is None else ours
            if float(vector @ ours) < NEAR[engine.dtype]:
                print(f"!! {engine.title}: its vector's cosine with ours is {float(vector @ ours):.5f}", flush=True)
    return seconds


def report(rows: dict[tuple[int, int], dict[str, list[float]]], titles: Sequence[str], args: argparse.Namespace) -> str:
    lines = [f"| tokens | texts | {' | '.join(titles)} | ours / best other |", "|" + "---|" * (len(titles) + 3)]
    for (length, batch), seconds in rows.items():
        rates = {title: batch / median(taken) for title, taken in seconds.items()}
        cells = [f"{rates[title]:.1f}" if title in rates else "–" for title in titles]
        ratios = []
        for dtype in args.dtypes:
            mine = [rate for title, rate in rates.items() if title in (f"{name} {dtype}" for name in OURS)]
            others = [rate for title, rate in rates.items() if title.endswith(f" {dtype}") and rate not in mine]
            ratios.append(f"{max(mine) / max(others):.2f}" if mine and others else "–")
        lines.append(f"| {length} | {batch} | {' | '.join(cells)} | {', '.join(ratios)} |")
    lines += ["", "Milliseconds of one query, p50:", ""]
    for (length, batch), seconds in rows.items():
        if batch == 1:
            lines.append(f"- {length} tokens: " + ", ".join(f"{t} {1e3 * median(s):.2f}" for t, s in seconds.items()))
    return "\n".join(lines)


def wanted(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Return (tokens of a text, texts) of each row, those that take least time first."""
    every = [(length, batch) for length in args.lengths for batch in args.batches]
    return sorted((row for row in every if not args.most_tokens or math.prod(row) <= args.most_tokens), key=math.prod)


def keep(rows: dict[tuple[int, int], dict[str, list[float]]], model: str, args: argparse.Namespace) -> None:
    """Write what has been measured so far to ``args.json``, if that is given."""
    if args.json is not None:
        every = [{"tokens": tokens, "texts": texts, "seconds": found} for (tokens, texts), found in rows.items()]
        about = {"model": model, "threads": args.threads, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}"}
        args.json.write_text(json.dumps(about | {"rows": every}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the speed of embedding with other engines.")
    parser.add_argument("--model", type=Path, required=True, help="a BERT's folder; of --shape: its tokenizer")
    parser.add_argument("--shape", choices=["bge-m3"], help="measure a random checkpoint of this shape instead")
    parser.add_argument("--layers", type=int, default=24, help="of --shape")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--dtypes", nargs="+", choices=list(NEAR), default=list(NEAR))
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 128, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most-tokens", type=int, help="leave out rows of more tokens")
    parser.add_argument("--most-seconds", type=float, help="leave a side out of rows that take it longer")
    parser.add_argument("--json", type=Path, help="a file for the seconds of every call")
    parser.add_argument("--peers-into", type=Path, default=DEFAULT_INTO, help="where peers/setup.py made them")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    engines: list[Engine] = []
    rows: dict[tuple[int, int], dict[str, list[float]]] = {}
    titles: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model if args.shape is None else make_bge_shape(args.layers, args.model, folder)
        try:
            engines = start(model.resolve(), args, folder)
            titles, tokenizer = [engine.title for engine in engines], AutoTokenizer.from_pretrained(model)
            for length, batch in wanted(args):
                seconds = measure(engines, texts_of(tokenizer, batch, length), length, args)
                rows[length, batch] = seconds
                keep(rows, model.name, args)
                rates = ", ".join(f"{title} {batch / median(s):.1f}" for title, s in seconds.items())
                print(f"{batch} texts of {length} tokens: {rates}", flush=True)
        except KeyboardInterrupt:
            print("interrupted: other rows were not measured", flush=True)
        finally:
            for engine in engines:
                engine.close()
    stamp = f"{datetime.now(UTC):%Y-%m-%d}"
    print(f"\n{model.name}, {args.threads} threads, {stamp}, batches of {BATCH} where texts are padded\n")
    print(report(dict(sorted(rows.items())), titles, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
