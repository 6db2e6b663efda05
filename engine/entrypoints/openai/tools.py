"""Tools of a chat, and which of them an answer must call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from ...validation.request_model import RequestModel

MAX_TOOLS = 1024


class ToolFunction(RequestModel):
    """`strict` changes nothing: a call that must be made always has arguments of the schema."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    parameters: dict[str, Any] | None = None


class Tool(RequestModel):
    """It reaches the template as it was sent."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: ToolFunction


class FunctionName(RequestModel):
    name: str


class NamedTool(RequestModel):
    type: Literal["function"] = "function"
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
