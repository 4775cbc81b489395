"""The workers alone say what transformers says, and the two commands for comparing them print what can be compared."""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import ExifTags, Image

from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.request_spec import PromptMedia
from rtp_llm.tools.bench_one_batch import command as bench_one_batch
from rtp_llm.tools.bench_one_batch import correctness
from rtp_llm.tools.bench_one_batch.batch import OneBatch
from rtp_llm.tools.bench_one_batch.correctness import run_correctness
from rtp_llm.tools.bench_one_batch.options import OneBatchError
from rtp_llm.tools.reference import PROMPTS, TransformersModel, drawn_image, encode, logits_text, read_prompts
from tiny_models import TINY_MODELS, assert_same_ids, make_tiny, random_prompts, reference, tiny_model
from tiny_seeing import make_seeing

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that has a tokenizer."""
    return make_tiny("Qwen2ForCausalLM", tmp_path_factory.mktemp("twin"))


@pytest.fixture(scope="module")
def reference_hf() -> ModuleType:
    path = ROOT / "scripts" / "playground" / "reference_hf.py"
    spec = importlib.util.spec_from_file_location("reference_hf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(printed: str) -> list[str]:
    """What stands below each prompt's headline, without its logits."""
    parts = re.split(r"=+ Prompt \d+ =+\n", printed)[1:]
    return [re.sub(r"^prefill logits.*\n", "", part).strip() for part in parts]


def fails(capsys: pytest.CaptureFixture[str], argv: Sequence[str], message: str) -> None:
    assert bench_one_batch.main(argv) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("cut_len", [0, 4, 30])
@pytest.mark.parametrize(("name", "page_size"), [("qwen3-mixed-window7-tied", 4), ("llama-dynamic-mlp-bias", 1)])
def test_logits_and_ids_are_those_of_transformers(name: str, page_size: int, cut_len: int) -> None:
    model_dir, prompts = tiny_model(name), random_prompts(TINY_MODELS[name].vocab_size, (31, 40, 90))
    args = ServerArgs(model_path=model_dir, page_size=page_size, max_total_tokens=400, device="cpu", context_length=256)
    with OneBatch(args, read_model_config(args)) as batch:
        batch.reserve(3, 90 + NEW_TOKENS)
        found = run_correctness(batch, prompts, cut_len, NEW_TOKENS)
        again = run_correctness(batch, prompts[::-1], 0, NEW_TOKENS)  # in the same rows and pages
    model = TransformersModel(model_dir, device="cpu")
    for row, prompt in enumerate(prompts):
        assert_same_ids(found.output_ids[row], reference(model_dir, tuple(prompt), NEW_TOKENS), name)
        assert again.output_ids[2 - row] == found.output_ids[row]
        logits = model.prompt_logits(prompt)
        torch.testing.assert_close(found.final[row], logits[-1], atol=1e-3, rtol=0)
        if found.first_half is not None and name != "llama-dynamic-mlp-bias":  # whose keys depend on the whole prompt
            torch.testing.assert_close(found.first_half[row], logits[cut_len - 1], atol=1e-3, rtol=0)
    assert (found.first_half is None) == (cut_len == 0)


