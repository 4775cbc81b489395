"""Hooks that fill a trace: one kind for a model file of ours, one for a model of transformers."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._C import DisableTorchFunction
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from rtp_llm.srt.layers.encoder_attention import MMEncoderAttention
from rtp_llm.srt.layers.linear import ColumnParallelLinear, LinearBase
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.quantization.base import FreesParameters
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import RotaryEmbedding
from rtp_llm.srt.layers.vision import VisionAttention
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.tools.verify.attention_watch import AttentionWatch, without_repeats
from rtp_llm.tools.verify.copies import copied
from rtp_llm.tools.verify.expert_calls import SeparateExperts, experts_call, num_experts_of
from rtp_llm.tools.verify.locate import layer_of
from rtp_llm.tools.verify.masks import bias_of, chunk_of, window_of
from rtp_llm.tools.verify.pointer import call_sites
from rtp_llm.tools.verify.recurrent_watch import ChangeOfInput, RecurrentWatch, watch_ours
from rtp_llm.tools.verify.trace import (
    ATTENDED,
    EMBEDDINGS,
    GATE,
    HEAD,
    INPUT,
    KEYS,
    LATENT,
    OUTPUT,
    QUERIES,
    UNROTATED,
    VALUES,
    AttentionCall,
    Trace,
    VisionCall,
)
from rtp_llm.tools.verify.vision_calls import cos_sin_of, our_encoder_call, our_vision_call, vision_aliases

RECORDING = "rtp_llm_verify"  # name of the attention function that records calls of transformers' models


class Recorder:
    """Hooks that fill a trace while the context is open. Subclasses handle each side's modules."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self._handles: list[Any] = []

    def __enter__(self) -> "Recorder":
        for name, module in self.model.named_modules():
            self.watch(name, module)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def watch(self, name: str, module: nn.Module) -> None:
        if name and name == self.trace.parts.language_model:
            self.called(module, lambda given: self.trace.add(name, EMBEDDINGS, _embeddings(given)))
        if next(module.children(), None) is not None:
            self.after(module, lambda args, output: self.trace.add(name, OUTPUT, _summed(output)))
        elif isinstance(module, FreesParameters) or next(module.parameters(recurse=False), None) is not None:
            if _gate_of(module):
                self.called(module, lambda given: self._add_gated(name, module, given))
            elif num_experts_of(module) is None:
                self.before(module, lambda args: self.trace.add(name, INPUT, _summed(args)))
            if _gate_of(module):
                self.after(module, lambda args, output: self.trace.add(name, OUTPUT, self._by_token(output)))
                return
            self.after(module, lambda args, output: self.trace.add(name, OUTPUT, _leaf_output(module, args, output)))
        if num_experts_of(module) is not None:
            self.called(module, lambda given: self._add_experts(name, module, given))

    def _add_gated(self, name: str, module: nn.Module, given: dict[str, Any]) -> None:
        """Add what a norm with a gate is given, which may have a row for each head of a token."""
        values = list(given.values())
        self.trace.add(name, INPUT, self._by_token(values[0] if values else None))
        self.trace.add(name, GATE, self._by_token(given.get(_gate_of(module))))

    def _by_token(self, tensor: Any) -> Any:
        num = self.trace.num_in_step
        is_by_head = (
            isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and len(tensor) > num > 0 == len(tensor) % num
        )
        return tensor.reshape(num, -1) if is_by_head else tensor

    def _add_experts(self, name: str, module: nn.Module, given: dict[str, Any]) -> None:
        found = experts_call(module, given)
        if found is not None:
            self.trace.add_experts(name, *found)

    def before(self, module: nn.Module, action: Callable[[tuple[Any, ...]], None]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            action((*args, *kwargs.values()))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def called(self, module: nn.Module, action: Callable[[dict[str, Any]], None]) -> None:
        """``action`` gets a call's arguments by their names in ``forward``, those in ``**kwargs`` among them."""
        signature = inspect.signature(module.forward)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    arguments |= arguments.pop(name, {})
            action(arguments)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def changed(self, module: nn.Module, given: ChangeOfInput | None, made: Callable[[Any], Any]) -> None:
        """Have a module called with other arguments, positional and named, and its output changed."""
        if given is not None:
            self._handles.append(
                module.register_forward_pre_hook(lambda module, args, kwargs: given(args, kwargs), with_kwargs=True)
            )
        self._handles.append(module.register_forward_hook(lambda module, args, output: made(output)))

    def after(self, module: nn.Module, action: Callable[[tuple[Any, ...], Any], None]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            action((*args, *kwargs.values()), output)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))


