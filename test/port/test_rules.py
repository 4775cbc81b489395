"""Each rule, on a snippet."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_file import HEAD

from rtp_llm.port.porter import Ported, port

Porter = Callable[..., Ported]


def flat(text: str) -> str:
    """Text without its line breaks in brackets, so that layout does not matter."""
    text = re.sub(r"([(\[{])\s+", r"\1", text)
    return re.sub(r",?\s+([)\]}])", r"\1", re.sub(r",\n\s+", ", ", text))


def model(init: str = "pass", forward: str = "return input_ids", methods: str = "", before: str = "") -> str:
    """A model class whose constructor and forward hold these statements."""

    def block(text: str) -> str:
        return "\n".join("        " + line for line in text.strip("\n").splitlines())

    return f"""
{before}

class BoatForCausalLM(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        cache_config = vllm_config.cache_config
{block(init)}

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
{block(forward)}

{methods}

    def compute_logits(self, hidden_states):
        return self.logits_processor(self.lm_head, hidden_states)
"""


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        # constants of this engine
        ("self.a = config.p if get_pp_group().is_last_rank else config.q", "self.a = config.p"),
        ("if not get_pp_group().is_first_rank:\n    self.a = 1\nelif config.x:\n    self.a = 2", "if config.x:"),
        ("self.a = config.x and get_pp_group().is_last_rank", "self.a = config.x"),
        ("on = vllm_config.parallel_config.enable_eplb\nself.a = config.p if on else config.q", "self.a = config.q"),
        ("self.a = vllm_config.model_config.dtype", "self.a = torch.get_default_dtype()"),
        ("self.a = vllm_config.model_config.hf_text_config.x", "self.a = config.get_text_config().x"),
        ("self.a = config.p(getattr(vllm_config, 'unheard_of', 7))", "self.a = config.p(7)"),
        ("self.a = config.y if cache_config is not None else 0", "self.a = config.y"),
        ("self.a = config.y if cache_config.mamba_cache_mode == 'all' else config.z", "self.a = config.z"),
        # what stays, as it says nothing of the engine
        ("b = False\nself.a = 1 if b else 2", "self.a = 1 if b else 2"),
        # layers and helpers
        ("self.a = GeluAndMul()", 'self.a = GeluAndMul("none")'),
        ('self.a = GeluAndMul(approximate="tanh")', 'self.a = GeluAndMul(approximate="tanh")'),
        ('self.a = maybe_prefix(prefix, "x")', 'self.a = add_prefix("x", prefix)'),
        ('self.a = f"{prefix}.x.{config.y}"', 'self.a = add_prefix(f"x.{config.y}", prefix)'),
        ('self.a = f"{config}.x"', 'self.a = f"{config}.x"'),
        (
            "self.start_layer, self.end_layer, self.layers = make_layers(3, lambda prefix: RMSNorm(8), prefix=prefix)",
            "self.layers = make_layers(3, lambda idx, prefix: RMSNorm(8), prefix=prefix)",
        ),
        (
            "self.a = LogitsProcessor(config.vocab_size, scale=config.s)",
            "LogitsProcessor(config, logit_scale=config.s)",
        ),
        ("self.a = LogitsProcessor(9, config.text.vocab_size)", "self.a = LogitsProcessor(config.text)"),
        ("self.lm_head.tie_weights(self.b)", "self.lm_head = self.b"),
        ("self.a = RowParallelLinear(8, 8, True, True, prefix=prefix)", "input_is_parallel=True"),
        ("self.a = VocabParallelEmbedding(9, 8, padding_size=64)", "self.a = VocabParallelEmbedding(9, 8)"),
        ("self.a = str_dtype_to_torch_dtype(config.d)", "self.a = getattr(torch, config.d)"),
        ("self.a = config.p * OCP_MX_BLOCK_SIZE", "self.a = config.p * 32"),
    ],
)
def test_statements_of_a_constructor(ported: Porter, theirs: str, ours: str):
    before = "from vllm.helpers import OCP_MX_BLOCK_SIZE, str_dtype_to_torch_dtype"
    result = ported(model(init=theirs, before=before))
    assert ours in flat(result.text), result.text
    assert result.report.is_complete, result.report


ATTENTION = "self.attn = Attention(4, 8, 1.0, {})"


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ("num_kv_heads=2", "layer_id=extract_layer_index(prefix)"),
        ("2", "num_kv_heads=2"),
        ("", "num_kv_heads=4"),
        ("2, cache_config=cache_config", "window=model_window(config)"),
        ("2, per_layer_sliding_window=config.w", "window=config.w"),
        ("2, cache_config=cache_config, per_layer_sliding_window=w", "window=model_window(config, w)"),
        ("2, logits_soft_cap=config.cap", "logit_cap=config.cap or 0.0"),
        ("2, logits_soft_cap=30.0", "logit_cap=30.0"),
        ("2, head_size_v=16", "v_head_dim=16"),
        ("2, alibi_slopes=slopes", "alibi_slopes=slopes"),
    ],
)
def test_arguments_of_attention(ported: Porter, arguments: str, ours: str):
    theirs = "w = slopes = config.something\n" + ATTENTION.format(f'{arguments}, prefix=f"{{prefix}}.attn"'.strip(", "))
    text = flat(ported(model(init=theirs)).text)
    [call] = re.findall(r"self\.attn = RadixAttention\(.*\)", text)
    assert call.startswith("self.attn = RadixAttention(4, 8, 1.0, ") and ours in call
    assert "cache_config" not in text and "sliding_window" not in text


@pytest.mark.parametrize("more", ["shape", "shape, x.dtype", "output_dtype=x.dtype, output_shape=shape"])
def test_where_attention_writes_its_output_is_not_said(ported: Porter, more: str):
    init, forward = ATTENTION.format("2, prefix=prefix"), f"x = inputs_embeds\nreturn self.attn(x, x, x, {more})"
    result = ported(model(init, forward))
    assert "self.attn(x, x, x, forward_batch)" in result.text and result.report.is_complete


def test_a_choice_of_attentions_kernels_goes(ported: Porter):
    init = f"""
if config.odd:
    asked = vllm_config.attention_config.backend
    if asked is not None and asked.name == "FAST":
        kind = asked
    else:
        fast = AttentionBackendEnum.FAST.get_class()
        assert hasattr(fast, "supports_odd")
        if fast.supports_odd(config.size):
            kind = AttentionBackendEnum.FAST
        else:
            kind = AttentionBackendEnum.SLOW
    backend = kind.get_class()
    backend.set_size(config.size)
    logger.info_once("on %s", backend.get_name())
else:
    backend = None
{ATTENTION.format("2, attn_backend=backend, prefix=prefix")}
logger.warning_once("built with %s", config.size, scope="local")
"""
    head = HEAD + "from vllm.logger import init_logger\nlogger = init_logger(__name__)\n"
    result = ported(model(init, before="from vllm.v1.backends import AttentionBackendEnum"), head=head)
    assert "backend" not in result.text and "kind" not in result.text and result.report.is_complete, result.text
    assert 'logger.warning("built with %s", config.size)' in result.text


@pytest.mark.parametrize(
    "option", ["sinks=self.sinks", 'kv_sharing_target_layer_name="layers.0.attn"', "chunk_lookback=config.blocks"]
)
def test_attention_with_sinks_or_a_shared_cache_keeps_its_name(ported: Porter, option: str):
    text = flat(ported(model(init=ATTENTION.format(f"2, per_layer_sliding_window=5, {option}, prefix=prefix"))).text)
    assert f"self.attn = Attention(4, 8, 1.0, num_kv_heads=2, per_layer_sliding_window=5, {option}" in text
    assert "from rtp_llm.srt.layers.attention import Attention" in text


def test_slopes_of_the_root_of_distances_are_told(ported: Porter):
    init = ATTENTION.format("2, alibi_slopes=config.slopes, use_alibi_sqrt={}, prefix=prefix")
    result = ported(model(init.format("False")))
    assert "alibi_sqrt" not in result.text and result.report.is_complete
    result = ported(model(init.format("True")))
    assert "self.attn = Attention(" in result.text and "use_alibi_sqrt=True" in result.text
    assert [remark.text for remark in result.report.not_portable] == [
        "not portable: use_alibi_sqrt needs scores that are lowered by the root of the distance"
    ]


RECURRENT = """
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
"""


@pytest.mark.parametrize(
    ("call", "ours"),
    [
        ("y = torch.empty_like(x)\nself.a(x, y)", "y = self.a(x, forward_batch=forward_batch)"),
        (
            "y = torch.zeros_like(x)\nself.a(hidden_states=x, output=y)",
            "y = self.a(hidden_states=x, forward_batch=forward_batch)",
        ),
        ("y = self.b(x, mup_vector=x)", "y = self.b(x, mup_vector=x, forward_batch=forward_batch)"),
    ],
)
def test_layers_that_keep_a_state_return_their_result(ported: Porter, call: str, ours: str):
    init = """
options = dict(is_lora_enabled=bool(vllm_config.lora_config))
self.a = MambaMixer(8, 4, cache_config=cache_config, is_lora_enabled=False, prefix=f"{prefix}.mixer")
self.b = MambaMixer2(8, 4, model_config=vllm_config.model_config, prefix=prefix)
"""
    result = ported(model(init, f"x = inputs_embeds\n{call}\nreturn y", before=RECURRENT))
    text = flat(result.text)
    assert ours in text and "torch." not in text and result.report.is_complete, text
    assert 'self.a = MambaMixer(8, 4, prefix=add_prefix("mixer", prefix))' in text
    assert "self.b = MambaMixer2(8, 4, prefix=prefix)" in text
    assert "from rtp_llm.srt.layers.recurrent import" in text


@pytest.mark.parametrize("given", ["config.part, vllm_config", "config.part, vllm_config=vllm_config"])
def test_a_layer_that_takes_the_whole_configuration_is_given_its_two_parts(ported: Porter, given: str):
    init = f"self.a = QwenGatedDeltaNetAttention({given}, prefix=prefix, gqa_interleaved_layout=True)"
    text = flat(ported(model(init, before=RECURRENT)).text).replace("config=config.part", "config.part")
    text = text.replace("quant_config=quant_config, prefix", "quant_config, prefix")
    call = "QwenGatedDeltaNetAttention(config.part, quant_config, prefix=prefix, gqa_interleaved_layout=True)"
    assert call in text, text


def test_a_class_chosen_for_encoders_is_the_causal_one(ported: Porter):
    chosen = "cls = EncoderOnlyAttention if config.encodes else Attention\nself.attn = cls(4, 8, 1.0, prefix=prefix)"
    result = ported(model(init=chosen))
    assert "self.attn = RadixAttention(" in result.text and "Encoder" not in result.text


def test_a_class_without_the_configuration_is_given_the_window(ported: Porter):
    before = """
class Heads(nn.Module):
    def __init__(self, size, cache_config=None, prefix=""):
        super().__init__()
        self.attn = Attention(4, size, 1.0, cache_config=cache_config, prefix=prefix)
"""
    text = flat(ported(model(init="self.a = Heads(8, cache_config, prefix=prefix)", before=before)).text)
    assert 'def __init__(self, size, window: int | None=None, prefix=""):' in text.replace(" = None", "=None")
    assert "window=window" in text
    assert "self.a = Heads(8, model_window(config), prefix=prefix)" in text


def test_the_batch_reaches_attention_through_lists_helpers_and_bases(ported: Porter):
    before = """
class Heads(nn.Module):
    def __init__(self, prefix):
        super().__init__()
        self.attn = Attention(4, 8, 1.0, prefix=prefix)
        self.mlp = RMSNorm(8)

    def forward(self, x):
        return self.mlp(self.look(x))

    def look(self, x):
        return self.attn(x, x, x)

class MoreHeads(Heads):
    def forward(self, x, times=1):
        return super().forward(x) * times
"""
    init = "self.blocks = nn.ModuleList([MoreHeads(f'{prefix}.{i}') for i in range(2)])"
    forward = "x = inputs_embeds\nfor i, block in enumerate(self.blocks):\n    x = block(x, times=i)\nreturn x"
    text = flat(ported(model(init, forward, before=before)).text)
    for expected in (
        "def look(self, x, forward_batch: ForwardBatch):",
        "return self.attn(x, x, x, forward_batch)",
        "return self.mlp(self.look(x, forward_batch=forward_batch))",
        "def forward(self, x, forward_batch: ForwardBatch, times=1):",
        "super().forward(x, forward_batch=forward_batch) * times",
        "block(x, times=i, forward_batch=forward_batch)",
        "def forward(self, input_ids, positions, forward_batch: ForwardBatch, input_embeds=None)",
    ):
        assert expected in text, f"{expected}\n{text}"


def test_the_batch_reaches_modules_that_are_made_elsewhere(ported: Porter):
    """By a function inside the constructor, through a list that is filled, or given as an argument."""
    before = """
class Heads(nn.Module):
    def __init__(self, prefix):
        super().__init__()
        self.attn = Attention(4, 8, 1.0, prefix=prefix)

    def forward(self, x):
        return self.attn(x, x, x)

class Around(nn.Module):
    def __init__(self, shared: Heads):
        super().__init__()
        self.shared = shared

    def forward(self, x):
        return self.shared(x)

KINDS = {"a": Heads}
"""
    init = """
def get_layer(prefix: str):
    kind = KINDS["a"]
    return kind(prefix)

self.start_layer, self.end_layer, self.layers = make_layers(3, get_layer, prefix=prefix)
more = []
for i in range(2):
    more.append(Around(Heads(f"{prefix}.{i}")))
self.more = nn.ModuleList(more)
self.rest = nn.ModuleList([])
for i in range(2):
    block = Heads(f"{prefix}.{i}") if i else nn.Identity()
    self.rest.append(block)
"""
    forward = """
x = self.rest[1](inputs_embeds)
for layer in self.layers:
    x = layer(x)
for block in self.more:
    x = block(x)
return x
"""
    text = flat(ported(model(init, forward, before=before)).text)
    for expected in (
        "return self.shared(x, forward_batch=forward_batch)",
        "x = self.rest[1](input_embeds, forward_batch=forward_batch)",
        "x = layer(x, forward_batch=forward_batch)",
        "x = block(x, forward_batch=forward_batch)",
    ):
        assert expected in text, f"{expected}\n{text}"


def test_one_of_several_attention_layers_of_a_block_has_a_cache_of_its_own(ported: Porter):
    init = 'self.a = nn.ModuleList([Attention(4, 8, 1.0, prefix=f"{prefix}.attn.{i}") for i in range(2)])'
    text = flat(ported(model(init)).text)
    assert 'layer_id=cache_number(add_prefix(f"attn.{i}", prefix))' in text, text


def test_the_batch_reaches_attention_in_a_dictionary(ported: Porter):
    init = """
self.attn = nn.ModuleDict()
for step in range(config.steps):
    self.attn[str(step)] = PrefillPrefixLMAttention(4, 8, 1.0, cache_config=cache_config, prefix=f"{prefix}.{step}")
"""
    before = "from vllm.model_executor.layers.attention import PrefillPrefixLMAttention"
    result = ported(model(init, "x = inputs_embeds\nreturn self.attn[str(0)](x, x, x)", before=before))
    assert "self.attn[str(0)](x, x, x, forward_batch=forward_batch)" in result.text and result.report.is_complete, (
        result.text
    )
    assert "from rtp_llm.srt.layers.attention import PrefillPrefixLMAttention" in result.text
    assert "cache_config" not in result.text


def test_a_model_named_by_an_attribute_of_the_class_is_given_the_batch(ported: Porter):
    before = """
class Inner(nn.Module):
    def __init__(self, prefix):
        super().__init__()
        self.attn = Attention(4, 8, 1.0, prefix=prefix)

    def forward(self, input_ids, positions, intermediate_tensors, inputs_embeds=None):
        return self.attn(inputs_embeds, inputs_embeds, inputs_embeds)
"""
    text = model("self.model = self.kind(prefix)", "return self.model(input_ids, positions, intermediate_tensors)")
    text = flat(ported(text.replace("(nn.Module):\n", "(nn.Module):\n    kind = Inner\n"), head=HEAD + before).text)
    assert "self.model(input_ids, positions, forward_batch)" in text


def test_loops_over_a_stages_layers_are_loops_over_all(ported: Porter):
    init = "self.start_layer, self.end_layer, self.layers = make_layers(3, lambda prefix: RMSNorm(8), prefix=prefix)"
    forward = """
for a in islice(self.layers, self.start_layer, self.end_layer):
    pass
for b in self.layers[self.start_layer : self.end_layer]:
    input_ids = b(input_ids)
for i in range(self.start_layer, self.end_layer):
    input_ids = self.layers[i](input_ids)
return input_ids
"""
    text = ported(model(init, forward, before="from itertools import islice")).text
    assert "for b in self.layers:" in text and "for i in range(0, len(self.layers)):" in text
    assert "islice" not in text


def test_states_captured_for_a_drafter_are_not_captured(ported: Porter):
    forward = """
aux = self._maybe_add_hidden_state([], 0, inputs_embeds, None)
self._maybe_add_hidden_state(aux, 1, inputs_embeds, None)
if len(aux) > 0:
    return inputs_embeds, aux
return inputs_embeds
"""
    text = ported(model(forward=forward)).text
    assert "aux" not in text
    assert "return self.logits_processor(input_ids, input_embeds, self.lm_head, forward_batch)" in text


def test_a_list_that_is_filled_is_left_alone(ported: Porter):
    text = ported(model(forward="seen = []\nseen.append(1)\nif len(seen) > 0:\n    return seen\nreturn input_ids")).text
    assert "if len(seen) > 0:" in text


def test_a_module_of_several_devices_keeps_the_plain_one(ported: Porter):
    before = """
from vllm.model_executor.custom_op import CustomOp

@CustomOp.register("twice")
class Twice(CustomOp):
    def forward_native(self, x):
        return x * 2

    def forward_cuda(self, x):
        return self.forward_native(x)
"""
    result = ported(model(init="self.a = Twice()", before=before))
    assert "class Twice(nn.Module):\n    def forward(self, x):\n        return x * 2\n" in result.text
    assert "cuda" not in result.text and result.report.is_complete


def test_the_plain_variant_of_a_layer_is_the_layer(ported: Porter):
    result = ported(model("self.norm = RMSNorm(8)", "return self.norm.forward_native(inputs_embeds)"))
    assert "self.norm(input_embeds)" in result.text and result.report.is_complete


def test_an_architecture_may_have_the_name_of_another_class(models: Path, whole_model: str):
    """A registry's name is that of the whole model; the part that has it in the file gets another."""
    table = '_TEXT_GENERATION_MODELS = {"BoatModel": ("harbor", "BoatForCausalLM")}'
    (models / "registry.py").write_text(table)
    (models / "harbor.py").write_text(HEAD + whole_model)
    text = port(models / "harbor.py").text
    assert "class BoatModel_harbor(nn.Module):" in text and "self.model = BoatModel_harbor(" in text
    assert "class BoatModel(BoatForCausalLM):\n    pass\n" in text and "EntryClass = BoatModel\n" in text


CONFIGS = {
    "config.py": '_CONFIG_REGISTRY = LazyConfigDict(\n    boat="BoatConfig",\n    raft="RaftConfig",\n)\n',
    "configs/boat.py": """
from transformers import PreTrainedConfig

SAILS = 3

class BoatConfig(PreTrainedConfig):
    model_type = "boat"
    attribute_map = {"num_hidden_layers": "num_planks"}

    def __init__(self, num_planks=2, num_sails=SAILS, **kwargs):
        self.num_planks, self.num_sails = num_planks, num_sails
        super().__init__(**kwargs)
""",
}


@pytest.mark.parametrize(
    ("kind", "is_declared"), [("BoatConfig", True), ('"BoatConfig | None"', False), ("RaftConfig", False)]
)
def test_a_configuration_of_the_other_engines_own_comes_along(
    ported: Porter, models: Path, kind: str, is_declared: bool
):
    """If the file says that it is the model's, and the other engine finds it by its type."""
    utils = models.parents[1] / "transformers_utils"
    (utils / "configs").mkdir(parents=True)
    for name, text in CONFIGS.items():
        (utils / name).write_text(text)
    before = f"""
from vllm.transformers_utils.configs.boat import BoatConfig

class Sail(nn.Module):
    def __init__(self, config: {kind}):
        super().__init__()
"""
    result = ported(model("self.sail = Sail(config)", before=before))
    assert ("    config_class = BoatConfig\n" in result.text) == is_declared, result.text
    assert ("class BoatConfig(PreTrainedConfig):" in result.text and "SAILS = 3" in result.text) == is_declared
    assert "import vllm" not in result.text and "from vllm" not in result.text and result.report.is_complete


def test_a_function_beside_configurations_comes_along(ported: Porter, models: Path):
    configs = models.parents[1] / "transformers_utils" / "configs"
    configs.mkdir(parents=True)
    (configs / "boat.py").write_text("def sail_of(config, layer):\n    return config.sails[layer]\n")
    before = "from vllm.transformers_utils.configs.boat import sail_of"
    result = ported(model("self.a = sail_of(config, 1)", before=before))
    assert "def sail_of(config, layer):" in result.text and "self.a = sail_of(config, 1)" in result.text
    assert result.report.is_complete


@pytest.mark.parametrize("name", ['"x.experts.routed_experts.w2"', 'f"{prefix}.x.experts.routed_experts.w2"'])
def test_experts_weights_are_the_layers_own(ported: Porter, name: str):
    assert "x.experts.w2" in ported(model(f"self.a = config.named({name})")).text


MAPPER = """
    hf_to_vllm_mapper = WeightsMapper({})

    def load_weights(self, weights):
        loader = AutoWeightsLoader(self)
        return loader.load_weights({}, mapper=self.hf_to_vllm_mapper)
"""


@pytest.mark.parametrize(
    ("mapping", "ours"),
    [
        ('orig_to_new_prefix={"a.": "b."}', r'rename = [(r"^a\.", "b.")]'),
        ('orig_to_new_suffix={".a": ".b"}', r'rename = [(r"\.a$", ".b")]'),
        ('orig_to_new_substr={"a": "b", "c": None}', 'ignore = [r"c"]'),
        ('orig_to_new_stacked={".v": (".qv", 1), ".q": (".qv", 0)}', 'packed_modules_mapping = {"qv": ["q", "v"]}'),
    ],
)
def test_names_of_weights_are_declared(ported: Porter, mapping: str, ours: str):
    text = ported(model(methods=MAPPER.format(mapping, "weights"))).text
    assert ours in text
    assert "load_weights" not in text and "Mapper" not in text


@pytest.mark.parametrize(
    ("mapping", "weights"),
    [
        ('orig_to_new_stacked={".a": (".ab", [0, 1])}', "weights"),  # one tensor for two parts
        ('orig_to_new_regex={PATTERN: "b"}', "weights"),
        ('orig_to_new_prefix={"a.": "b."}', "((name, weight + 1) for name, weight in weights)"),
    ],
)
def test_loading_that_does_more_is_kept(ported: Porter, mapping: str, weights: str):
    text = ported(model(methods=MAPPER.format(mapping, weights), before="PATTERN = 1")).text
    assert "def load_weights(self, weights):" in text
    assert "from rtp_llm.srt.layers.auto_weights import AutoWeightsLoader, WeightsMapper" in text


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            "self.a = vllm_config.scheduler_config.max_num_seqs",
            "vllm_config.scheduler_config.max_num_seqs is a setting of the other engine",
        ),
        ("self.a = [vllm_config.device_config.device]", "vllm_config is not defined any more"),
        ("self.a = KimiDeltaAttention(config)", "not portable: KimiDeltaAttention needs a recurrent layer of its own"),
        ("self.a = [gadget(config)]", "gadget of vllm.gadgets has no equivalent here"),
    ],
)
def test_what_is_left_gets_a_comment_above_its_line(ported: Porter, theirs: str, said: str):
    before = "from vllm.gadgets import gadget\nfrom vllm.model_executor.layers.kda import KimiDeltaAttention"
    result = ported(model(init=theirs, before=before))
    [remark] = (*result.report.review, *result.report.not_portable)
    assert said in remark.text
    lines = result.text.splitlines()
    assert lines[remark.line - 1].strip().startswith("# PORT: ")
    assert any(theirs.split("(")[0] in line for line in lines[remark.line : remark.line + 3])


