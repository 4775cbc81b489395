"""Loading by a model's own method: names that are changed, places that layers declare, and what does not fit."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.layers import weights as loaders
from rtp_llm.srt.layers.auto_weights import AutoWeightsLoader, WeightsMapper, maybe_remap_kv_scale_name
from rtp_llm.srt.layers.fused_moe import FusedMoEFactory
from rtp_llm.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

# Names


def test_rules_apply_one_after_another() -> None:
    mapper = WeightsMapper(
        orig_to_new_regex={r"\.h\.(\d+)\.": r".layers.\1."},
        orig_to_new_substr={".attn.": ".self_attn.", "mask": None},
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
        orig_to_new_prefix={"transformer.": "model.", "vision.": None},
        orig_to_new_suffix={".g": ".weight", ".junk": None},
    )
    names = ["transformer.h.3.attn.q_proj.g", "vision.h.0.x", "a.mask.b", "a.junk", "transformer.transformer.x.g.g"]
    assert mapper.apply_list(names) == ["model.layers.3.self_attn.qkv_proj.weight", "model.transformer.x.g.weight"]
    assert mapper.map_name("a.junk") is None
    assert mapper.apply_dict({"transformer.x": 1, "vision.x": 2}) == {"model.x": 1}


def test_patterns_may_be_compiled_by_either_package() -> None:
    regex = pytest.importorskip("regex")
    mapper = WeightsMapper(orig_to_new_regex={regex.compile(r"\Aa\.(\d+)"): r"b.\1", re.compile(r"z$"): None})
    assert mapper.apply_list(["a.3.x", "x.a.3", "xyz"]) == ["b.3.x", "x.a.3"]


def test_shards_of_tensors() -> None:
    mapper = WeightsMapper(
        orig_to_new_stacked={".q": (".qkv", "q"), ".kv": (".qkv", ["k", "v"]), ".gate_up": (".all", (0, 1))}
    )
    tensor = torch.randn(3)
    given = mapper.apply((name, tensor) for name in ("a.q", "a.kv", "a.gate_up", "a.o"))
    applied = [(name, getattr(part, "shard_id", None), part) for name, part in given]
    assert [(name, shard) for name, shard, _ in applied] == [
        ("a.qkv", "q"),
        ("a.qkv", "k"),
        ("a.qkv", "v"),
        ("a.all", (0, 1)),
        ("a.o", None),
    ]
    assert all(part.data_ptr() == tensor.data_ptr() for *_, part in applied)  # not copied


def test_rules_together() -> None:
    class Renaming:
        def rename_source_key(self, name: str) -> tuple[str, None]:
            return name.replace("old", "new"), None

    left = WeightsMapper(orig_to_new_prefix={"a.": "b.", "c.": "d."}, orig_to_new_renaming=[Renaming()])
    right = WeightsMapper(orig_to_new_prefix={"a.": "e."}, orig_to_new_substr={"new": "newest"})
    assert (left | right).apply_list(["a.old", "c.x"]) == ["e.newest", "d.x"]
    assert left.apply_list(["a.old"]) == ["b.new"]  # unchanged


def test_scales_of_a_cache_are_not_needed() -> None:
    params: dict[str, Any] = {"layers.0.attn.k_scale": 0}
    for name in ("layers.0.self_attn.k_proj.k_scale", "layers.0.attn.kv_scale", "layers.0.k_cache.scale"):
        assert maybe_remap_kv_scale_name(name, params) is None
    for name in ("layers.0.attn.k_scale", "layers.0.q_proj.weight_scale", "layers.0.mlp.scale"):
        assert maybe_remap_kv_scale_name(name, params) == name


# Places


class Inner(nn.Module):
    """Its own method renames below it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(4)
        self.calls = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.calls += 1
        return AutoWeightsLoader(self).load_weights(weights, mapper=WeightsMapper(orig_to_new_prefix={"n.": "norm."}))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(5, 4)
        self.qkv = QKVParallelLinear(4, 2, 2, bias=False)
        self.gate_up = MergedColumnParallelLinear(4, [2, 2], bias=False)
        self.experts = FusedMoEFactory(2, 1, 4, 3)
        self.inner = Inner()
        self.register_buffer("scale", torch.zeros(2))
        self.register_buffer("kept", torch.zeros(2), persistent=False)
        self.head = self.embed if tied else ParallelLMHead(5, 4)


def tensors() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (5, 4), "scale": (2,), "inner.n.weight": (4,)}
    shapes |= {f"{name}.weight": (4, 4) for name in "qkv"} | {
        f"{name}.weight": (2, 4) for name in ("mlp_gate", "mlp_up")
    }
    for expert in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"experts.{expert}.{name}.weight"] = (4, 3) if name == "down_proj" else (3, 4)
    shapes["head.weight"] = (5, 4)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


STACKED = WeightsMapper(
    orig_to_new_regex={rf"^{name}\.weight": f"{name}_proj.weight" for name in "qkv"},
    orig_to_new_stacked={
        **{f"{name}_proj.weight": ("qkv.weight", name) for name in "qkv"},
        "mlp_gate.weight": ("gate_up.weight", 0),
        "mlp_up.weight": ("gate_up.weight", 1),
    },
)


