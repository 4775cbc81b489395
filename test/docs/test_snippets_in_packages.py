"""Snippets of the page on layers, put into what ``rtp-llm new`` writes: model file and reference agree."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from remote_code import fresh_code
from rtp_llm import ModelRegistry
from rtp_llm.cli import main
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.layers import linear, weights
from rtp_llm.srt.layers.weights import fill
from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.multimodal.media_store import open_content
from rtp_llm.tools.reference import TransformersModel, drawn_image
from rtp_llm.tools.schedules import BATCHED, Teacher, random_questions, run_schedules
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.run import verify

PAGE = Path(__file__).resolve().parents[2] / "docs" / "supported_models" / "layers.md"
MODULE, STEM = "model_with_peaks", "ModelWithPeaks"
EYE, EYE_STEM = "model_of_sizes", "ModelOfSizes"


def snippet(mark: str, stem: str = STEM) -> str:
    [body] = re.findall(rf"<!-- test: {mark} -->\n```python\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    return str(body).replace("Zeta", stem)


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for before, after in changes:
        assert text.count(before) == 1, f"{path.name}: {before!r}"
        text = text.replace(before, after)
    path.write_text(text)


def write_package(root: Path) -> None:
    """Write a new architecture, whose layers add the peaks of their inputs before anything else."""
    assert main(["new", MODULE, "--directory", str(root)]) == 0
    norm, layer = "        self.post_attention_layernorm = ", f"class {STEM}DecoderLayer("
    edit(
        root / MODULE / f"{MODULE}.py",
        (layer, f"{snippet('state ours')}\n\n\n{layer}"),
        (norm, f"        self.peak = {STEM}Peak(config.hidden_size, layer_id)\n{norm}"),
        (
            "        hidden_states = hidden_states + self.self_attn(",
            "        hidden_states = hidden_states + self.peak(hidden_states, forward_batch)\n"
            "        hidden_states = hidden_states + self.self_attn(",
        ),
    )
    edit(
        root / MODULE / "reference" / f"modeling_{MODULE}.py",
        (layer, f"{snippet('state reference')}\n\n\n{layer}"),
        (norm, f"        self.peak = {STEM}Peak(config.hidden_size, layer_idx)\n{norm}"),
        ("        x = x + self.self_attn(", "        x = x + self.peak(x, cache)\n        x = x + self.self_attn("),
        ("DynamicCache()", "DynamicCache(config=self.config)"),
    )
    config = f"{STEM}Config(vocab_size=len(tokenizer)"
    edit(root / MODULE / "reference" / "make_tiny.py", (config, f'{config}, layer_types=["hybrid"] * 3'))


def arguments(module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ServerArgs:
    """Register the model of the package that lies in ``folder``, and return how its tiny checkpoint is served."""
    monkeypatch.syspath_prepend(folder / "package")
    fresh_code(folder / "cache", monkeypatch)
    checkpoint = import_module(f"{module}.reference.make_tiny").make_tiny(folder / "tiny")
    entry = import_module(f"{module}.{module}").EntryClass
    monkeypatch.setitem(ModelRegistry.models.overrides, entry.__name__, entry)
    return ServerArgs(
        model_path=checkpoint, dtype="float32", device="cpu", max_total_tokens=1024, trust_remote_code=True
    )


STORES = {  # which lines store the state, and when
    "                states[wave.store] = after\n": "one token of each request, as decode",
    "                states[wave.store[n]] = h\n": "tokens 0 to ",
}


def assert_not_stored_is_named(args: ServerArgs, folder: Path, left_out: str, step: str) -> None:
    wrong = folder / "wrong.py"
    wrong.write_text((folder / "package" / MODULE / f"{MODULE}.py").read_text())
    edit(wrong, (left_out, ""))
    options = VerifyOptions(max_new_tokens=4, long_len=0, model_class=f"{wrong}:{STEM}ForCausalLM")
    report = verify(args, options)
    assert report.finding is not None, report.failure
    causes = "".join(report.finding.causes)
    assert (
        "The state 'peak' of model.layers.0.peak is not stored by the step that computes " in causes and step in causes
    )
    assert "wrong.py" in report.source


def test_a_state_of_ones_own_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "package")
    args = arguments(MODULE, tmp_path, monkeypatch)
    report = verify(args, VerifyOptions(max_new_tokens=4, long_len=0))
    assert report.agrees, report.failure or report.finding
    for result in report.results:
        assert result.states is not None and result.states.num == 6  # in three layers, at both boundaries
        assert result.states.error < 1e-4
    for left_out, step in STORES.items():
        assert_not_stored_is_named(args, tmp_path, left_out, step)
    # Batched steps, whose decode steps are replayed.
    reference = TransformersModel(args.model_path, "float32", "cpu", trust_remote_code=True)
    questions = random_questions(reference.model.config.vocab_size, (1, 18))
    [result] = run_schedules(args, Teacher(reference.model), questions, [BATCHED])
    assert result.agrees, result


CONVOLUTION = "nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)"
LINEAR = "nn.Linear(3 * config.patch_size**2, config.hidden_size)"


def write_package_of_sizes(root: Path) -> None:
    """Write a new architecture that sees, whose tower takes patches of images of any size."""
    assert main(["new", EYE, "--sees", "--directory", str(root)]) == 0
    model_file = root / EYE / f"{EYE}.py"
    text = model_file.read_text()
    encode = text[text.index("    def get_image_feature(") : text.index(f"\n\nclass {EYE_STEM}Processor(")]
    replace = text[text.index("    def replacement(") : text.index("    async def process_mm_data_async(")]
    edit(
        model_file,
        (encode, f"{snippet('sizes model', EYE_STEM)}\n"),
        (replace, f"{snippet('sizes processor', EYE_STEM)}\n\n"),
        ("import torch\nfrom torch import nn\n", "import numpy as np\nimport torch\nfrom torch import nn\n"),
        ("from torch import nn\n", "import torch.nn.functional as F\nfrom torch import nn\n"),
        ("import VisionAttention\n", "import VisionAttention, prepare_vision_attention_metadata\n"),
        ("import MultimodalDataItem,", "import Modality, MultimodalDataItem,"),
        (CONVOLUTION, LINEAR),
        ("def forward(self, pixel_values: torch.Tensor)", "def forward(self, patches, grids, cu_seqlens)"),
        ("        weight = self.patch_embed.weight\n", ""),
        (
            "x = self.patch_embed(pixel_values.to(weight)).flatten(2).transpose(1, 2) + self.position_embed.weight",
            "places = torch.cat([torch.arange(rows * columns) % 16 for rows, columns in grids.tolist()])\n"
            "        x = self.patch_embed(patches) + self.position_embed(places)\n"
            "        metadata = prepare_vision_attention_metadata(cu_seqlens, x.device)",
        ),
        ("            x = layer(x)\n", "            x = layer(x, metadata)\n"),
        ("    def forward(self, x: torch.Tensor) -> torch.Tensor:", "    def forward(self, x, metadata):"),
        ("self.attn(self.norm1(x))", "self.attn(self.norm1(x), forward_metadata=metadata)[0]"),
    )
    edit(
        root / EYE / "reference" / f"modeling_{EYE}.py",
        (CONVOLUTION, LINEAR),
        ("forward(self, pixel_values: torch.Tensor)", "forward(self, pixel_values, image_grid)"),
        (
            "        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2) + self.position_embed.weight\n"
            "        for layer in self.layers:\n            x = layer(x)\n        return self.norm(x)",
            "        images = []\n"
            "        for x in self.patch_embed(pixel_values).split(image_grid.prod(-1).tolist()):\n"
            "            x = (x + self.position_embed(torch.arange(len(x)) % 16))[None]\n"
            "            for layer in self.layers:\n                x = layer(x)\n"
            "            images.append(x[0])\n"
            "        return self.norm(torch.cat(images))",
        ),
        ("self.eye(pixel_values)", "self.eye(pixel_values, image_grid)"),
        (
            "        inputs_embeds: torch.Tensor | None = None,\n        **options: Any,\n    ) -> Any:",
            "        inputs_embeds: torch.Tensor | None = None,\n        image_grid: torch.Tensor | None = None,\n"
            "        **options: Any,\n    ) -> Any:",
        ),
        (
            "            use_cache=use_cache,\n",
            "            use_cache=use_cache,\n            image_grid=image_grid,\n",
        ),
        (
            "logits_to_keep: int | torch.Tensor = 0,\n",
            "logits_to_keep: int | torch.Tensor = 0,\n        image_grid: torch.Tensor | None = None,\n",
        ),
    )


def test_a_parameter_that_ranks_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four ranks with two key/value heads, each two ranks have the same one."""
    factors, scope = torch.tensor([2.0, 3.0]), {"torch": torch, "nn": nn, **vars(weights)}
    exec(snippet("split"), scope)
    for num_ranks in (1, 2, 4):
        for rank in range(num_ranks):
            group = RankGroup(rank, num_ranks)
            monkeypatch.setattr(linear, "get_tp_group", lambda group=group: group)
            scope["get_tp_group"] = linear.get_tp_group
            module = scope["ModelWithPeaksHeadFactors"](linear.QKVParallelLinear(8, 3, 4, 2, bias=False))
            fill(module.factors, factors)
            mine = factors.chunk(min(num_ranks, 2))[rank * min(num_ranks, 2) // num_ranks]
            assert module(torch.ones(5, 3 * len(mine))).tolist() == [mine.repeat_interleave(3).tolist()] * 5


def test_images_of_several_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package_of_sizes(tmp_path / "package")
    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    for file, size in zip(files, ((40, 24), (17, 50)), strict=True):
        drawn_image().resize(size).save(file)
    options = VerifyOptions(max_new_tokens=4, long_len=0, image=files)
    report = verify(arguments(EYE, tmp_path, monkeypatch), options)
    assert report.agrees, report.failure or report.finding
    [media] = [result.prompt.media for result in report.results if result.prompt.media is not None]
    items = MultimodalInputs.decode(open_content(media.content)).mm_items
    assert [item.image_grid.tolist() for item in items] == [[[3, 5]], [[6, 2]]]
