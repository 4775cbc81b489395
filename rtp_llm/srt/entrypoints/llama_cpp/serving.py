"""What llama.cpp's server tells of itself, and of chats without answering them."""

from fastapi import Request
from starlette.responses import Response

from rtp_llm.srt.entrypoints.asgi import JSON, unless_disconnected
from rtp_llm.srt.entrypoints.chat_request import EFFORT, encoded_chat, render
from rtp_llm.srt.entrypoints.errors import unavailable
from rtp_llm.srt.entrypoints.llama_cpp.protocol import AppliedTemplate, Properties
from rtp_llm.srt.entrypoints.llama_cpp.settings import generation_settings
from rtp_llm.srt.entrypoints.llama_cpp.slots import Slots
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.protocol import ChatCompletionRequest, InputTokens
from rtp_llm.srt.entrypoints.openai.serving_chat import ChatEndpoint, chat_names
from rtp_llm.srt.entrypoints.serving import Serving, request_names
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.version import __version__


class LlamaCppEndpoints:
    def __init__(self, serving: Serving, chat: ChatEndpoint, slots: Slots) -> None:
        self._serving = serving
        self._chat = chat
        self._slots = slots

    async def props(self) -> Response:
        """Return the model, what it takes, its chat template, and the defaults of sampling parameters."""
        serving = self._serving
        template, tokenizer = serving.template, serving.manager.tokenizer
        is_multimodal = serving.model_config.is_multimodal
        defaults = SamplingParams.from_dict(serving.sampling_defaults)
        variables = frozenset() if template is None else template.variables
        properties: Properties = {
            "default_generation_settings": {
                "n_ctx": serving.manager.max_req_len,
                "params": generation_settings(defaults, None),
            },
            "total_slots": self._slots.num_slots,
            "model_alias": serving.model_name,
            "model_path": serving.args.model_path,
            "modalities": {"vision": is_multimodal, "video": is_multimodal, "audio": False},
            "endpoint_slots": True,
            "endpoint_props": False,
            "endpoint_metrics": True,
            "chat_template": "" if template is None else template.text,
            "chat_template_caps": {
                "supports_tools": serving.answer_format.has_calls or serving.response_template is not None,
                "supports_reasoning_effort": EFFORT in variables,
            },
            "bos_token": getattr(tokenizer, "bos_token", None) or "",
            "eos_token": getattr(tokenizer, "eos_token", None) or "",
            "build_info": f"rtp-llm {__version__}",
            "is_sleeping": False,
        }
        return JSON(properties)

    async def slots(self, fail_on_no_slot: str | None = None) -> Response:
        """Return a slot for each request that may run at once, with what its request has come to.

        Args:
            fail_on_no_slot: anything: a 503 if there is no free slot.
        """
        if fail_on_no_slot and not self._slots.num_free:
            raise unavailable("no slot is free", "no_free_slot")
        return JSON(self._slots.told())

    async def apply_template(self, body: ChatCompletionRequest) -> Response:
        """Return the text of the prompt that the same body would have in /v1/chat/completions."""
        self._check(body)
        with request_names(chat_names(body)):
            chat = await render(self._serving, self._chat.chat_request(body))
        return JSON(AppliedTemplate(prompt=chat.text))

    async def count_chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Return the number of tokens of the prompt that the same body would have in /v1/chat/completions."""
        self._check(body)
        with request_names(chat_names(body)):
            counting = encoded_chat(self._serving, self._chat.chat_request(body))
            prompt = await unless_disconnected(request.receive, counting)
        if prompt is None:
            return disconnected_response()
        return JSON(InputTokens(object="response.input_tokens", input_tokens=len(prompt.input_ids)))

    def _check(self, body: ChatCompletionRequest) -> None:
        self._serving.check_model(body.model)
        self._serving.check_tokenizer()
