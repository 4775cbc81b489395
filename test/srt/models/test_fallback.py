"""Models of transformers that have no file here: the same logits as transformers, or a refusal that says why.

One test goes through every causal language model that the installed transformers knows and prints what became of each;
a handful of kinds runs always.
"""

import json
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import recurrent_fallback
import safetensors.torch
import torch
import transformers
from mm_parity import open_vision_engine
from PIL import Image
from seeing_twins import SEEING_TWINS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rtp_llm import Engine
from rtp_llm.models_py.transformers import UnservableModelError
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import UnknownArchitectureError
from rtp_llm.srt.models.weight_loading import WeightLoadError
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import _TINY_SIZES, _disturb, make_tiny, random_prompts
from tiny_seeing import make_seeing

VOCAB_SIZE = 97
LENGTHS = (5, 40, 70)  # one is longer than the windows of 24, and than any chunk
NEW_TOKENS = 8
TOLERANCE = 1e-3  # of log-probabilities
SECONDS_PER_ARCHITECTURE = 180  # of the processor: on a loaded machine it takes longer
MOST_PARAMETERS = 100e6
# What refusals for a state of another kind, an encoder, or ALiBi say.
STATE = ("of type", "recurrent", "cross-attention", "ALiBi", "an index")

# Sizes that tiny_models has no need of.
SIZES = _TINY_SIZES | dict(
    vocab_size=VOCAB_SIZE,
    vocab_size_per_layer_input=VOCAB_SIZE,
    hidden_size_per_layer_input=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    ffn_hidden_size=96,
    expert_ffn_hidden_size=32,
    n_shared_experts=1,
    is_decoder=True,
    laurel_rank=8,
    depth=2,
)
WINDOW_AND_FULL = ["sliding_attention", "full_attention"]
OVERRIDES: dict[str, dict[str, Any]] = {
    "DbrxForCausalLM": dict(
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 48},
    ),
    "GPTNeoForCausalLM": dict(attention_types=[[["global", "local"], 2]], window_size=24),
    "Lfm2ForCausalLM": dict(layer_types=["conv", "full_attention"] * 2),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention"] * 2),
    "Mamba2ForCausalLM": dict(num_heads=8, head_dim=16),
    "ZayaForCausalLM": dict(num_experts_per_tok=1),
    "Gemma3nForCausalLM": dict(
        layer_types=WINDOW_AND_FULL * 2,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "Gemma4ForCausalLM": dict(layer_types=WINDOW_AND_FULL * 2, num_kv_shared_layers=2),
    "xLSTMForCausalLM": dict(hidden_size=128),  # transformers rounds the sizes of its states up to multiples of 64
    "XmodForCausalLM": dict(default_language="en_XX"),
    "ReformerModelWithLMHead": dict(is_decoder=True, axial_pos_shape=[16, 32], axial_pos_embds_dim=[32, 32]),
    "CohereCompassForCausalLM": dict(
        layer_types=WINDOW_AND_FULL * 2,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in WINDOW_AND_FULL},
    ),
}


class TooSlow(BaseException):
    """Not an Exception: nobody on its way may take it for one of their errors."""


class Verdict(NamedTuple):
    kind: str  # "agrees", "refused", "wrong", or "not made": no tiny checkpoint of it
    why: str = ""


def tiny_config(config_class: Any, overrides: dict[str, Any]) -> Any:
    """The usual configuration with everything small, also in configurations within it."""
    return config_class(**(_sizes(config_class) | overrides))


def _sizes(config_class: Any) -> dict[str, Any]:
    usual, names = config_class(), config_class.attribute_map
    fields = usual.to_dict()
    sizes = {names.get(name, name): value for name, value in SIZES.items() if names.get(name, name) in fields}
    if "kv_lora_rank" in sizes:  # each head has keys of its own, and the rotated part is what head_dim means
        sizes |= {"num_key_value_heads": 4, "head_dim": 8}
    for name in config_class.sub_configs:
        inner = getattr(usual, name, None)
        if inner is not None:
            sizes[name] = _sizes(type(inner)) | {"model_type": inner.model_type}
    return sizes


def make(architecture: str, directory: Path) -> None:
    model_class = getattr(transformers, architecture)
    config = tiny_config(model_class.config_class, OVERRIDES.get(architecture, {}))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"even tiny it has {size / 1e6:.0f} million parameters")
    model = model_class(config).to(torch.float32)
    _disturb(model)
    model.save_pretrained(directory)