def test_logits_changed_after_they_are_computed_are_told(ported: Porter):
    text = model().replace(
        "        return self.logits_processor(self.lm_head, hidden_states)",
        "        logits = self.logits_processor(self.lm_head, hidden_states)\n        return logits.tanh()",
    )
    result = ported(text)
    assert "the logits are changed" in result.report.review[0].text


def test_a_head_that_an_adapter_wraps_is_not_asked_for(ported: Porter):
    text = model().replace(
        "        return self.logits_processor(self.lm_head, hidden_states)",
        """        is_plain = hasattr(self.lm_head, "weight")
        if is_plain:
            logits = self.logits_processor(self.lm_head, hidden_states)
        else:
            logits = self.logits_processor(self.lm_head.base_layer, hidden_states)
        return logits""",
    )
    result = ported(text)
    assert "logits = self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)" in result.text
    assert "base_layer" not in result.text and "is_plain" not in result.text and result.report.is_complete


def test_types_of_the_other_engine_leave_annotations(ported: Porter):
    methods = "    def extra_repr(self, x: torch.Tensor | OtherThing, y: CacheThing) -> OtherThing | None: ..."
    text = ported(model(methods=methods, before="from vllm.things import CacheThing, OtherThing")).text
    assert "def extra_repr(self, x: torch.Tensor, y: object) -> None: ..." in text


