"""``rtp-llm verify`` agrees with what is right, and names what is broken in a model file and why."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from asked_with_images import image_prompts
from broken_models import BROKEN_SEEING_MODELS, MORE_BROKEN_MODELS, TEN_BROKEN_MODELS, BrokenModel
from PIL import Image
from seeing_twins import SEEING_TWINS

from rtp_llm import ModelRegistry, cli
from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.layers.quantization.base import hidden_parameters
from rtp_llm.srt.layers.towers.clip import CLIPVisionEmbeddings
from rtp_llm.srt.worker.model_runner import ModelRunner
from rtp_llm.tools.reference import TransformersModel
from rtp_llm.tools.schedules import ONE_BY_ONE, Teacher, random_questions, run_schedules
from rtp_llm.tools.verify.command import _text
from rtp_llm.tools.verify.locate import compare, first_difference
from rtp_llm.tools.verify.model_class import registered
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.prompts import Prompt
from rtp_llm.tools.verify.run import PromptResult, Report, _with_text, record, verify
from rtp_llm.tools.verify.sides import OurModel, TheirModel
from rtp_llm.tools.verify.ties import Parting
from rtp_llm.tools.verify.trace import EMBEDDINGS, Place
from tiny_models import make_tiny, tiny_model

ENGINE = ["--device", "cpu", "--context-length", "512", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a tokenizer, and a window that only the long prompt exceeds, of which not all is recorded."""
    return make_tiny("MistralForCausalLM", tmp_path_factory.mktemp("mistral"), sliding_window=300)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By model file."""
    twins = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
    return {name: SEEING_TWINS[twin].make(tmp_path_factory.mktemp(name)) for name, twin in twins.items()}


def server_args(model_dir: str) -> ServerArgs:
    return ServerArgs(model_path=model_dir, dtype="float32", device="cpu", context_length=512, log_level="error")


def run(model_dir: str, **options: object) -> Report:
    args = server_args(model_dir)
    return verify(args, VerifyOptions(**{"max_new_tokens": 4, "long_len": 40} | options))


def assert_found(broken: BrokenModel, model_dir: str, directory: Path) -> None:
    report = run(model_dir, model_class=broken.write(directory))
    assert not report.agrees and report.finding is not None, report
    found = report.finding
    assert (found.module, found.part) == (broken.module, broken.part), found
    assert broken.cause in "".join(found.causes) and bool(found.causes) == bool(broken.cause), found
    assert "broken_" in report.source or "models_py" in report.source


def changed(directory: Path, old: str, new: str) -> str:
    """What --model-class takes: Llama's file with one change."""
    return BrokenModel("", "llama", ((old, new),), "", "", "", "").write(directory)


@pytest.mark.parametrize("broken", TEN_BROKEN_MODELS, ids=lambda broken: broken.name)
def test_ten_broken_models_are_explained(broken: BrokenModel, tmp_path: Path) -> None:
    assert_found(broken, tiny_model(broken.checkpoint), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("broken", MORE_BROKEN_MODELS, ids=lambda broken: broken.name)
def test_more_broken_models_are_explained(broken: BrokenModel, tmp_path: Path) -> None:
    if broken.checkpoint.endswith("ForCausalLM"):
        assert_found(broken, make_tiny(broken.checkpoint, tmp_path / "checkpoint", **broken.config), tmp_path)
    else:
        assert_found(broken, tiny_model(broken.checkpoint), tmp_path)


@pytest.mark.parametrize("broken", BROKEN_SEEING_MODELS, ids=lambda broken: broken.name)
def test_broken_models_that_see_are_explained(broken: BrokenModel, seeing: dict[str, str], tmp_path: Path) -> None:
    assert_found(broken, seeing[broken.checkpoint], tmp_path)


def test_a_run_of_media_that_the_engine_refuses(seeing: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "max_media_block", 3)
    report = run(seeing["qwen2_vl"])
    assert "the engine refuses the prompt '(" in report.failure and "of 3 at most (max_media_block)" in report.failure


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEING_TWINS)
def test_models_that_see_agree_everywhere(name: str, tmp_path: Path) -> None:
    """In logits, and at every place of the tower, what projects its output, and the language model."""
    args = server_args(SEEING_TWINS[name].make(tmp_path))
    report = verify(args, VerifyOptions(max_new_tokens=4, long_len=0))
    assert report.agrees and "(1 image)" in report.results[-1].prompt.text
    (asked, _) = image_prompts(args)
    ours = OurModel(args, read_model_config(args), len(asked.ids) + 1)
    theirs = TheirModel(args, read_model_config(args))
    evidence = record("float32", ours, theirs, Prompt("", asked.ids, asked.media), 4)
    differences = compare(evidence.ours, evidence.theirs)
    assert first_difference(differences, evidence.tolerance) is None
    compared = [difference.place for difference in differences]
    in_tower = [place for place in compared if evidence.ours.parts.is_tower(place.module)]
    assert len(in_tower) > 20 and Place(evidence.ours.parts.language_model, EMBEDDINGS) in compared
    assert evidence.ours.vision_calls
    for attention, call in evidence.ours.vision_calls.items():
        assert (call.scaling, call.lengths) == (
            evidence.theirs.vision_calls[attention].scaling,
            evidence.theirs.vision_calls[attention].lengths,
        )