@contextmanager
def served(directory: Path, **options: Any) -> Iterator[Engine]:
    with Engine(
        model_path=str(directory),
        **({"model_impl": "transformers"} | options),
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
        context_length=256,
        max_total_tokens=2048,
        chunked_prefill_size=16,
        inline=True,
        log_level="error",
    ) as engine:
        yield engine


def worst_difference(directory: Path, **options: Any) -> float:
    """Between our log-probabilities and those of transformers without a cache: of prompts in chunks, computed together,
    and of a prompt that the cache knows; ids that are not the best count as far as they lie below it."""
    prompts = [[3 + i for i in ids] for ids in random_prompts(VOCAB_SIZE - 3, LENGTHS)]
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    with served(directory, **options) as engine:
        results = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True, logprob_start_len=0)
        warm = engine.generate(input_ids=prompts[-1], sampling_params=params, return_logprob=True)
    architecture = transformers.AutoConfig.from_pretrained(directory).architectures[0]
    cached, known = warm["meta_info"]["cached_tokens"], len(prompts[-1]) - 1
    # A state is known where it was saved alone; test_fallback_states.py is about these models.
    assert 0 < cached <= known if architecture in recurrent_fallback.AGREE else cached == known
    model = getattr(transformers, architecture).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    pairs = [*zip(prompts, results, strict=True), (prompts[-1], warm)]
    return max(_difference(model, prompt, result) for prompt, result in pairs)


