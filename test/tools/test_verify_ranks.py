"""``rtp-llm verify`` on two ranks: whether what they have is what one computes, and why not."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from broken_models import BrokenModel
from seeing_twins import SEEING_TWINS
from torch import nn

from rtp_llm.srt.checkpoint import read_model_config, read_tokenizer
from rtp_llm.srt.configs.model_config import read_architectures
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.model_file import served_by_file
from rtp_llm.tools.schedules import BATCHED, CHUNKED, SECOND_TURN, TWO_RANKS, ScheduleResult
from rtp_llm.tools.verify.joining import BY_COLUMNS, SAME, SIDE_BY_SIDE, SUMMANDS, joined
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.prompts import image_prompts, read_or_default_prompts
from rtp_llm.tools.verify.rank_causes import RankEvidence, explain_ranks
from rtp_llm.tools.verify.schedule_places import locate
from rtp_llm.tools.verify.sides import TheirModel
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, Place, Trace
from tiny_models import make_tiny, tiny_model

TOLERANCE = 1e-4
WHOLE = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
BIAS = torch.linspace(-1, 1, 8)


@pytest.mark.parametrize(
    ("parts", "how", "is_in_order"),
    [
        ((WHOLE, WHOLE), SAME, True),
        ((WHOLE - OTHER, OTHER), SUMMANDS, True),
        ((WHOLE[:, :4], WHOLE[:, 4:]), SIDE_BY_SIDE, True),
        ((WHOLE[:, [0, 1, 4, 5]], WHOLE[:, [2, 3, 6, 7]]), BY_COLUMNS, True),  # two projections, each split
        ((WHOLE[:, [0, 1, 6, 7]], WHOLE[:, [2, 3, 6, 7]][:, [0, 1, 2, 3]]), "", True),
        ((WHOLE[:, [0, 1, 2, 3, 6, 7]], WHOLE[:, [4, 5, 2, 3, 6, 7]]), BY_COLUMNS, False),
        ((WHOLE[:, 4:], WHOLE[:, :4]), BY_COLUMNS, False),
        ((WHOLE[:, :4], WHOLE[:, :4]), "", True),
        ((WHOLE[:3], WHOLE[:3]), "", True),
    ],
)
def test_parts_are_joined(parts: Sequence[torch.Tensor], how: str, is_in_order: bool) -> None:
    found = joined(parts, WHOLE, TOLERANCE)
    assert (found.how, found.is_in_order) == (how, is_in_order)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(8, 8)
        self.o_proj.bias = nn.Parameter(BIAS)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])


def traced(given: torch.Tensor, attended: torch.Tensor, total: torch.Tensor) -> Trace:
    trace = Trace(len(given))
    trace.tensors = {
        Place("layers.0.o_proj", INPUT): given,
        Place("layers.0.o_proj", OUTPUT): attended,
        Place("layers.0.norm", INPUT): total,
    }
    return trace


@pytest.mark.parametrize(
    ("attended", "totals", "module", "cause"),
    [
        ((WHOLE / 3, 2 * WHOLE / 3), (OTHER + WHOLE / 3, OTHER + 2 * WHOLE / 3), "layers.0.o_proj", "not summed over"),
        ((2 * WHOLE, 2 * WHOLE), (OTHER + 2 * WHOLE, OTHER + 2 * WHOLE), "layers.0.o_proj", "it is 2 times what one"),
        ((WHOLE + BIAS, WHOLE + BIAS), (OTHER, OTHER), "layers.0.o_proj", "its bias is added on every rank"),
        ((WHOLE, WHOLE), (OTHER + 2 * WHOLE, OTHER + 2 * WHOLE), "layers.0.norm", "layers.0.o_proj counts 2 times"),
    ],
)
def test_sums_over_ranks(
    attended: Sequence[torch.Tensor], totals: Sequence[torch.Tensor], module: str, cause: str
) -> None:
    given = torch.randn(9, 8, generator=torch.Generator().manual_seed(2))
    whole = traced(given, WHOLE, OTHER + WHOLE)
    halves = given.chunk(2, dim=1)
    ranks = [traced(*parts) for parts in zip(halves, attended, totals, strict=True)]
    found = explain_ranks(RankEvidence(Model(), whole, ranks, TOLERANCE, lambda names: [{}, {}]))
    assert found is not None and found[1].module == module and cause in found[1].causes[0], found


def test_weights_of_other_ranks() -> None:
    model = Model()
    half = model.get_parameter("layers.0.o_proj.weight").data[:, :4]
    held = [{"layers.0.o_proj.weight": half}] * 2
    whole = traced(WHOLE, OTHER, WHOLE)
    ranks = [traced(part, WHOLE, WHOLE) for part in WHOLE.chunk(2, dim=1)]
    found = explain_ranks(RankEvidence(model, whole, ranks, TOLERANCE, lambda names: held))
    assert found is not None and found[1].module == "layers.0.o_proj", found
    assert "rank 1 has columns 0 to 3; no rank has columns 4 to 7" in found[1].causes[0]


ATTENTION = "model.layers.0.self_attn"
O_PROJ = 'prefix=add_prefix("o_proj", prefix),'
UNREDUCED = f"{O_PROJ}\n            reduce_results=False,"
ATTENDED = "        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))\n        return output"
SIZES = "        self.q_size, self.kv_size = self.qkv_proj.q_size"
NORM = "        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)\n"
MOVED = """        for shard in self.qkv_proj.shards[{}]:
            object.__setattr__(shard, "part", {})
