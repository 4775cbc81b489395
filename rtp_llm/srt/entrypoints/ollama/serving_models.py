"""Endpoints about models in Ollama's API: there is one, which is loaded. What would change that is refused."""

from fastapi import Request
from starlette.responses import PlainTextResponse, Response

from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.errors import ApiError
from rtp_llm.srt.entrypoints.ollama import models
from rtp_llm.srt.entrypoints.ollama.options import context_length
from rtp_llm.srt.entrypoints.ollama.protocol import (
    ApiVersion,
    ListedModel,
    LoadedModel,
    LoadedModels,
    Models,
    ShowBody,
    ShownModel,
)
from rtp_llm.srt.entrypoints.ollama.replies import timestamp
from rtp_llm.srt.entrypoints.serving import Serving
from rtp_llm.srt.sampling_params import InvalidRequest

API_VERSION = "0.34.0"  # the release of Ollama whose API this is: clients look for the least that they need
NEVER = "9999-12-31T23:59:59Z"  # when the model leaves the memory
RUNNING = "Ollama is running"  # what clients look for at /


class ModelEndpoints:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._modified_at = timestamp(models.modified_s(serving))

    async def running(self) -> Response:
        """Say that an API of Ollama's is here, in the words by which its clients know it."""
        return PlainTextResponse(RUNNING)

    async def tags(self) -> Response:
        """Return the served model, once for each of its names."""
        return JSON(Models(models=[self._listed(name) for name in self._names()]))

    async def ps(self) -> Response:
        """Return the model that is in memory: the served one, by its first name."""
        serving, name = self._serving, self._names()[0]
        info = serving.core.info
        loaded: LoadedModel = {
            "name": name,
            "model": name,
            "size": (info.weight_bytes + info.cache_bytes) * serving.args.num_ranks,
            "digest": models.digest(serving),
            "details": models.details(serving),
            "expires_at": NEVER,
            "context_length": context_length(serving),
        }
        return JSON(LoadedModels(models=[loaded]))

    async def show(self, body: ShowBody) -> Response:
        """Return the model's chat template, sizes and abilities."""
        serving = self._serving
        if None not in (body.model, body.name) and body.model != body.name:
            raise InvalidRequest("model and name differ; give one", "name")
        models.check_name(serving, body.model or body.name)
        shown: ShownModel = {
            "modelfile": models.modelfile(serving),
            "parameters": models.parameters(serving),
            "template": "" if serving.template is None else serving.template.text,
            "details": models.details(serving),
            "model_info": models.model_info(serving),
            "capabilities": models.capabilities(serving),
            "modified_at": self._modified_at,
        }
        return JSON(shown)

    async def version(self) -> Response:
        """Return the release of Ollama whose API is spoken here; /version has that of this program."""
        return JSON(ApiVersion(version=API_VERSION))

    async def refuse_changes(self, request: Request) -> Response:
        """Refuse to fetch, make, copy or delete a model."""
        await request.body()  # otherwise the connection would end here
        names = " and ".join(map(repr, self._serving.args.model_names))
        raise ApiError(400, f"this server serves one model, {names}, which was chosen at its start: it has no others")

    def _names(self) -> list[str]:
        return [models.tagged(name) for name in self._serving.args.model_names]

    def _listed(self, name: str) -> ListedModel:
        serving = self._serving
        return {
            "name": name,
            "model": name,
            "modified_at": self._modified_at,
            "size": serving.core.info.weight_bytes * serving.args.num_ranks,
            "digest": models.digest(serving),
            "details": models.details(serving),
        }