def test_both_commands_print_the_same_texts(
    twin: str, reference_hf: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference_hf.main(["--model-path", twin, "--model-type", "text"]) == 0
    theirs = capsys.readouterr().out
    assert bench_one_batch.main(["--correct", "--model", twin, "--max-total-tokens", "400"]) == 0
    ours = capsys.readouterr().out
    assert texts(ours) == texts(theirs)
    assert [text[: len(prompt)] for text, prompt in zip(texts(ours), PROMPTS, strict=True)] == list(PROMPTS)

    model = TransformersModel(twin, device="cpu")
    ids = [encode(model.tokenizer, prompt) for prompt in PROMPTS]
    shape = (
        rf"max_total_num_tokens=400\n\ninput_ids={re.escape(str(ids))}\n\n"
        r"prefill logits \(first half\): tensor\(\[\[.*?\]\]\) \n\nprefill logits \(final\): tensor\(\[\[.*?\]\]\) \n\n"
        r"========== Prompt 0 ==========\n.*? \n\n========== Prompt 1 ==========\n"
    )
    assert re.match(shape, ours, re.DOTALL)
    for i, prompt_ids in enumerate(ids):
        row = logits_text(model.prompt_logits(prompt_ids)[-1].float())
        assert f"\n========== Prompt {i} ==========\nprefill logits (final) {row}\n" in theirs


def test_special_tokens_show_and_end_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where every token that a model says ends the sequence, by its files, it says as many as it is asked for."""
    directory = make_tiny("LlamaForCausalLM", tmp_path, tie_word_embeddings=False)
    config = json.loads((tmp_path / "config.json").read_text())
    model = TransformersModel(directory, device="cpu")
    said = model.generate(encode(model.tokenizer, PROMPTS[0]), 4)[0]
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": said}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said, "repetition_penalty": 5.0}))
    assert TransformersModel(directory, device="cpu").generate(encode(model.tokenizer, PROMPTS[0]), 4)[0] == said
    argv = ["--correct", "--model", directory, "--batch-size", "1", "--output-len", "4", "--cut-len", "0"]
    assert bench_one_batch.main([*argv, "--max-total-tokens", "400"]) == 0
    printed = capsys.readouterr().out
    assert texts(printed) == [PROMPTS[0] + model.tokenizer.decode(said).rstrip()]
    assert "first half" not in printed


def test_prompts_from_a_file(twin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon\n\nThe second line\nshort\n")
    argv = ["--correct", "--model", twin, "--prompt-filename", str(file), "--max-total-tokens", "400"]
    assert bench_one_batch.main([*argv, "--batch-size", "2"]) == 0
    printed = texts(capsys.readouterr().out)
    assert len(printed) == 2 and printed[1].startswith("The second line")
    fails(capsys, [*argv, "--cut-len", "5"], "leaves nothing of the prompt 'short', which has 5 tokens")
    file.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(str(file))


@pytest.mark.xdist_group("tensor-parallel")
def test_two_ranks(twin: str, tmp_path: Path) -> None:
    found = []
    for tp_size in (1, 2):
        args = ServerArgs(model_path=twin, tp_size=tp_size, max_total_tokens=400, device="cpu")
        prompts = random_prompts(99, (9, 20))
        with OneBatch(args, read_model_config(args)) as batch:
            batch.reserve(2, 32)
            found.append(run_correctness(batch, prompts, 5, NEW_TOKENS))
            batch.start_profile(["CPU"], record_shapes=False)
            batch.step([1, 1])
            traces = batch.stop_profile(str(tmp_path / "trace"))
            assert [Path(trace).stat().st_size > 0 for trace in traces] == [True] * tp_size
    assert found[0].output_ids == found[1].output_ids
    torch.testing.assert_close(found[0].final, found[1].final, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[0].first_half, found[1].first_half, atol=1e-3, rtol=0)


NUMBER = r"\d+\.\d+"
LATENCY_LINES = rf"""max_total_num_tokens=100
skipping \(9, 8, 3\): 9 x 11 tokens exceed .*
skipping \(9, 8, 9\): .*
Warmup \.\.\.
(?:.*\n)+?Benchmark \.\.\.
Prefill\. latency: {NUMBER} s, throughput: {NUMBER} token/s
Decode 0\. Batch size: 2, latency: {NUMBER} s, throughput: {NUMBER} token/s
Decode 1\. Batch size: 2, latency: {NUMBER} s, throughput: {NUMBER} token/s
Decode\.  median latency: {NUMBER} s, median throughput: {NUMBER} token/s
Total\. latency: {NUMBER} s, throughput: {NUMBER} token/s
Prefill\. .*
Decode 0\. (?:.*\n)+Decode 4\. .*
Decode 6\. .*
Decode\.  median .*
Total\. .*
"""


def test_latencies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.jsonl"
    argv = ["--model", tiny_model("llama-default"), "--max-total-tokens", "100", "--page-size", "4"]
    argv += ["--batch-size", "9", "2", "--input-len", "8", "--output-len", "3", "9", "--log-decode-step", "6"]
    argv += ["--context-length", "64", "--run-name", "mine", "--result-filename", str(file)]
    assert bench_one_batch.main(argv) == 0
    assert re.fullmatch(LATENCY_LINES, capsys.readouterr().out)
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert [list(result.values())[:4] for result in results] == [["mine", 2, 8, 3], ["mine", 2, 8, 9]]
    for result in results:
        total_s, prefill_s = result["total_latency"], result["prefill_latency"]
        assert result["prefill_throughput"] == pytest.approx(2 * 8 / prefill_s)
        assert result["median_decode_throughput"] == pytest.approx(2 / result["median_decode_latency"])
        assert result["overall_throughput"] == pytest.approx(2 * (8 + result["output_len"]) / total_s)
        assert total_s > prefill_s + result["median_decode_latency"]


def test_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", tiny_model("llama-default"), "--max-total-tokens", "100", "--context-length", "64"]
    argv += ["--input-len", "8", "--output-len", "6", "--result-filename", "", "--profile", "--profile-steps", "2"]
    argv += ["--profile-record-shapes", "--profile-prefix", str(tmp_path / "trace")]
    assert bench_one_batch.main(argv) == 0
    capsys.readouterr()
    paths = {path.name: path for path in tmp_path.iterdir()}
    assert set(paths) == {f"trace_batch1_input8_output6_{stage}-rank0.trace.json.gz" for stage in ("prefill", "decode")}
    counts = {}
    for name, path in paths.items():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        counts[name] = sum(event["name"] == "aten::embedding" for event in events)  # one in each step
        assert any("Input Dims" in event.get("args", {}) for event in events)
    # A second one where the step is being recorded: the call that the recorder notes is within the one of the model.
    assert counts[next(name for name in paths if "prefill" in name)] in (1, 2)
    assert counts[next(name for name in paths if "decode" in name)] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--correct", "--input-len", "8"], "--input-len means something only without --correctness-test"),
        (["--correct", "--profile"], "--profile means"),
        (["--cut-len", "3"], "--cut-len means something only with --correctness-test"),
        (["--profile-stage", "decode"], "--profile-stage means something only with --profile"),
        (["--profile", "--output-len", "3", "--profile-start-step", "2"], "no decode 2 to profile"),
        (["--correct", "--batch-size", "1", "2"], "takes one --batch-size"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--input-len", "2000"], "no combination .* fits"),
        (["--correct"], "has no tokenizer; name one with --tokenizer-path"),
        (["--correct", "--skip-tokenizer-init"], "cannot run with --skip-tokenizer-init"),
    ],
)
def test_options_that_make_no_sense(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    fails(capsys, ["--model", tiny_model("llama-default"), *argv], message)


def test_options_that_do_nothing_here_are_named(caplog: pytest.LogCaptureFixture) -> None:
    args = ServerArgs(model_path=tiny_model("llama-default"), port=80, schedule_policy="lpm", max_total_tokens=50)
    OneBatch(args, read_model_config(args)).shutdown()
    assert "do nothing: --schedule-policy, --port" in caplog.text


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_seeing(tmp_path_factory.mktemp("seeing"))


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Flags that name two files. One is a photograph on its side: the other way up it has another shape."""
    paths = [str(tmp_path / "red.png"), str(tmp_path / "turned.jpg")]
    Image.new("RGB", (90, 60), "red").save(paths[0])
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    drawn_image().save(paths[1], exif=turned)
    return ["--image", paths[0], "--image", paths[1]]


@pytest.mark.parametrize("cut_len", [4, 12])  # before the first image, within it
def test_both_commands_say_the_same_about_images(
    seeing: str,
    images: list[str],
    reference_hf: ModuleType,
    capsys: pytest.CaptureFixture[str],
    cut_len: int,
) -> None:
    printed = []
    for flags in ([], images):
        assert reference_hf.main(["--model-path", seeing, "--model-type", "mllm", *flags]) == 0
        theirs = capsys.readouterr().out
        argv = ["--correct", "--model", seeing, "--max-total-tokens", "400", "--cut-len", str(cut_len), *flags]
        assert bench_one_batch.main(argv) == 0
        ours = capsys.readouterr().out
        assert texts(ours) == texts(theirs)
        printed.append((texts(ours), final_logits(ours)))
        torch.testing.assert_close(final_logits(ours), final_logits(theirs), atol=1e-3, rtol=0)
    (text_of_one, logits_of_one), (text_of_two, logits_of_two) = printed
    assert [text.count("<|vision_start|>") for text in (*text_of_one, *text_of_two)] == [1, 2]
    assert (logits_of_one - logits_of_two).abs().max() > 0.1


def final_logits(printed: str) -> torch.Tensor:
    """The six values that are shown of the first prompt."""
    (shown,) = re.findall(r"prefill logits \(final\):? tensor\(\[+(.*?)\]", printed)
    return torch.tensor([float(value) for value in shown.replace("...,", "").split(",")])


def test_texts_alone_for_a_model_that_sees(
    seeing: str, reference_hf: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference_hf.main(["--model-path", seeing, "--model-type", "text"]) == 0
    theirs = capsys.readouterr().out
    argv = ["--correct", "--model", seeing, "--model-type", "text", "--max-total-tokens", "400"]
    assert bench_one_batch.main(argv) == 0
    assert texts(capsys.readouterr().out) == texts(theirs)


def test_images_that_cannot_be_shown(
    twin: str, seeing: str, reference_hf: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mllm", "vlm"):
        assert reference_hf.main(["--model-path", twin, "--model-type", name]) == 2
        assert "(Qwen2ForCausalLM) takes no images; use --model-type text" in capsys.readouterr().err
        fails(capsys, ["--correct", "--model", twin, "--model-type", name], r"\(Qwen2ForCausalLM\) takes no images")
    text = tmp_path / "text.png"
    text.write_text("no image")
    image = ["--image", str(text)]
    assert reference_hf.main(["--model-path", seeing, "--model-type", "text", *image]) == 2
    assert "--image means something only with --model-type mllm" in capsys.readouterr().err
    assert reference_hf.main(["--model-path", seeing, "--model-type", "mllm", *image]) == 2
    assert "text.png holds no image" in capsys.readouterr().err
    fails(capsys, ["--correct", "--model", twin, *image], "takes no images")
    fails(capsys, ["--correct", "--model", seeing, *image, "--model-type", "text"], "--image means nothing with")
    fails(capsys, ["--model", seeing, *image], "--image means something only with --correctness-test")
    fails(capsys, ["--correct", "--model", seeing, *image], "text.png holds no image")


def test_a_cut_within_what_is_computed_at_once() -> None:
    prompt = Prompt(input_ids=list(range(20)), media=PromptMedia(b"", [], [(4, 9)]))
    for cut_len in (0, 4, 10, 19):
        correctness._check_cut(cut_len, "?", prompt, computes_blocks=True)
    correctness._check_cut(5, "?", prompt, computes_blocks=False)
    for cut_len in (5, 9):
        with pytest.raises(OneBatchError, match=r"4 and less, or 10 and more, do not"):
            correctness._check_cut(cut_len, "?", prompt, computes_blocks=True)


@pytest.mark.slow
def test_as_the_documentation_calls_them(twin: str) -> None:
    """Two commands in processes of their own, from the repository's root."""
    printed = []
    for command in (
        ["scripts/playground/reference_hf.py", "--model-path", twin, "--model-type", "text"],
        ["-m", "RTP-LLM.bench_one_batch", "--correct", "--model", twin],
    ):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert len(texts(printed[0])) == 3
    assert texts(printed[0]) == texts(printed[1])