"""


def on_ranks(
    name: str, file: str, changes: Sequence[tuple[str, str]], checkpoint: str, module: str, part: str, cause: str
) -> BrokenModel:
    return BrokenModel(name, file, tuple(changes), checkpoint, module, part, cause)


ON_RANKS = (
    on_ranks(
        "a sum left out",
        "llama",
        [(O_PROJ, UNREDUCED)],
        "llama-tp",
        f"{ATTENTION}.o_proj",
        "output",
        "it is not summed",
    ),
    on_ranks(
        "summed twice",
        "llama",
        [(ATTENDED, ATTENDED.replace("return output", "return self.o_proj.tp_group.all_reduce(output)"))],
        "llama-tp",
        ATTENTION,
        "output",
        "it is 2 times what one rank computes",
    ),
    on_ranks(
        "a bias on every rank",
        "llama",
        [
            (O_PROJ, f"{UNREDUCED}\n            skip_bias_add=True,"),
            (ATTENDED, ATTENDED.replace("return output", "return self.o_proj.tp_group.all_reduce(output + _)")),
        ],
        "llama-tp",
        f"{ATTENTION}.o_proj",
        "output",
        "its bias is added on every rank, and so 2 times",
    ),
    on_ranks(
        "the residual before the sum",
        "llama",
        [
            (O_PROJ, UNREDUCED),
            (
                NORM,
                "        hidden_states = self.self_attn.o_proj.tp_group.all_reduce(hidden_states + residual)\n"
                "        residual = torch.zeros_like(residual)\n" + NORM,
            ),
        ],
        "llama-tp",
        "model.layers.0.post_attention_layernorm",
        "input",
        "input of model.layers.0.input_layernorm counts 2 times",
    ),
    on_ranks(
        "key heads on the wrong ranks",
        "llama",
        [(SIZES, MOVED.format("1:2", "shard.num_parts - 1 - shard.part") + SIZES)],
        "llama-tp",
        f"{ATTENTION}.k_proj",
        "output",
        "its heads, or features, are on the wrong ranks",
    ),
    on_ranks(
        "the first query heads everywhere",
        "llama",
        [(SIZES, MOVED.format(":1", "0") + SIZES)],
        "llama-tp",
        f"{ATTENTION}.qkv_proj",
        "output",
        "its weight is not the ranks' own part",
    ),
    on_ranks(
        "a factor by the rank's heads",
        "llama",
        [
            (
                "            self.head_dim**-0.5 if scaling is None else scaling,\n",
                "            (config.hidden_size // self.qkv_proj.num_heads) ** -0.5,\n",
            )
        ],
        "llama-tp",
        ATTENTION,
        "attention output",
        "on rank 0 the scores' factor is",
    ),
    on_ranks(
        "a norm over the rank's heads",
        "olmo2",
        [
            (
                "self.tp_group.all_reduce(x32.square().mean(dim=-1, keepdim=True)) / self.tp_group.world_size",
                "x32.square().mean(dim=-1, keepdim=True)",
            )
        ],
        "Olmo2ForCausalLM",
        f"{ATTENTION}.q_norm",
        "output",
        "each token's part is another multiple",
    ),
    on_ranks(
        "sinks of the first heads",
        "gpt_oss",
        [("load_part(param.data, tensor, 0, group.rank,", "load_part(param.data, tensor, 0, 0,")],
        "GptOssForCausalLM",
        ATTENTION,
        "attention output",
        "its sinks: rank 0 has rows 0 to 1; rank 1 has rows 0 to 1",
    ),
    on_ranks(
        "decays of the first heads",
        "minimax",
        [("slopes[first : first + num_heads]", "slopes[:num_heads]")],
        "MiniMaxForCausalLM",
        "model.layers.1.self_attn.attn",
        "output",
        "its log_decay is not the ranks' own part",
    ),
    on_ranks(
        "a projector not summed",
        "llava",
        [
            (
                'prefix=add_prefix("linear_2", prefix),\n',
                'prefix=add_prefix("linear_2", prefix),\n            reduce_results=False,\n',
            )
        ],
        "LlavaForConditionalGeneration",
        "model.multi_modal_projector.linear_2",
        "output",
        "it is not summed over the ranks",
    ),
)


def check_schedule(broken: BrokenModel, schedule: str, directory: Path) -> None:
    """Compute a schedule again that is said to differ, with the longest text, or with images."""
    (directory / "checkpoint").mkdir()
    model_dir = tiny_model(broken.checkpoint) if "-" in broken.checkpoint else made(broken, directory / "checkpoint")
    args = ServerArgs(model_path=model_dir, dtype="float32", device="cpu", context_length=512, log_level="error")
    path, _, name = broken.write(directory).rpartition(":")
    with served_by_file(path, read_architectures(args), name):
        config = read_model_config(args)
        tokenizer = read_tokenizer(args, config)
        options = VerifyOptions(long_len=40)
        prompts = list(read_or_default_prompts(config, tokenizer, options))
        prompts += image_prompts(args, config, tokenizer, options)
        result = ScheduleResult(schedule, 1.0, prompts[-1].text)
        found = locate(args, config, TheirModel(args, config), {each.text: each for each in prompts}, [result])
    assert found is not None and found.finding is not None, found
    assert (found.finding.module, found.finding.part) == (broken.module, broken.part), found
    assert broken.cause in "".join(found.finding.causes), found
    assert found.schedule == schedule and "rtp_llm_served_file" in found.source


def made(broken: BrokenModel, directory: Path) -> str:
    if broken.checkpoint in SEEING_TWINS:
        return SEEING_TWINS[broken.checkpoint].make(directory)
    return make_tiny(broken.checkpoint, directory, **broken.config)


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("broken", ON_RANKS[:1], ids=lambda broken: broken.name)
def test_a_mistake_on_two_ranks(broken: BrokenModel, tmp_path: Path) -> None:
    check_schedule(broken, TWO_RANKS, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("broken", ON_RANKS[1:], ids=lambda broken: broken.name)
def test_mistakes_on_two_ranks(broken: BrokenModel, tmp_path: Path) -> None:
    check_schedule(broken, TWO_RANKS, tmp_path)


FEED = "self.feed(hidden_states), residual"
SHIFTED = "torch.cat([torch.zeros_like(hidden_states[:1]), hidden_states[:-1]])"
ROTATED_ANEW = (
    "        return self.rotary_emb(positions, q, k)",
    "        return self.rotary_emb(torch.arange(len(positions)), q, k)",
)
GATE_INPUT = ("model.layers.0.mlp.gate_proj", "input")
IN_PIECES = (
    (
        CHUNKED,
        on_ranks(
            "positions from zero in each piece",
            "llama",
            [ROTATED_ANEW],
            "llama-tp",
            f"{ATTENTION}.rotary_emb",
            "queries",
            "ours (0,), the reference's (16,), as if it began there: they start at zero again",
        ),
    ),
    (
        CHUNKED,
        on_ranks(
            "the cache of another layer",
            "llama",
            [
                (
                    "            layer_id=layer_id,\n            logit_cap",
                    "            layer_id=0,\n            logit_cap",
                )
            ],
            "llama-tp",
            ATTENTION,
            "attention output",
            "of earlier pieces it reads keys and values of model.layers.",
        ),
    ),
    (
        SECOND_TURN,
        on_ranks(
            "positions from zero in a second turn",
            "llama",
            [ROTATED_ANEW],
            "llama-tp",
            f"{ATTENTION}.rotary_emb",
            "queries",
            "only where a prompt is computed in pieces, cut after 16, 32, 40, ... tokens",
        ),
    ),
    (
        BATCHED,
        on_ranks(
            "a shift over the end of a prompt",
            "llama",
            [(FEED, f"self.feed(hidden_states + {SHIFTED}), residual")],
            "llama-tp",
            *GATE_INPUT,
            "number 2, 3, 4 of 4 differs. Each alone agrees. Something reads over the end of the prompt before",
        ),
    ),
    (
        BATCHED,
        on_ranks(
            "a mean over a step",
            "llama",
            [(FEED, "self.feed(hidden_states - hidden_states.mean(0)), residual")],
            "llama-tp",
            *GATE_INPUT,
            "Something is computed over the tokens of all prompts",
        ),
    ),
)


@pytest.mark.parametrize(("schedule", "broken"), IN_PIECES, ids=lambda value: getattr(value, "name", value))
def test_mistakes_of_schedules(schedule: str, broken: BrokenModel, tmp_path: Path) -> None:
    check_schedule(broken, schedule, tmp_path)
