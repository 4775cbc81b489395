"""What model files may say: read from their classes and instances, checked, and known from what is only alike."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt import model_traits
from rtp_llm.srt.cache.spec import LengthScaling
from rtp_llm.srt.layers.moe import FusedMoE
from rtp_llm.srt.layers.pooler import Pooler
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import MRotaryEmbedding, RotaryEmbedding
from rtp_llm.srt.model_traits import (
    LAYER_TRAITS,
    FinishesLoad,
    KeepsCache,
    ModelTraits,
    NamesSources,
    PreparesForward,
    ReplaysForward,
    TakesMropePositions,
    TraitError,
)
from rtp_llm.srt.models.weight_loading import load_weights
from rtp_llm.srt.worker.layout import cache_layout, takes_mrope_positions

PAGES = Path(__file__).resolve().parents[3] / "docs" / "supported_models"


def names_of_the_table(page: str, heading: str) -> list[str]:
    section = (PAGES / page).read_text().split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    return re.findall(r"^\| `(\w+)[`(]", section, re.MULTILINE)


def test_every_trait_is_in_the_tables() -> None:
    assert names_of_the_table("support_new_models.md", "### What a model can say") == [
        trait.name for trait in fields(ModelTraits)
    ]
    assert sorted(names_of_the_table("layers.md", "## What a layer can say")) == sorted(LAYER_TRAITS)


def test_every_name_of_a_protocol_is_a_layers_trait() -> None:
    """So that a misspelt one is found."""
    protocols = [kind for kind in vars(model_traits).values() if getattr(kind, "_is_protocol", False)]
    named = {name for kind in protocols for name in [*vars(kind), *kind.__annotations__] if name.islower()}
    assert {name for name in named if not name.startswith("_")} - {"layer_id"} == LAYER_TRAITS


class Plain(nn.Module):
    pass


class Talkative(nn.Module):
    packed_modules_mapping = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    rename = [(r"^wte\.", "embed.")]
    ignore = (r"\.bias$",)
    weight_defaults = None
    replays_steps = False
    generates = False

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.max_media_block = 256
        self.poolers = {"embed": Pooler("mean", 8)}

    @property
    def max_positions(self) -> int:
        return 1024

    def load_weights(self, weights: Any) -> None:
        pass

    def forward_batch(self, batch: Any) -> None:
        pass

    def pad_input_ids(self, input_ids: list[int], mm_inputs: Any) -> list[int]:
        return input_ids


def test_what_is_said_and_what_is_not() -> None:
    assert ModelTraits.of(Plain()) == ModelTraits()
    model = Talkative()
    assert ModelTraits.of(model) == ModelTraits(
        packed_modules_mapping=Talkative.packed_modules_mapping,
        rename=Talkative.rename,
        ignore=Talkative.ignore,
        load_weights=model.load_weights,
        forward_batch=model.forward_batch,
        pad_input_ids=model.pad_input_ids,
        max_positions=1024,
        max_media_block=256,
        replays_steps=False,
        poolers=model.poolers,
        generates=False,
    )


def test_of_a_class() -> None:
    """What its constructor says later, and its properties, are as if not said."""
    said = ModelTraits.of(Talkative)
    assert (said.rename, said.max_positions, said.max_media_block) == (Talkative.rename, None, 0)
    assert said.pad_input_ids is not None and ModelTraits.of(Plain).pad_input_ids is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("packed_modules_mapping", {"qkv": "q"}, r"a dict \{module: .*\"up_proj\"\]\}, not \{'qkv': 'q'\}"),
        ("packed_modules_mapping", [("qkv", ["q"])], "a dict"),
        ("rename", {"a": "b"}, "a list of pairs"),
        ("rename", [("a", "b", "c")], "a list of pairs"),
        ("rename", [("(", "b")], "a list of pairs"),
        ("ignore", "visual", "a list of regular expressions, not 'visual'"),
        ("ignore", ["("], "a list of regular expressions"),
        ("weight_defaults", {"a": ["b"]}, "a dict"),
        ("load_weights", 3, "a method"),
        ("forward_batch", {}, "a method"),
        ("pad_input_ids", [], "a method"),
        ("max_positions", -1, "a number of tokens, not -1"),
        ("max_positions", "1024", "a number of tokens"),
        ("max_media_block", True, "a number of tokens, not True"),
        ("max_media_block", 2.0, "a number of tokens"),
        ("replays_steps", 0, "True or False, not 0"),
    ],
)
def test_forms_are_checked(name: str, value: object, message: str) -> None:
    for said in (type("Wrong", (nn.Module,), {name: value}), type("Wrong", (nn.Module,), {name: value})()):
        with pytest.raises(TraitError, match=rf"^Wrong\.{name} must be {message}"):
            ModelTraits.of(said)


MISSPELT = {
    "packed_module_mapping": "packed_modules_mapping",
    "packed_modules_mappings": "packed_modules_mapping",
    "renames": "rename",
    "ignored": "ignore",
    "weights_defaults": "weight_defaults",
    "load_weight": "load_weights",
    "forward_batches": "forward_batch",
    "pad_inputs_ids": "pad_input_ids",
    "max_position": "max_positions",
    "max_media_blocks": "max_media_block",
    "replay_steps": "replays_steps",
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_name_is_refused(name: str) -> None:
    """On a class whose parent has the right one, too, and on an instance."""
    model = LlamaForCausalLM.__new__(LlamaForCausalLM)
    nn.Module.__init__(model)
    setattr(model, name, None)
    for said in (type("Mine", (LlamaForCausalLM,), {name: None}), model):
        with pytest.raises(TraitError, match=rf"{name} is not among .*: is {MISSPELT[name]} meant\?"):
            ModelTraits.of(said)


def test_a_misspelt_name_of_a_layer_is_refused() -> None:
    class Layer(nn.Module):
        def finish_loading(self) -> None:
            pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(Layer())])

    with pytest.raises(TraitError, match=r"^Layer\.finish_loading is not among .*: is finish_load meant\?"):
        ModelTraits.of(Model())
    with pytest.raises(TraitError, match="finish_load meant"):  # told before any weight is read
        load_weights(Model(), iter(()))


# Of files written for vLLM and SGLang, and of ordinary ones: names that are a model's own.
THEIR_NAMES = """
    allow_patterns_overrides bitsandbytes_stacked_params_mapping capture_aux_hidden_states
    column_parallel_weights_modules compute_logits config custom_load_weights
    default_bitsandbytes_target_modules default_pooling_type dtype embed_input_ids embedding_modules
    embedding_padding_modules expert_params_mapping fall_back_to_pt_during_load forward forward_split_prefill
    get_embed_and_head get_expert_mapping get_hidden_dim get_image_feature get_input_embeddings
    get_language_model get_module_name_from_weight_name get_mrope_input_positions get_multimodal_embeddings
    get_placeholder_str get_stacked_multiplier get_video_feature get_weights_by_name has_inner_state
    hf_to_vllm_mapper is_3d_moe_weight is_hybrid ignore_keys length_penalty length_scale load_kv_cache_scales
    load_weights_vision lora_pattern lora_skip_prefixes make_empty_intermediate_tensors max_model_len
    max_position_embeddings merge_by_field_config model model_config name name_mapping num_layers pack_params
    post_load_weights prepare_inputs_for_generation prepare_for_training sampler score_template
    set_eagle3_layers_to_capture set_embed_and_head should_apply_lora stacked_params_mapping start_layer
    supported_lora_modules supports_lora supports_pp tie_weights update_weights vision_feature_layer
    weight_scale weights_mapper