@pytest.mark.parametrize(
    ("call", "ours"),
    [
        ("Part(vllm_config, config, quant_config=q, prefix=prefix)", "Part(config, quant_config=q, prefix=prefix)"),
        ("Part(vllm_config, config.text, q)", "Part(config.text, q)"),
        ("Part(vllm_config, prefix=prefix)", "Part(config, quant_config, prefix=prefix)"),
        (
            "Part(vllm_config=vllm_config.with_hf_config(config.text))",
            "Part(config=config.text, quant_config=quant_config)",
        ),
    ],
)
def test_a_part_that_takes_the_whole_configuration_and_more(ported: Porter, call: str, ours: str):
    before = """
class Part(nn.Module):
    def __init__(self, vllm_config: VllmConfig, config=None, quant_config=None, prefix=""):
        super().__init__()
        config = config or vllm_config.model_config.hf_config
        self.size = config.size
        vllm_config = get_current_vllm_config()
        self.norm = RMSNorm(self.size if vllm_config.parallel_config.enable_eplb else 3)
"""
    head = HEAD + "from vllm.config import get_current_vllm_config\n"
    result = ported(model(init=f"q = config.q\nself.part = {call}", before=before), head=head)
    assert f"self.part = {ours}" in flat(result.text), result.text
    assert "config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix" in flat(result.text)
    assert "RMSNorm(3)" in result.text and result.report.is_complete
