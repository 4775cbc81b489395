"""The comparison with our peers: workloads, protocol (with a fake engine), tables, GGUF names, setup, the trace."""

import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gguf
import numpy
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from benchmark.make_checkpoint import SIZES, made_up_word, make_tokenizer
from benchmark.peers import run, setup, subject, trace
from benchmark.peers.peers import BEFORE, OURS, PEERS, REPOSITORY
from benchmark.peers.process import ProcessGroup, SideFailed
from benchmark.peers.protocol import Job, NotOffered, Stopwatch, Timing, Work, serve_lines
from benchmark.peers.report import bound, compare, table
from benchmark.peers.side import Side
from benchmark.peers.workloads import DECODE, FIRST_TOKEN, OUTPUT, PREFILL, WORKLOADS
from rtp_llm.tools.bench_serving.benchmark import workload
from rtp_llm.tools.bench_serving.workloads import Piece, Source
from tiny_server import wait_for

FAKE_ENGINE = """
import os, sys
from benchmark.peers.protocol import NotOffered, Timing, serve

class Fake:
    def load(self, job):
        print("engines print what they like")
        if job.precision == 4:
            raise NotOffered("no 4 bits here")
        return {"engine": "fake"}

    def run(self, work):
        if work.name == "die":
            print("about to die", file=sys.stderr)
            os._exit(3)
        if work.name == "raise":
            raise ValueError("no such luck")
        return Timing(0.5, 2.0, len(work.prompts) * work.output_len - (work.name == "short"))

serve(Fake())
"""
JOB = Job("checkpoint", 16, 2, "files")


@pytest.fixture
def side(tmp_path: Path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE_ENGINE)
    variables = {"PYTHONPATH": str(REPOSITORY)}
    side = Side("fake", [sys.executable, "-P", str(script)], variables, tmp_path / "fake.log")
    yield side
    side.close()


def work(name: str = "W3") -> Work:
    return Work(name, [[1, 2], [3, 4]], 0, 8)


def test_a_side_is_loaded_and_run(side: Side) -> None:
    about = side.load(JOB)
    assert about["engine"] == "fake" and float(about["load_s"]) >= 0
    assert side.run(work()) == Timing(0.5, 2.0, 16)


def test_a_side_is_stopped_between_questions(side: Side) -> None:
    side.load(JOB)
    stat = Path(f"/proc/{side.group.process.pid}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")  # the signal may still be on its way
    assert side.run(work()).output_tokens == 16


def test_what_is_not_offered_is_no_failure(side: Side) -> None:
    with pytest.raises(NotOffered, match="no 4 bits here"):
        side.load(Job("checkpoint", 4, 2, "files"))
    assert side.load(JOB)["engine"] == "fake"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("raise", "ValueError: no such luck"), ("short", "15 tokens instead of 16"), ("die", "ended with status 3")],
)
def test_a_failure_tells_what_the_engine_said(side: Side, name: str, expected: str) -> None:
    with pytest.raises(SideFailed, match=expected) as raised:
        side.run(work(name))
    assert "about to die" in str(raised.value) or name != "die"


def test_a_process_that_ignores_its_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.peers.process.END_WITHIN_S", 0.05)
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
    log = tmp_path / "log"
    group = ProcessGroup("stubborn", [sys.executable, "-c", script], {}, log)
    while "ready" not in log.read_text():
        assert group.process.poll() is None
    group.end()
    assert group.process.returncode == -9


def test_lines_of_the_protocol() -> None:
    class Fake:
        def load(self, job: Job) -> dict[str, str]:
            return {"weights": str(job.precision)}

        def run(self, work: Work) -> Timing:
            return Timing(1.0, 2.0, 16)

    questions = [
        {"do": "load", "job": {"checkpoint": "c", "precision": 8, "threads": 1, "files": "f"}},
        {"do": "run", "work": {"name": "W3", "prompts": [[1], [2]], "shared_len": 0, "output_len": 8}},
        {"do": "quit"},
        {"do": "never read"},
    ]
    answers = io.StringIO()
    serve_lines(Fake(), io.StringIO("".join(json.dumps(question) + "\n" for question in questions)), answers)
    loaded, timing, ended = map(json.loads, answers.getvalue().splitlines())
    assert loaded["ok"]["weights"] == "8"
    assert timing == {"ok": {"first_token_s": 1.0, "total_s": 2.0, "output_tokens": 16}}
    assert ended == {"ok": {}}