@torch.inference_mode()
def _difference(model: Any, prompt: list[int], result: dict[str, Any]) -> float:
    meta, ids = result["meta_info"], [*prompt, *result["output_ids"]]
    expected = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)[:-1]
    entries = [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"]]
    ours = torch.tensor([entry[0] for entry in entries])
    expected = expected[-len(ours) :]
    chosen = expected.gather(1, torch.tensor(ids[-len(ours) :])[:, None])[:, 0]
    below_best = (expected.max(-1).values - chosen)[-NEW_TOKENS:]
    return max(float((ours - chosen).abs().max()), float(below_best.max()))


def reason_of(error: BaseException) -> str:
    """Why the fallback refused, from the chain of an error; empty if it did not."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UnservableModelError):
        cause = cause.__cause__
    return str(cause or "")


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("OPTForCausalLM", {}),  # learned positions
        ("Gemma2ForCausalLM", {}),  # windows in every other layer, soft caps of scores and of logits
        ("GptOssForCausalLM", {}),  # sinks and experts
        ("DeepseekV2ForCausalLM", {}),  # values of another size than keys
        ("CohereForCausalLM", {"num_key_value_heads": 1}),  # its head scales logits
    ],
)
def test_agrees_with_transformers(architecture: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    make_tiny(architecture, tmp_path, **overrides)
    assert worst_difference(tmp_path) < TOLERANCE


def test_auto_takes_it_where_there_is_no_model_file(tmp_path: Path) -> None:
    make_tiny("BioGptForCausalLM", tmp_path)
    assert worst_difference(tmp_path, model_impl="auto") < TOLERANCE
    with pytest.raises(UnknownArchitectureError, match="BioGptForCausalLM"), served(tmp_path, model_impl="rtp_llm"):
        pass


def test_remote_code(tmp_path: Path) -> None:
    make_tiny("LlamaForCausalLM", tmp_path)
    (tmp_path / "tiny_remote.py").write_text(
        "import transformers\n"
        "class RemoteConfig(transformers.LlamaConfig):\n    model_type = 'tiny_remote'\n"
        "class RemoteForCausalLM(transformers.LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "tiny_remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "tiny_remote.RemoteConfig",
        "AutoModelForCausalLM": "tiny_remote.RemoteForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    prompt = random_prompts(VOCAB_SIZE, LENGTHS)[1]
    with served(tmp_path, model_impl="auto", trust_remote_code=True) as engine:
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        result = engine.generate(input_ids=prompt, sampling_params=params, return_logprob=True, logprob_start_len=0)
    assert _difference(expected, prompt, result) < TOLERANCE


def test_missing_and_left_over_weights_are_errors(tmp_path: Path) -> None:
    make_tiny("LlamaForCausalLM", tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.nonsense.weight"] = weights.pop("model.norm.weight")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightLoadError) as error, served(tmp_path):
        pass
    assert "model.norm.weight" in str(error.value) and "nonsense" in str(error.value)


def test_a_model_that_looks_at_other_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token shift, as if it were a convolution that nothing declares."""
    make_tiny("LlamaForCausalLM", tmp_path)
    plain = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP,
        "forward",
        lambda self, x: plain(self, x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]),
    )
    with pytest.raises(ModelBuildError, match="something in it besides attention"), served(tmp_path):
        pass


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("InklingForCausalLM", {}, "attention is given position_bias, which ours does not know"),
        ("Llama4ForCausalLM", {}, "chunked"),
        ("BloomForCausalLM", {}, "ALiBi"),
        ("GPTJForCausalLM", {}, "computes attention by itself"),
        ("BartForCausalLM", {"decoder_layers": 2, "decoder_attention_heads": 4}, "cross-attention"),
        ("BertLMHeadModel", {"is_decoder": False}, "bidirectional attention"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
    ],
)
def test_refuses_and_says_what_is_missing(
    architecture: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make_tiny(architecture, tmp_path, **overrides)
    with pytest.raises(ModelBuildError, match=reason), served(tmp_path):
        pass


def test_auto_says_why_transformers_cannot_step_in_either(tmp_path: Path) -> None:
    make_tiny("BartForCausalLM", tmp_path, decoder_layers=2, decoder_attention_heads=4)
    with (
        pytest.raises(
            UnknownArchitectureError, match=r"no model for .*(.|\n)*Nor can it run through transformers.*an encoder"
        ),
        served(tmp_path, model_impl="auto"),
    ):
        pass


def test_a_model_that_sees_is_refused_by_its_name(tmp_path: Path) -> None:
    make_seeing(tmp_path)
    with (
        pytest.raises(ModelBuildError, match="Qwen2VLForConditionalGeneration takes images, and models run by"),
        served(tmp_path, model_impl="transformers"),
    ):
        pass


def test_a_model_that_sees_and_is_a_language_model_too_runs_with_text_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers lists Gemma 3 among both. Its images would otherwise be taken for words."""
    model_dir = SEEING_TWINS["Gemma3ForConditionalGeneration"].make(tmp_path)
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    with open_vision_engine(model_dir) as engine:
        expected = engine.generate("Tell me a story", params)["output_ids"]
    with open_vision_engine(model_dir, model_impl="transformers", log_level="warning") as engine:
        assert engine.generate("Tell me a story", params)["output_ids"] == expected
        with pytest.raises(InvalidRequest, match="the model takes text only, but the prompt comes with image data"):
            engine.generate("See <start_of_image>", params, image_data=[Image.new("RGB", (40, 40))])
    assert "Gemma3ForConditionalGeneration takes images, but by transformers' code only text" in caplog.text


@pytest.mark.slow
def test_every_causal_language_model_agrees_or_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = {}
    for architecture in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        verdicts[architecture] = verdict = judge(architecture, tmp_path / architecture)
        with capsys.disabled():
            print(f"\n{architecture:42} {verdict.kind:9} {verdict.why}", end="", flush=True)
    kinds = Counter(verdict.kind for verdict in verdicts.values())
    refused = [verdict.why for verdict in verdicts.values() if verdict.kind == "refused"]
    has_state = [why for why in refused if any(state in why for state in STATE)]
    is_apart = [why for why in refused if "computes attention by itself" in why]
    within_reach = len(verdicts) - kinds["not made"] - len(has_state) - len(is_apart)
    with capsys.disabled():
        print(
            f"\n{dict(kinds)}; {len(has_state)} keep another state, {len(is_apart)} bypass the attention interface; "
            f"of the other {within_reach}, {kinds['agrees']} agree"
        )
    assert not [name for name, verdict in verdicts.items() if verdict.kind == "wrong"]
    assert kinds["agrees"] >= 0.9 * within_reach


def judge(architecture: str, directory: Path) -> Verdict:
    try:
        with _time_limit(SECONDS_PER_ARCHITECTURE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _judge(architecture, directory)
    except TooSlow as error:
        return Verdict("wrong", str(error))


def _judge(architecture: str, directory: Path) -> Verdict:
    try:
        make(architecture, directory)
    except Exception as error:  # whatever transformers may raise over a configuration that is none of its presets
        return Verdict("not made", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    try:
        difference = worst_difference(directory)
    except Exception as error:  # a refusal, or what the test is after
        reason = reason_of(error)
        return Verdict("refused", reason) if reason else Verdict("wrong", f"{type(error).__name__}: {error}")
    return Verdict("agrees" if difference < TOLERANCE else "wrong", f"{difference:.0e}")


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow once this process has computed for so long within the block; what it waits does not count."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"took more than {seconds} s of the processor")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def test_the_time_limit_is_of_the_processor() -> None:
    with _time_limit(0.5):
        time.sleep(1.0)
    with pytest.raises(TooSlow, match=r"0\.1 s of the processor"), _time_limit(0.1):
        while True:
            pass