"""


def test_names_of_other_engines_are_let_be() -> None:
    """Nor does an underscore, or a second name beside the right one, make a misspelt one."""
    theirs = dict.fromkeys(THEIR_NAMES.split())
    own = {"_ignored": 1, "load_weights": len, "reload_weights": len}
    assert ModelTraits.of(type("Theirs", (nn.Module,), theirs | own)()).load_weights is not None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = type("Layer", (nn.Module,), theirs | {"replay_steps": None})()

    assert ModelTraits.of(Model()) == ModelTraits()


def test_what_our_layers_say() -> None:
    attention, moe = RadixAttention(2, 4, 0.5, 1, layer_id=7), FusedMoE(2, 1, 4, 4)
    assert isinstance(attention, KeepsCache) and not isinstance(attention, PreparesForward)
    assert isinstance(moe, NamesSources) and not isinstance(moe, KeepsCache)
    assert issubclass(RotaryEmbedding, ReplaysForward) and issubclass(MRotaryEmbedding, ReplaysForward)
    assert not isinstance(
        nn.Linear(1, 1), (KeepsCache, PreparesForward, NamesSources, TakesMropePositions, FinishesLoad)
    )


class Recurrent(nn.Module):
    """A layer of one's own, which is no RadixAttention, and whose keys depend on lengths."""

    layer_id = 3
    takes_mrope_positions = True
    length_scaling = LengthScaling(16, per_length=True)

    def cache_spec(self) -> Any:
        return RadixAttention(2, 4, 0.5, 1, layer_id=3, window=5).cache_spec()


def test_a_layer_of_ones_own_is_known_by_what_it_says() -> None:
    model = nn.ModuleList([Recurrent(), RadixAttention(2, 4, 0.5, 1, layer_id=0), Recurrent()])
    layout = cache_layout(model, page_size=4)
    assert [(group.layer_ids, group.window) for group in layout.groups] == [((0,), None), ((3,), 5)]
    assert layout.length_scaling == LengthScaling(16, per_length=True)
    assert takes_mrope_positions(model) and not takes_mrope_positions(model[1])
    model[2].takes_mrope_positions = model[0].takes_mrope_positions = False
    assert not takes_mrope_positions(model)


def test_a_module_may_finish_what_it_loaded() -> None:
    layer = nn.Linear(1, 1)
    layer.finish_load = lambda: None
    assert isinstance(layer, FinishesLoad)
    assert torch.is_tensor(layer.weight)
