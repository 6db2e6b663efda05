"""Messages of a chat, as they reach a template."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from ...validation.request_model import Items, RequestModel


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


def refuse_low(detail: Any) -> Any:
    if detail == "low":
        raise ValueError(
            "'low' is not served: how many tokens an image has follows from its size, as the checkpoint's processor says; "
            "make it smaller, or leave this out"
        )
    return detail


class ImageURL(RequestModel):
    url: str
    # How closely to look: always as closely as the checkpoint's processor can.
    detail: Annotated[Literal["auto", "high"], BeforeValidator(refuse_low)] = "auto"


class ImagePart(RequestModel):
    type: Literal["image_url"]
    image_url: ImageURL


class ChatMessage(RequestModel):
    """One message; what a template needs beyond role and content is passed on to it."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Items[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None

    @property
    def images(self) -> list[str]:
        """In order, as they were given."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    def for_template(self) -> dict[str, Any]:
        """A template is told where images are, not what they are."""
        content: str | list[dict[str, str]] | None
        if not isinstance(self.content, list):
            content = self.content
        elif self.images:
            content = [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in self.content
            ]
        else:
            content = "".join(part.text for part in self.content if isinstance(part, TextPart))
        message = {**(self.model_extra or {}), "role": self.role, "content": content or ""}
        calls = message.get("tool_calls")
        return (
            message | {"tool_calls": [with_arguments(call) for call in calls]} if isinstance(calls, list) else message
        )


def with_arguments(call: Any) -> Any:
    """A call of an earlier turn, with its arguments as the object that templates write; OpenAI's are its JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