def test_a_learned_table_that_is_not_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model_dir = SEEING_TWINS["LlavaForConditionalGeneration"].make(tmp_path)
    embed = CLIPVisionEmbeddings.forward

    def without_positions(self: CLIPVisionEmbeddings, pixel_values: torch.Tensor) -> torch.Tensor:
        return embed(self, pixel_values) - self.position_embedding.weight

    monkeypatch.setattr(CLIPVisionEmbeddings, "forward", without_positions)
    found = run(model_dir).finding
    assert found is not None and found.module == "model.vision_tower.embeddings", found
    assert "embeddings.position_embedding.weight is not added" in found.causes[0], found


def test_images_of_the_caller(
    seeing: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], mistral: str
) -> None:
    paths = [str(tmp_path / name) for name in ("red.png", "blue.png")]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (60, 90), colour).save(path)
    command = ["verify", seeing["qwen2_vl"], *ENGINE, "--long-len", "0", "--json", "--image", *paths]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)["results"][-1]
    assert result["prompt"]["text"] == "(2 images) Describe this image." and result["error"] < 1e-4
    assert cli.main(["verify", mistral, *ENGINE, "--image", *paths]) == 2
    assert "(MistralForCausalLM) takes no images" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "none.png")]) == 2


@pytest.mark.parametrize("name", ["qwen3-mixed-window7-tied", "llama-dynamic-mlp-bias", "mistral-window16-yarn"])
def test_right_models_agree(name: str) -> None:
    report = run(tiny_model(name), long_len=100)
    assert report.agrees and report.finding is None
    assert [len(result.prompt.ids) for result in report.results] == [5, 9, 12, 100]
    for result in report.results:
        assert result.max_difference < 1e-3 and result.top_agreement == 1.0 and result.parting is None


def test_the_long_prompt_finds_what_the_others_do_not(mistral: str, tmp_path: Path) -> None:
    model_class = next(broken for broken in TEN_BROKEN_MODELS if broken.file == "mistral").write(tmp_path)
    assert run(mistral, model_class=model_class, long_len=0).agrees
    report = run(mistral, model_class=model_class, long_len=None)
    assert [result.error > report.tolerance for result in report.results] == [False, False, False, True]
    assert report.finding is not None and "ours 299 tokens" in report.finding.causes[0]


