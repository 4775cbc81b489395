"""What the runner asks of an external model class: how it is built, filled and called, and what it is told if not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rtp_llm import Engine, ModelRegistry
from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.layers.auto_weights import AutoWeightsLoader, WeightsMapper
from rtp_llm.srt.layers.weights import default_weight_loader
from rtp_llm.srt.managers.engine_client import EngineStopped
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.weight_loading import WeightLoadError
from tiny_models import TINY_MODELS, Reference, assert_same_ids, random_prompts, reference, tiny_model

MODEL = "llama-default"
NEW_TOKENS = 8
[PROMPT] = random_prompts(TINY_MODELS[MODEL].vocab_size, (23,))


@pytest.fixture
def expected() -> Reference:
    return reference(tiny_model(MODEL), tuple(PROMPT), NEW_TOKENS)


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers a class under its own name, and serves with it a checkpoint that names it."""

    def run(model_class: type) -> dict[str, Any]:
        name = model_class.__name__
        shutil.copytree(tiny_model(MODEL), tmp_path / name)
        config_file = tmp_path / name / "config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"architectures": [name]}))
        monkeypatch.setitem(ModelRegistry.models, name, model_class)
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        options = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "max_total_tokens": 256}
        with Engine(model_path=str(tmp_path / name), **options) as engine:
            return engine.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True, logprob_start_len=0)

    return run


def assert_right(result: dict[str, Any], expected: Reference) -> None:
    assert_same_ids(result["output_ids"], expected)
    logprobs = [entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]]
    assert logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-3)


def test_forward_batch_is_called_where_there_is_one(generate: Any, expected: Reference) -> None:
    class WithMethod(LlamaForCausalLM):
        def forward_batch(self, batch):
            calls.append(batch.input_ids.tolist())
            return super().forward(batch.input_ids, batch.positions, batch)

        def forward(self, *args):
            raise AssertionError("forward_batch() is there")

    calls: list[list[int]] = []
    result = generate(WithMethod)
    assert_right(result, expected)
    assert calls == [PROMPT, *([token] for token in result["output_ids"][:-1])]


@pytest.mark.parametrize("returns_names", [True, False])
def test_load_weights_as_vllm_writes_it(generate: Any, expected: Reference, returns_names: bool) -> None:
    class OwnLoader(LlamaForCausalLM):
        def load_weights(self, weights):
            stacked = [("qkv_proj", f"{x}_proj", x) for x in "qkv"]
            stacked += [("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1)]
            params, loaded = dict(self.named_parameters()), set()
            for name, tensor in weights:
                for packed, source, shard_id in stacked:
                    if source in name:
                        name = name.replace(source, packed)
                        params[name].weight_loader(params[name], tensor, shard_id)
                        break
                else:
                    getattr(params[name], "weight_loader", default_weight_loader)(params[name], tensor)
                loaded.add(name)
            return loaded if returns_names else None

    assert_right(generate(OwnLoader), expected)


def test_load_weights_by_a_mapper(generate: Any, expected: Reference) -> None:
    class OwnLoader(LlamaForCausalLM):
        def load_weights(self, weights):
            stacked = {f".{x}_proj": (".qkv_proj", x) for x in "qkv"}
            stacked |= {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
            return AutoWeightsLoader(self).load_weights(weights, mapper=WeightsMapper(orig_to_new_stacked=stacked))

    assert_right(generate(OwnLoader), expected)


def test_a_loader_that_forgets_parameters(generate: Any) -> None:
    class Forgetful(LlamaForCausalLM):
        def load_weights(self, weights):
            return {name for name, _ in weights if "norm" in name}

    with pytest.raises(WeightLoadError, match=r"not fit Forgetful:\n14 .* not set by its load_weights:\n  lm_head"):
        generate(Forgetful)


def test_a_bug_in_a_loader(generate: Any) -> None:
    class Buggy(LlamaForCausalLM):
        def load_weights(self, weights):
            raise KeyError("model.layers.0.no_such.weight")

    with pytest.raises(WeightLoadError, match=r"Buggy\.load_weights failed: KeyError: 'model\.layers\.0\.no_such"):
        generate(Buggy)


class Plain(nn.Module):
    """No quantization, no prefix: its author forgot them."""

    def __init__(self, config):
        super().__init__()


class OfVLLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()


class Renamed(LlamaForCausalLM):
    def __init__(self, hf_config, quant_config=None):
        super().__init__(hf_config, quant_config)


class NoModule:
    def __init__(self, config, quant_config=None):
        pass


class Buggy(LlamaForCausalLM):
    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.size = config.no_such_field


class Uncached(LlamaForCausalLM):
    def __init__(self, config, quant_config=None):
        super().__init__(config, quant_config)
        self.model.layers = nn.ModuleList()

    def load_weights(self, weights):
        for parameter in self.parameters():
            parameter.data.zero_()


WRITE_IT = r"Write it as __init__\(self, config, quant_config=None, prefix=''\)"


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (Plain, rf"takes \(config\): got an unexpected keyword argument 'quant_config'\. {WRITE_IT}"),
        (OfVLLM, rf"takes \(\*, vllm_config, prefix=''\): .*\. {WRITE_IT}"),
        (Renamed, rf"takes \(hf_config, quant_config=None\): .*'hf_config'\. {WRITE_IT}"),
        (NoModule, r"is not a torch\.nn\.Module"),
        (Buggy, r"cannot be built from .*config\.json: AttributeError: .*no_such_field' \(.*_method\.py, line \d+\)$"),
    ],
)
def test_a_class_that_cannot_be_built(generate: Any, model_class: type, message: str) -> None:
    with pytest.raises(ModelBuildError, match=f"^{model_class.__name__} .*{message}"):
        generate(model_class)


def test_a_class_without_attention_layers(generate: Any) -> None:
    with pytest.raises(ValueError, match="no RadixAttention layer"):
        generate(Uncached)


class RaisesInForward(LlamaForCausalLM):
    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        raise RuntimeError("out of ideas")


class ReturnsLogits(LlamaForCausalLM):
    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        return super().forward(input_ids, positions, forward_batch).next_token_logits


class ReturnsNothing(LlamaForCausalLM):
    def forward_batch(self, batch):
        pass


class ReturnsAllRows(LlamaForCausalLM):
    def forward_batch(self, batch):
        output = self.forward(batch.input_ids, batch.positions, batch)
        output.next_token_logits = torch.zeros(batch.num_tokens, 131)
        return output


class TakesTooLittle(LlamaForCausalLM):
    def forward(self, input_ids, positions):
        pass


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (RaisesInForward, "RuntimeError.*out of ideas"),
        (ReturnsLogits, r"ReturnsLogits\.forward must return .*LogitsProcessorOutput.*, not Tensor"),
        (ReturnsNothing, r"ReturnsNothing\.forward_batch must return .*LogitsProcessorOutput.*, not NoneType"),
        (ReturnsAllRows, "ReturnsAllRows returned 23 rows of next_token_logits, not 1: "),
        (TakesTooLittle, r"forward\(\) takes 3 positional arguments but 4 were given"),
    ],
)
def test_a_class_that_cannot_be_called(generate: Any, model_class: type, message: str) -> None:
    with pytest.raises(EngineStopped, match=message):
        generate(model_class)