def _gate_of(module: nn.Module) -> str:
    """Return the argument of a norm that it multiplies by; empty: it has none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return ""
    names = list(inspect.signature(module.forward).parameters)
    return next((name for name in names[1:2] if name in ("gate", "z")), "")


def _embeddings(given: dict[str, Any]) -> Any:
    """Return the embeddings among a language model's arguments: two names, ours and transformers'."""
    return given.get("input_embeds", given.get("inputs_embeds"))


def _leaf_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return a module's output; of a router that returns more, or other things, its product: the logits."""
    if not isinstance(output, (tuple, list)) or not output:
        return output
    weight, given = getattr(module, "weight", None), args[0] if args else None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not isinstance(given, torch.Tensor):
        return output[0]
    bias = getattr(module, "bias", None)
    bias = bias.float() if isinstance(bias, torch.Tensor) and bias.shape == weight.shape[:1] else None
    return F.linear(given.float(), weight.float(), bias) if given.shape[-1] == weight.shape[1] else output[0]


def _summed(values: Any) -> Any:
    """Return the sum of a tensor and its residual."""
    if not isinstance(values, (tuple, list)):
        return values
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
        return tensors[0] + tensors[1]
    return tensors[0] if tensors else None


class OurRecorder(Recorder):
    """Hooks for a model file of ours."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        super().__init__(model, trace)
        self._packed = ModelTraits.of(model).packed_modules_mapping
        self._rope_name = ""
        self._rotation: tuple[Any, ...] | None = None  # (queries, keys), inputs of the last rotation

    def watch(self, name: str, module: nn.Module) -> None:
        self.before(module, lambda args: self.trace.call_sites.__setitem__(name, call_sites(self.model)))
        watch_ours(self, name, module)
        if isinstance(module, RotaryEmbedding):
            self.before(module, lambda args: self._keep_rotation(name, args))
        elif isinstance(module, LogitsProcessor):
            self.called(module, lambda given: self.trace.add(HEAD, INPUT, given.get("hidden_states")))
        elif isinstance(module, RadixAttention):
            self._watch_attention(self._attention_name(name, module), module)
        elif isinstance(module, VisionAttention):
            super().watch(name, module)
            self.called(module, lambda given: self.trace.add_vision_call(name, our_vision_call(module, given)))
        elif isinstance(module, MMEncoderAttention):
            around = name.rpartition(".")[0]
            self.called(module, lambda given: self.trace.add_vision_call(around, our_encoder_call(module, given)))
        elif isinstance(module, LinearBase):
            sources = packed_sources(name, module, self._packed)
            aliases = vision_aliases(self.model, name)
            names = [*(source for source, _ in sources), *aliases]
            self.before(module, lambda args: self._add_everywhere(names, INPUT, args[0]))
            self.after(module, lambda args, output: self._add_everywhere(aliases, OUTPUT, output[0]))
            self.after(module, lambda args, output: self._add_shards(sources, output[0]))
        else:
            super().watch(name, module)

    def _attention_name(self, name: str, layer: RadixAttention) -> str:
        """Return the module that is this attention: the one around it; of a further cache in the same module, which has
        a later ``layer_id``, its own name."""
        around = name.rpartition(".")[0]
        caches = [child for child in self.model.get_submodule(around).children() if isinstance(child, RadixAttention)]
        return around if layer is min(caches, key=lambda cache: cache.layer_id) else name

    def _add_everywhere(self, names: list[str], part: str, tensor: torch.Tensor) -> None:
        for name in names:
            self.trace.add(name, part, tensor)

    def _add_shards(self, sources: list[tuple[str, int]], output: torch.Tensor) -> None:
        shards = output.split([size for _, size in sources], dim=-1)
        for (source, _), shard in zip(sources, shards, strict=True):
            self.trace.add(source, OUTPUT, shard)

    def _keep_rotation(self, name: str, args: tuple[Any, ...]) -> None:
        self.trace.add_positions(args[0])
        self._rope_name = name
        self._rotation = tuple(None if tensor is None else tensor.clone() for tensor in args[1:3])

    def _watch_attention(self, name: str, layer: RadixAttention) -> None:
        def before(args: tuple[Any, ...]) -> None:
            if self._rotation is not None:
                self.trace.ropes[name] = self._rope_name
                for part, tensor in zip((QUERIES, KEYS), self._rotation, strict=True):
                    self.trace.add(name, UNROTATED[part], tensor)
                self._rotation = None
            parts: tuple[str, ...] = (QUERIES, KEYS, VALUES)
            if layer.spec.latent:
                parts = (LATENT[QUERIES], LATENT[KEYS])
                self.trace.latent_sizes[name] = layer.spec.head_dim - layer.spec.v_head_dim
            for part, tensor in zip(parts, args, strict=False):
                self.trace.add(name, part, tensor)
            sinks = next((arg for arg in args[3:] if isinstance(arg, torch.Tensor)), None)
            self.trace.calls[name] = AttentionCall(
                layer.spec.num_heads,
                layer.spec.num_kv_heads,
                layer.spec.scaling,
                layer.spec.window,
                layer.spec.logit_cap,
                None if sinks is None else sinks.detach().float().cpu(),
                slopes=None if layer.spec.alibi_slopes is None else layer.spec.alibi_slopes.float().cpu(),
                chunk=layer.spec.chunk,
            )

        self.before(layer, before)
        if not layer.spec.latent:
            self.after(layer, lambda args, output: self.trace.add(name, ATTENDED, output))


def packed_sources(name: str, module: LinearBase, packed: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """Return (checkpoint name, number of outputs) of a linear layer's parts; of itself if it is not packed."""
    parent, _, last = name.rpartition(".")
    sources = packed.get(last, [])
    if isinstance(module, ColumnParallelLinear) and len(module.shards) == len(sources) > 0:
        return [
            (f"{parent}.{source}" if parent else source, shard.size)
            for source, shard in zip(sources, module.shards, strict=True)
        ]
    sizes = sum(shard.size for shard in module.shards) if isinstance(module, ColumnParallelLinear) else None
    return [(name, sizes or module.output_size)]