def test_the_command_prints_a_table_or_json(mistral: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A window on the sea\n\nOne more line\n")
    command = ["verify", mistral, *ENGINE, "--prompt-filename", str(prompts)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "A window on the sea" in printed and "They agree" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 80

    broken = next(broken for broken in TEN_BROKEN_MODELS if broken.file == "mistral")
    assert cli.main([*command, "--model-class", broken.write(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "They differ" in printed and "(off by one)" in " ".join(printed.split())

    assert cli.main([*command, "--model-class", broken.write(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["agrees"] is False and report["finding"]["module"] == broken.module
    assert [result["prompt"]["text"] for result in report["results"]][:2] == ["A window on the sea", "One more line"]
    assert "MistralForCausalLM" not in ModelRegistry.models.overrides


def test_texts_that_part_in_16_bits_are_compared_in_float32(mistral: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each text parted at its first token."""
    monkeypatch.setattr("rtp_llm.tools.verify.run.parting", lambda ids, logits: Parting(0, 3, 0.02))
    args = ServerArgs(model_path=mistral, dtype="bfloat16", device="cpu", context_length=512, log_level="error")
    report = verify(args, VerifyOptions(max_new_tokens=4, long_len=0))
    assert report.agrees and all(result.parting and result.parting.same_in_float32 for result in report.results)
    assert "a tie within 0.02; equal in float32" in _text(report.results[0], str)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["mistral", "qwen2_vl"])
def test_all_schedules(
    checkpoint: str, mistral: str, seeing: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = mistral if checkpoint == "mistral" else seeing[checkpoint]
    command = ["verify", model_dir, *ENGINE, "--long-len", "40", "--schedules"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "two ranks" in printed and "second turn" in printed and "They agree" in printed
    assert ("of them with images" in printed) == (checkpoint == "qwen2_vl")


@pytest.mark.slow
def test_all_schedules_of_a_class_that_is_given(
    mistral: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = next(broken for broken in TEN_BROKEN_MODELS if broken.file == "mistral").write(tmp_path)
    command = ["verify", mistral, *ENGINE, "--long-len", "400", "--schedules", "--json", "--model-class", broken]
    assert cli.main(command) == 1
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results) == 7 and not any(result["agrees"] or result["failure"] for result in results)
    assert results[0]["question"] == "(400 tokens)"


def test_what_cannot_be_loaded_or_run_is_the_first_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir = tiny_model("llama-default")
    unset = run(model_dir, model_class=changed(tmp_path, "bias=qkv_bias,", "bias=True,"))
    assert not unset.agrees and "parameters were not set" in unset.failure and "qkv_proj.bias" in unset.failure
    failing = run(
        model_dir,
        model_class=changed(tmp_path, "self.feed(hidden_states)", "self.feed(hidden_states[:, :3])"),
    )
    assert "fails while it computes" in failing.failure and "broken_llama.py" in failing.failure
    (tmp_path / "syntax.py").write_text("class A(:\n")
    assert cli.main(["verify", model_dir, *ENGINE, "--model-class", f"{tmp_path}/syntax.py:A"]) == 1
    assert "cannot be imported" in capsys.readouterr().out


def test_a_weight_that_is_packed_when_served_is_not_read(tmp_path: Path) -> None:
    """In float32 neither: a model file that reads one passes no run of verify and fails when it is served."""
    call = "return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)"
    reading = f"hidden_states = hidden_states.to(self.lm_head.weight.device)\n        {call}"
    model_class = changed(tmp_path, call, reading)
    line = (tmp_path / "broken_llama.py").read_text().splitlines().index(f"        {reading.splitlines()[0]}") + 1
    report = run(tiny_model("llama-default"), model_class=model_class)
    assert "AttributeError: lm_head (ParallelLMHead) has no 'weight' while the model runs: " in report.failure
    assert report.failure.endswith(f"broken_llama.py, line {line})")
    args = replace(server_args(tiny_model("llama-default")), skip_tokenizer_init=True)
    teacher = Teacher(TransformersModel(args.model_path, "float32", "cpu").model)
    with registered(args, model_class), hidden_parameters():
        [result] = run_schedules(args, teacher, random_questions(32, (3,)), [ONE_BY_ONE])
    assert "has no 'weight' while the model runs" in result.failure


def test_numbers_that_are_none_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_class = changed(tmp_path, "self.feed(hidden_states)", "self.feed(hidden_states / 0)")
    command = ["verify", tiny_model("llama-default"), *ENGINE, "--model-class", model_class, "--json"]
    assert cli.main(command) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["finding"]["module"] == "model.layers.0.mlp.gate_proj" and report["results"][0]["error"] is None


def test_models_that_run_through_transformers_have_no_modules_of_ours() -> None:
    args = ServerArgs(model_path=tiny_model("llama-default"), device="cpu", model_impl="transformers")
    report = verify(args, VerifyOptions(max_new_tokens=4, long_len=30))
    assert report.agrees and report.class_name == "TransformersForCausalLM"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cut-len", "5"], "more than --cut-len"),
        (["--cut-len", "-1"], "--cut-len must be at least 0"),
        (["--model-class", "nowhere"], "must be module:Class"),
        (["--model-class", "nowhere.py:A"], "there is no file nowhere.py"),
        (["--model-class", "rtp_llm.models_py.llama:Nothing"], "has no class Nothing"),
        (["--prompt-filename", "x"], "has no tokenizer"),
    ],
)
def test_errors_are_told_in_a_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", tiny_model("llama-default"), *ENGINE, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_text_ends_before_a_placeholder() -> None:
    """Which transformers would want an image for."""
    config = SimpleNamespace(image_token_id=7, video_token_id=8, hidden_size=9)
    for output_ids, ids in (([9, 7, 3], [1, 2, 9]), ([4, 8], [1, 2, 4]), ([7], [1, 2]), ([9, 3, 7], [1, 2, 9, 3])):
        result = PromptResult(Prompt("", [1, 2]), 0, 0, 0, 1, output_ids, None)
        assert _with_text(result, config).ids == ids


def test_what_transformers_does_not_know_cannot_be_compared(
    mistral: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(Path(mistral, "config.json").read_text())
    for file in Path(mistral).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip_text_model"}))
    assert cli.main(["verify", str(tmp_path), *ENGINE]) == 2
    assert "transformers cannot build MistralForCausalLM" in capsys.readouterr().err