def test_a_stopwatch_needs_a_token() -> None:
    watch = Stopwatch()
    watch.tokens(0)
    with pytest.raises(RuntimeError, match="without a token"):
        watch.stop()
    watch.tokens(3)
    timing = watch.stop()
    assert timing.output_tokens == 3 and 0 <= timing.first_token_s <= timing.total_s


def test_workloads_are_those_of_the_page() -> None:
    sizes = {name: [len(w.work(1000, 1).prompts), len(w.work(1000, 1).prompts[0])] for name, w in WORKLOADS.items()}
    assert sizes == {"W1": [1, 128], "W2": [1, 2048], "W3": [16, 128], "W4": [32, 1056]}
    assert {name: w.output_len for name, w in WORKLOADS.items()} == {"W1": 128, "W2": 16, "W3": 128, "W4": 32}


def test_prompts_share_a_prefix_within_a_round_only() -> None:
    first, again, other = (WORKLOADS["W4"].work(50000, seed) for seed in (1, 1, 2))
    assert first == again
    assert len({tuple(prompt[:1024]) for prompt in first.prompts}) == 1
    assert len({tuple(prompt[1024:]) for prompt in first.prompts}) == 32
    assert first.prompts[0][:8] != other.prompts[0][:8]
    assert first.max_len == 1088
    assert WORKLOADS["W4"].work(50000, 1, output_len=2).max_len == 1058


def test_figures_of_a_timing() -> None:
    assert WORKLOADS["W1"].measure(Timing(0.5, 5.58, 128)) == {"decode": pytest.approx(25.0), "prefill": 256.0}
    assert WORKLOADS["W2"].measure(Timing(8.0, 9.0, 16)) == {"first token": 8.0}
    assert WORKLOADS["W3"].measure(Timing(1.0, 16.0, 2048)) == {"output": 128.0}


def test_we_are_compared_with_the_best_peer_round_by_round() -> None:
    rounds = {OURS: [30.0, 33.0, 20.0], "a": [10.0, 11.0, 40.0], "b": [20.0, 30.0, 25.0]}
    comparison = compare(DECODE, rounds, OURS)
    assert (comparison.best, comparison.ratios, comparison.ratio) == ("b", (1.5, 1.1, 0.8), 1.1)
    assert comparison.medians == {OURS: 30.0, "a": 11.0, "b": 25.0}


def test_for_times_the_smallest_is_best() -> None:
    comparison = compare(FIRST_TOKEN, {OURS: [4.0], "a": [8.0], "b": [6.0]}, OURS)
    assert (comparison.best, comparison.ratio) == ("b", 1.5)


@pytest.mark.parametrize("rounds", [{OURS: [1.0]}, {"a": [1.0]}, {OURS: [], "a": [1.0]}])
def test_without_us_or_without_peers_there_is_no_ratio(rounds: dict[str, list[float]]) -> None:
    assert compare(OUTPUT, rounds, OURS).ratio is None


def test_bounds_follow_bus_and_multipliers() -> None:
    ceilings = {"read_gb_s": 30.0, "bf16_gflops": 400.0, "int8_gops": 800.0}
    model = {"weight_bytes": 1.2e9, "layer_parameters": 440e6, "bits": 16}
    assert bound("W1", DECODE, ceilings, model) == pytest.approx(25.0)
    assert bound("W1", PREFILL, ceilings, model) == pytest.approx(454.5, rel=1e-3)
    assert bound("W2", FIRST_TOKEN, ceilings, model) == pytest.approx(2048 / 454.5, rel=1e-3)
    assert bound("W1", PREFILL, ceilings, model | {"bits": 8}) == pytest.approx(909.1, rel=1e-3)
    assert bound("W3", OUTPUT, ceilings, model) is None