def test_every_place_is_found() -> None:
    model, given = Model(), tensors()
    loaded = AutoWeightsLoader(model).load_weights(given.items(), mapper=STACKED)
    assert loaded == set(model.state_dict())
    assert model.inner.calls == 1
    expected = {
        "embed.weight": given["embed.weight"],
        "qkv.weight": torch.cat([given[f"{name}.weight"] for name in "qkv"]),
        "gate_up.weight": torch.cat([given["mlp_gate.weight"], given["mlp_up.weight"]]),
        "experts.w13_weight": torch.stack(
            [torch.cat([given[f"experts.{e}.{name}_proj.weight"] for name in ("gate", "up")]) for e in range(2)]
        ),
        "experts.w2_weight": torch.stack([given[f"experts.{e}.down_proj.weight"] for e in range(2)]),
        "inner.norm.weight": given["inner.n.weight"],
        "scale": given["scale"],
        "head.weight": given["head.weight"],
    }
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_head_under_either_name(name: str) -> None:
    model, table = Model(tied=True), torch.randn(5, 4)
    assert AutoWeightsLoader(model).load_weights([(name, table)]) == {name, "embed.weight"}
    assert torch.equal(model.embed.weight, table)
    both = [("embed.weight", table), ("head.weight", table.clone())]
    assert AutoWeightsLoader(model).load_weights(both) == {"embed.weight"}
    both[1] = "head.weight", table + 1
    with pytest.raises(ValueError, match=r"head.weight and embed.weight differ though Model ties them"):
        AutoWeightsLoader(model).load_weights(both)


class Packed(nn.Module):
    """A model with declared names, as this engine's are."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up": ["gate", "up"]}
    rename = [(r"^old\.", "new.")]

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Module()
        self.new.qkv_proj = QKVParallelLinear(4, 2, 2, 2, bias=False)
        self.new.gate_up = MergedColumnParallelLinear(4, [3, 3], bias=False)


def test_a_submodule_may_declare_its_names() -> None:
    model = nn.Module()
    model.inner, model.norm = Packed(), RMSNorm(4)
    parts = {name: torch.randn(4 if "proj" in name else 3, 4) for name in ("q_proj", "k_proj", "v_proj", "gate", "up")}
    given = {f"inner.old.{name}.weight": part for name, part in parts.items()} | {"norm.weight": torch.ones(4)}
    loaded = AutoWeightsLoader(model).load_weights(given.items())
    assert loaded == {"inner.new.qkv_proj.weight", "inner.new.gate_up.weight", "norm.weight"}
    fused = torch.cat([parts["q_proj"], parts["k_proj"], parts["v_proj"]])
    assert torch.equal(model.inner.new.qkv_proj.weight, fused)
    assert torch.equal(model.inner.new.gate_up.weight, torch.cat([parts["gate"], parts["up"]]))
    with pytest.raises(ValueError, match=r"inner\.old\.down\.weight"):
        AutoWeightsLoader(model).load_weights([("inner.old.down.weight", torch.ones(4))])


def test_what_needs_no_place() -> None:
    extra = {
        "layers.0.rotary_emb.inv_freq": torch.ones(2),
        "qkv.bias": torch.zeros(3),
        "mtp.x": torch.ones(1),
        "skip.x": torch.ones(1),
        "a.skipped.b": torch.ones(1),
        "loose.x": torch.ones(1),
        "a.loose": torch.ones(1),
    }
    loader = AutoWeightsLoader(
        Model(),
        skip_prefixes=["skip."],
        skip_substrs=["skipped"],
        ignore_unexpected_prefixes=["loose."],
        ignore_unexpected_suffixes=[".loose"],
    )
    assert loader.load_weights(extra.items()) == set()


def test_what_has_no_place_is_named() -> None:
    given = {"qkv.bias": torch.ones(3), "kept": torch.ones(2), "inner.norm.wait": torch.ones(4)}
    with pytest.raises(ValueError, match=r"1 tensors have no place in Inner:\n  norm.wait \[4\]"):
        AutoWeightsLoader(Model()).load_weights(given.items())
    del given["inner.norm.wait"]
    with pytest.raises(ValueError, match=r"2 tensors have no place in Model:\n  kept \[2\]\n  qkv.bias \[3\]"):
        AutoWeightsLoader(Model()).load_weights(given.items())


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"experts.0.up_proj.weight \[2, 4\] does not fit experts.w13_weight"):
        AutoWeightsLoader(Model()).load_weights([("experts.0.up_proj.weight", torch.ones(2, 4))])
    with pytest.raises(ValueError, match=r"scale \[3\] does not fit scale: expected shape \[2\], got \[3\]"):
        AutoWeightsLoader(Model()).load_weights([("scale", torch.ones(3))])
    with pytest.raises(ValueError, match=r"expected dtype torch.float32, got torch.int64"):
        AutoWeightsLoader(Model()).load_weights([("scale", torch.ones(2, dtype=torch.int64))])


# Loaders of single parameters


def test_loaders_of_a_ranks_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "get_tp_group", lambda: RankGroup(1, 2))
    whole, row = torch.randn(4, 6), torch.randn(4)
    param = nn.Parameter(torch.empty(4, 3))
    loaders.set_weight_attrs(param, {"weight_loader": loaders.sharded_weight_loader(1)})
    param.weight_loader(param, whole)  # type: ignore[attr-defined]
    assert torch.equal(param, whole[:, 3:])
    param = nn.Parameter(torch.empty(2, 6))
    loaders.row_parallel_weight_loader(param, whole)
    assert torch.equal(param, whole[2:])
    param = nn.Parameter(torch.empty(4))
    loaders.row_parallel_weight_loader(param, row)
    assert torch.equal(param, row)
    negative = loaders.composed_weight_loader(loaders.default_weight_loader, lambda x: -x.exp())
    negative(param, row)
    torch.testing.assert_close(param.data, -row.exp())