class TheirRecorder(Recorder):
    """Hooks for a model of transformers, whose attention function is RECORDING while the context is open.

    Attention is not recorded for a model with attention code of its own.
    """

    def __init__(
        self,
        model: Any,
        trace: Trace,
        names: Mapping[nn.Module, str] | None = None,
        attention_heads: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            names: of the model's modules, see ``aligned_names``; None: their own.
            attention_heads: the modules that are attention, with their numbers of key heads, as ours has them: those
                that do not call transformers' attention function are watched.
        """
        super().__init__(model, trace)
        self.names = dict(names or {module: name for name, module in model.named_modules()})
        self._attention_heads = attention_heads or {}
        self._watches: list[AttentionWatch] = []
        self._recurrent = RecurrentWatch(self)
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # a layer's name -> its last call
        self._implementation = model.config._attn_implementation
        self._given: dict[str, dict[str, Any]] = {}  # a tower's module -> arguments of its last call

    def watch(self, name: str, module: nn.Module) -> None:
        name = self.names[module]
        super().watch(name, module)
        if name and layer_of(name) == name:
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs: self.calls.__setitem__(name, copied((args, kwargs))), with_kwargs=True
                )
            )
        if name in self._attention_heads and not self.trace.parts.is_tower(name):
            self._watch_attention(name, module)
        experts = SeparateExperts.of(module)
        if experts is not None:
            self._watch_separate_experts(name, module, experts)
        if self.trace.parts.is_tower(name):
            self.called(module, lambda given: self._given.__setitem__(name, given))
        elif name.rpartition(".")[2] == "rotary_emb":
            self.before(module, self._add_positions)

    def _watch_attention(self, name: str, module: nn.Module) -> None:
        """Record attention that the module computes without transformers' function."""

        def recorded(
            states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
            mask: torch.Tensor | None,
            scaling: float,
            output: torch.Tensor,
        ) -> None:
            if name not in self.trace.calls and states[0].shape[2] == states[1].shape[2]:
                num_heads = self._attention_heads[name]
                q, k, v = states[0], *(without_repeats(x, num_heads) for x in states[1:])
                self.add_attention(module, (q, k, v), mask, {"scaling": scaling}, output.transpose(1, 2))

        def before(args: tuple[Any, ...]) -> None:
            self._watches.append(AttentionWatch(recorded))
            self._watches[-1].__enter__()

        def after(args: tuple[Any, ...], output: Any) -> None:
            self._watches.pop().__exit__(None, None, None)

        self.before(module, before)
        self.after(module, after)

    def _watch_separate_experts(self, name: str, block: nn.Module, experts: SeparateExperts) -> None:
        for child in block.children():
            if child is not experts.modules:
                self.after(child, lambda args, output, child=child: experts.add_other(child, output))  # type: ignore[misc]
        for index, expert in enumerate(experts.modules):
            self.after(expert, lambda args, output, index=index: experts.add(index, args, output))  # type: ignore[misc]
        place = self.names[experts.modules]

        def record(args: tuple[Any, ...], output: Any) -> None:
            found = experts.solved(args[0], output)
            if found is not None:
                self.trace.add_experts(place, found.call, found.routing)
                self.trace.add(place, OUTPUT, found.output)

        self.after(block, record)

    def _add_positions(self, args: tuple[Any, ...]) -> None:
        for arg in args:
            self.trace.add_positions(arg)

    def __enter__(self) -> "TheirRecorder":
        super().__enter__()
        for module in self.names:
            module.rtp_llm_recorder = self  # type: ignore[assignment]
        if self.model._can_set_attn_implementation():  # type: ignore[operator]
            self.model.set_attn_implementation(RECORDING)  # type: ignore[operator]
        self._recurrent.open(self.names)
        return self

    def end_watches(self) -> None:
        """End what a forward pass that failed has left open."""
        self._recurrent.forget()
        while self._watches:
            self._watches.pop().__exit__(None, None, None)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._recurrent.close()
        self.end_watches()
        if self.model._can_set_attn_implementation():  # type: ignore[operator]
            self._restore()
        for module in self.names:
            del module.rtp_llm_recorder

    def _restore(self) -> None:
        """Set the attention function from before; a part may not support it, such as a tower without attention."""
        try:
            self.model.set_attn_implementation(self._implementation)  # type: ignore[operator]
        except ValueError:
            self.model.set_attn_implementation("eager")  # type: ignore[operator]

    def add_attention(
        self,
        module: nn.Module,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: Any,
        options: dict[str, Any],
        output: torch.Tensor,
    ) -> None:
        name, num = self.names[module], states[0].shape[2]
        if self.trace.parts.is_tower(name):
            self._add_vision_attention(name, states, options)
            return
        for part, tensor in zip((QUERIES, KEYS, VALUES), states, strict=True):
            self.trace.add(name, part, tensor[:, :, -num:])
        self.trace.add(name, ATTENDED, output)
        scaling, sinks = options.get("scaling"), options.get("s_aux")
        chunk = chunk_of(mask, num)
        window = None if chunk else window_of(mask, num)
        self.trace.calls[name] = AttentionCall(
            states[0].shape[1],
            states[1].shape[1],
            states[0].shape[3] ** -0.5 if scaling is None else float(scaling),
            window,
            float(options.get("softcap") or 0.0),
            None if sinks is None else sinks.detach().float().cpu().view(-1),
            bias_of(mask, num, window, chunk),
            chunk=chunk,
        )

    def _add_vision_attention(self, name: str, states: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
        """Record a call for a row of packed patches, for one of its segments, or for a batch of images."""
        for part, tensor in zip((QUERIES, KEYS, VALUES), states, strict=True):
            self.trace.add_in_pieces(name, part, tensor)
        num_rows, num_heads, length, head_dim = states[0].shape
        scaling = options.get("scaling")
        cos_sin = cos_sin_of(self._given.pop(name, {}), head_dim)  # of all segments, kept with the first
        scale = head_dim**-0.5 if scaling is None else float(scaling)
        self.trace.add_vision_call(name, VisionCall(num_heads, scale, (length,) * num_rows, cos_sin))


def _record_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Compute the model's own ``eager`` attention, and record it."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", sdpa_attention_forward)
    recorder: Any = module.rtp_llm_recorder
    with DisableTorchFunction():  # so that it is recorded once
        output, weights = eager(module, query, key, value, attention_mask, **options)
    recorder.add_attention(module, (query, key, value), attention_mask, options, output)
    return output, weights


AttentionInterface.register(RECORDING, _record_attention)
AttentionMaskInterface.register(RECORDING, eager_mask)
