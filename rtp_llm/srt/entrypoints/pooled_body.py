"""Fields that bodies of all endpoints of pooled outputs share."""

from typing import Any, Literal

from pydantic import Field, model_validator

from rtp_llm.srt.entrypoints.openai.protocol import Body, Name, Salt
from rtp_llm.srt.sampling_params import InvalidRequest

# Other servers' fields, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "chat_template_kwargs": (),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "instruct": (),
    "instruction": (),
    "lora_path": (),
    "max_tokens_per_doc": (0,),
    "max_tokens_per_query": (0,),
    "messages": (),
    "mm_processor_kwargs": (),
    "padding": ("do_not_pad",),
    "truncation_side": ("right",),
}


class PooledBody(Body):
    unsupported = UNSUPPORTED

    model: str | None = Field(None, description="one of /v1/models; may be left out")
    user: str | None = Field(None, description="accepted; not used")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="extension: cut inputs to so many tokens, -1: to as many as the model takes"
    )
    cache_salt: Salt | None = Field(None, description="extension: share cached prefixes only with equal salts")
    priority: int | None = Field(None, description="extension: lower is earlier; with --schedule-policy priority")
    rid: Name | None = Field(None, description="extension: for /abort_request")

    @model_validator(mode="before")
    @classmethod
    def _one_kind_of_inputs(cls, values: Any) -> Any:
        """Refuse ids among texts with a sentence of their own, since a list of ids is one input."""
        inputs = values.get("input") if isinstance(values, dict) else None
        if isinstance(inputs, list) and len({isinstance(item, int) for item in inputs}) > 1:
            raise InvalidRequest("input mixes ids with texts or lists: the ids of an input are a list", "input")
        return values

    def shared_options(self) -> dict[str, Any]:
        """Return the options of PoolingOptions that are the same for all inputs."""
        names = ("truncate_prompt_tokens", "cache_salt", "priority")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class TakesInstruction(PooledBody):
    """The body of an endpoint that scores pairs."""

    instruction: str | None = Field(
        None, description="what a model that scores pairs by a template shall judge; unset: what it was trained for"
    )
    score_by: Literal["score", "embed", "token_embed", "sparse"] | None = Field(
        None,
        description="extension: the output by which texts are compared: that of pairs, cosine, MaxSim, or weights "
        "of equal tokens; unset: the first that the model has",
    )
    instruct: str | None = Field(None, description="SGLang's name of instruction")

    def shared_options(self) -> dict[str, Any]:
        if self.instruction is not None and self.instruct is not None:
            raise InvalidRequest("instruct and instruction mean the same: give one of them", "instruct")
        asked = self.instruct if self.instruction is None else self.instruction
        options = super().shared_options()
        return options if asked is None else {**options, "instruction": asked}


class UsesActivation(PooledBody):
    """The body of vLLM's endpoints for scores and labels."""

    use_activation: bool | None = Field(
        None, description="extension: false: numbers before the softmax or sigmoid; unset: as the checkpoint has it"
    )