def test_the_table() -> None:
    titles = {OURS: "rtp_llm", "a": "A", "b": "B"}
    rows = [
        ("W1", compare(DECODE, {OURS: [20.0, 24.0], "a": [20.0, 20.0], "b": [5.0, 5.0]}, OURS), 27.5),
        ("W2", compare(FIRST_TOKEN, {OURS: [4.0], "a": [8.0]}, OURS), None),
        ("W4", compare(OUTPUT, {"a": [123.4]}, OURS), None),
    ]
    assert table(rows, titles, OURS).splitlines()[2:] == [
        "| W1 decode, tok/s | 22.0 | 20.0 | 5.00 | 27.5 | 1.10 (1.00 to 1.20) | 0.80 |",
        "| W2 first token, s | 4.00 | 8.00 | – | – | 2.00 | – |",
        "| W4 output, tok/s | – | 123 | – | – | – | – |",
    ]


def test_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    config = {"vocab_size": 10, "hidden_size": 4, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = {"a": {"shape": [10, 4]}, "b": {"shape": [6, 4]}, "c": {"shape": [3]}, "__metadata__": {}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    size = subject.model_size(tmp_path, 16)
    assert (size["parameters"], size["layer_parameters"], size["weight_bytes"]) == (67, 27, 134)
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert subject.model_size(tmp_path, 8)["weight_bytes"] == 27  # the embedding is not multiplied with


@pytest.mark.parametrize("tied", [True, False])
def test_the_size_of_a_gguf_file(tmp_path: Path, tied: bool) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    tensors = {"token_embd.weight": (10, 32), "blk.0.attn_q.weight": (6, 32)} | (
        {} if tied else {"output.weight": (10, 32)}
    )
    for name, shape in tensors.items():
        blocks = gguf.quants.quantize(numpy.ones(shape, numpy.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", numpy.ones(32, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = subject.of_gguf(path)
    assert (found.vocab_size, found.weights, found.name) == (10, "Q8_0", "model.gguf")
    assert found.size["layer_parameters"] == 6 * 32 + 32
    assert found.size["weight_bytes"] == (10 + 6) * 34 + 32 * 4  # the embedding or the head, not both


def test_a_gguf_file_is_given_to_those_who_read_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.parse(["--model", "a.gguf"]).peers == [OURS, "llama.cpp"]
    for wrong, expected in ((["--peers", "vllm"], "vllm read no GGUF"), (["--model", "folder"], "must be a GGUF file")):
        with pytest.raises(SystemExit):
            run.parse(["--model", "a.gguf", *wrong])
        assert expected in capsys.readouterr().err


def test_a_missing_environment_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = run.parse(["--peers", "openvino", "--into", str(tmp_path)])
    state = run.start(args, subject.Subject(tmp_path, 16, "16-bit weights", 10, {}), tmp_path)
    assert state.failed and "setup.py openvino" in capsys.readouterr().out


def test_another_commit_is_a_side_of_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PEERS, BEFORE, raising=False)
    (tmp_path / "benchmark" / "peers").mkdir(parents=True)
    assert run.parse(["--before", str(tmp_path)]).peers == [OURS, BEFORE]
    assert PEERS[BEFORE].python(tmp_path) == Path(sys.executable)
    assert PEERS[BEFORE].process_variables(tmp_path, 2)["PYTHONPATH"] == str(tmp_path)
    assert PEERS[OURS].process_variables(tmp_path, 2)["PYTHONPATH"] == str(REPOSITORY)
    del PEERS[BEFORE]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--before", str(tmp_path)])
    assert "is no checkout" in capsys.readouterr().err


def test_every_peer_has_versions_and_an_adapter() -> None:
    for name, peer in PEERS.items():
        assert (REPOSITORY / "benchmark" / "peers" / "adapters" / f"{peer.adapter}.py").is_file()
        if name != OURS:
            versions = (setup.REQUIREMENTS / f"{name}.txt").read_text().split()
            assert versions and all("==" in version for version in versions)


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup.venv, "create", lambda folder, with_pip: Path(folder).mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(setup, "pip", lambda folder, *arguments, **options: calls.append(arguments))
    assert setup.main(["transformers", "--into", str(tmp_path)]) == 0
    assert calls[0][:2] == ("install", "--no-deps") and calls[0][2].startswith("torch==")
    made = len(calls)
    assert setup.main(["transformers", "--into", str(tmp_path)]) == 0
    assert len(calls) == made
    (tmp_path / "transformers" / "complete.txt").write_text("another list")
    assert "of other versions" in setup.state("transformers", tmp_path / "transformers")
    assert setup.main(["transformers", "--into", str(tmp_path)]) == 0
    assert len(calls) == 2 * made


def test_llama_cpp_is_compiled_for_the_instruction_set_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(setup.venv, "create", lambda folder, with_pip: Path(folder).mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(setup, "pip", lambda folder, *arguments, **options: None)
    monkeypatch.setattr(setup, "make_llama_cpp", lambda folder, version, jobs, isa: asked.append(isa))
    for isa in ("native", "avx2", "avx2"):
        assert setup.main(["llama.cpp", "--isa", isa, "--into", str(tmp_path)]) == 0
    assert asked == ["native", "avx2"]
    options = setup.llama_cpp_options("avx2")
    assert "-DGGML_NATIVE=OFF" in options and "-DGGML_AVX2=ON" in options and "-DGGML_AVX512=ON" not in options
    assert "-DGGML_NATIVE=ON" in setup.llama_cpp_options("native")


def test_a_setup_that_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CXX", "PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(setup.venv, "create", lambda folder, with_pip: Path(folder).mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(setup, "pip", lambda folder, *arguments, **options: None)
    assert setup.main(["llama.cpp", "--into", str(tmp_path)]) == setup.EXIT_ERROR
    assert "needs a C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "llama.cpp" / "complete.txt").exists()


@pytest.fixture
def to_gguf(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module without the gguf package, which is in llama.cpp's environment only."""
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFWriter=object))
    monkeypatch.delitem(sys.modules, "benchmark.peers.to_gguf", raising=False)
    module = importlib.import_module("benchmark.peers.to_gguf")
    monkeypatch.delitem(sys.modules, "benchmark.peers.to_gguf")
    return module


def test_names_in_a_gguf_file(to_gguf: ModuleType) -> None:
    assert to_gguf.gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert to_gguf.gguf_name("model.layers.12.self_attn.q_norm.weight") == "blk.12.attn_q_norm.weight"
    with pytest.raises(ValueError, match=r"no place for 'model.layers.0.mlp.router.weight'"):
        to_gguf.gguf_name("model.layers.0.mlp.router.weight")
    assert to_gguf.gguf_name("model.layers.1.linear_attn.A_log", "qwen3_5_text") == "blk.1.ssm_a"
    assert to_gguf.gguf_name("model.layers.1.linear_attn.dt_bias", "qwen3_5_text") == "blk.1.ssm_dt.bias"
    assert to_gguf.gguf_name("model.layers.1.conv.conv.weight", "lfm2") == "blk.1.shortconv.conv.weight"


@pytest.mark.parametrize("size", ["qwen3.5-0.8b", "lfm2-350m"])
def test_models_with_states_have_a_place_for_every_tensor(to_gguf: ModuleType, size: str) -> None:
    config = SIZES[size]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = [to_gguf.gguf_name(name, config.model_type) for name, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    widths = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if size == "lfm2-350m":
        assert widths["model.layers.0.feed_forward.w1.weight"][0] == to_gguf._lfm2_width(config.to_dict())


def test_values_are_changed_as_the_graph_of_qwen3_5_takes_them(to_gguf: ModuleType) -> None:
    bits = torch.tensor([0.5, -1.0]).bfloat16().view(torch.uint16).numpy()
    config = {"model_type": "qwen3_5_text"}
    assert to_gguf._converted("model.norm.weight", bits, config).tolist() == [1.5, 0.0]
    assert to_gguf._converted("model.layers.0.linear_attn.norm.weight", bits, config) is bits
    decay = to_gguf._converted("model.layers.0.linear_attn.A_log", bits, config)
    numpy.testing.assert_allclose(decay, -numpy.exp([0.5, -1.0]), rtol=1e-6)


def test_rope_factors_are_those_of_transformers(to_gguf: ModuleType) -> None:
    config = SIZES["llama-1b"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = to_gguf.rope_factors(config.to_dict())
    numpy.testing.assert_allclose(factors, (plain / scaled).numpy(), rtol=1e-5)
    assert to_gguf.rope_factors(SIZES["0.6b"].to_dict()) is None


def test_bfloat16_is_read_bit_by_bit(to_gguf: ModuleType, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(4).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    read = dict(to_gguf.bfloat16_tensors(tmp_path))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        numpy.testing.assert_array_equal(read[name], tensor.view(torch.uint16).numpy())
    save_file({"c": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="c is F32"):
        list(to_gguf.bfloat16_tensors(tmp_path))


def test_query_rows_become_pairs_for_llama(to_gguf: ModuleType) -> None:
    rows = numpy.arange(8, dtype=numpy.uint16).reshape(8, 1)  # two heads of four
    config = {"model_type": "llama", "head_dim": 4}
    permuted = to_gguf._permuted("model.layers.0.self_attn.q_proj.weight", rows, config)
    assert permuted[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert to_gguf._permuted("model.layers.0.self_attn.v_proj.weight", rows, config) is rows


def test_blocks_of_the_trace_become_runs_of_32_tokens(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 2]},
        {"timestamp": 9000, "input_length": 1024, "output_length": 3, "hash_ids": [0, 1]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = trace.parse(["--request-rate", "2", "--trace", str(path), "--peers", OURS])
    first, second = workload(trace.bench_args(args, "http://nobody", 100, seed=1, num_prompts=2))
    assert first.pieces == (Piece(Source.BLOCK, 0, 32), Piece(Source.BLOCK, 1, 32), Piece(Source.BLOCK, 2, 5))
    assert second.pieces == first.pieces[:2]
    assert (first.output_len, second.output_len) == (32, 1)
    assert first.arrival_s == 0.0 and second.arrival_s not in (None, 9.0)  # the rate is ours, not the trace's


def test_the_table_of_the_trace() -> None:
    figures = {key: 1.0 for key, _, _ in trace.FIGURES}
    records = {
        OURS: [figures | {"output_throughput": 30.0, "p99_ttft_ms": 100.0}],
        "vllm": [figures | {"output_throughput": 20.0, "p99_ttft_ms": 150.0, "cache_hit_rate": None}],
    }
    lines = trace.table(records).splitlines()
    assert lines[0] == "| W5 | rtp_llm | vLLM CPU | ours / best peer |"
    assert "| output tok/s | 30 | 20 | 1.50 |" in lines
    assert "| p99 TTFT, ms | 100 | 150 | 1.50 |" in lines
    assert "| cache hits | 1 | – | – |" in lines


def test_keys_and_values_of_a_token(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES["0.6b"].to_dict()))
    assert trace.kv_bytes_per_token(tmp_path) == 114_688


def test_made_up_words_survive_the_tokenizer() -> None:
    assert [made_up_word(number) for number in (0, 27, 26**4)] == ["aaaa", "aabb", "baaaa"]
    tokenizer = make_tokenizer(1000)
    ids = [5, 77, 999, 1]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids and len(tokenizer) == 1000
