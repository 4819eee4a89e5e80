"""transformers' own server with exits: its handlers, streaming and all, around one model that was loaded beforehand."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from dyvte.loading import Mllm
from dyvte.runtime import Handle


def build_app(mllm: Mllm, name: str, exits: Handle) -> FastAPI:
    """The routes of ``transformers serve`` for one model, as an ASGI application.

    A chat completion tells under ``dyvte``, streamed in its last chunk, its ``exit_layer``, the model's ``layers``, and
    ``saved``, the share of its visual-token layers that was left out. Requests are answered one after the other.

    ``exits`` is a method at work on the model, which clients call by ``name``.
    """
    models, state = Models(mllm, name), GenerationState()
    app = build_server(
        models,
        Chat(models, state, exits),
        CompletionHandler(models, state),
        ResponseHandler(models, state),
        TranscriptionHandler(models, state),
        SystemOneHandler(models, state),
        generation_state=state,
    )
    for fault in (ValueError, HTTPException):
        app.add_exception_handler(fault, _refuse)
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """In the form in which clients look for the message."""
    told = {"message": str(getattr(error, "detail", error)), "type": "invalid_request_error"}
    return JSONResponse({"error": told}, getattr(error, "status_code", 400))


class Models(ModelManager):
    """The one model that this server has."""

    def __init__(self, mllm: Mllm, name: str):
        self.mllm, self.name = mllm, name
        super().__init__(force_model=name)

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if model_id_and_revision != self.process_model_name(self.name):
            raise ValueError(f"this server has {self.name} alone, not {model_id_and_revision}: ask for that")
        return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.mllm.processor

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return self.mllm.model


class Chat(ChatCompletionHandler):
    """Answers of ``/v1/chat/completions`` that tell their exits."""

    def __init__(self, models: Models, state: GenerationState, exits: Handle):
        super().__init__(models, state)
        self.exits = exits

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        if not isinstance(body.get("messages"), list):
            raise ValueError("a chat completion needs messages, a list such as [{role: user, content: ...}]")
        one = copy.copy(self)  # a handler for each request, since clients may choose the same id
        one.note = Note(self.exits)
        return await ChatCompletionHandler.handle_request(one, body, request_id)

    def _streaming(self, request_id: str, model: Any, processor: Any, name: str, inputs: Any, *args: Any, **kw: Any):
        return super()._streaming(request_id, model, processor, name, self._noted(inputs), *args, **kw)

    async def _non_streaming(self, request_id: str, model: Any, processor: Any, name: str, inputs: Any, *args, **kw):
        return await super()._non_streaming(request_id, model, processor, name, self._noted(inputs), *args, **kw)

    def _noted(self, inputs: Any) -> dict[str, Any]:
        return {**inputs, "stopping_criteria": StoppingCriteriaList([self.note])}

    def _build_completion(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super()._build_completion(*args, **kwargs) | {"dyvte": self.note.exit}

    def _build_chunk_sse(self, *args: Any, finish_reason: str | None = None, **kwargs: Any) -> str:
        line = super()._build_chunk_sse(*args, finish_reason=finish_reason, **kwargs)
        if finish_reason is None:
            return line
        chunk = json.loads(line.removeprefix("data: "))
        return self.chunk_to_sse(json.dumps(chunk | {"dyvte": self.note.exit}))


class Note(StoppingCriteria):
    """Stops nothing: it is asked after every token, on the thread that runs the model, before a stream ends."""

    def __init__(self, exits: Handle):
        self.exits, self.exit = exits, None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.exit is None:
            record = self.exits.record[-1]
            layers, visual = self.exits.num_layers, int(record.visual[0])
            saved = 1 - int(record.counts[:, 0].sum()) / (layers * visual) if visual else 0.0
            self.exit = {"exit_layer": int(record.layers[0]), "layers": layers, "saved": round(saved, 4)}
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
