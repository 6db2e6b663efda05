"""One choice of a chat: an answer's text, read for reasoning and calls."""

from __future__ import annotations

from typing import Any

from ...chat_formats.delta import Delta, Reader, ToolCall


class ChatAnswer:
    """Follows the text of one choice, in pieces or whole."""

    def __init__(self, reader: Reader | None) -> None:
        self._reader = reader
        self.num_calls = 0

    def push(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """Deltas of OpenAI's stream for the next piece of text; none where nothing is settled."""
        if self._reader is None:
            return [{"content": text}]
        found = self._reader.push(text)
        if is_last:
            found += self._reader.close()
        return [self._delta(one) for one in found]

    def _delta(self, one: Delta) -> dict[str, Any]:
        if one.call is not None:
            call = {"index": self.num_calls, **call_dict(one.call)}
            self.num_calls += 1
            return {"tool_calls": [call]}
        return {"reasoning_content": one.reasoning} if one.reasoning else {"content": one.content}

    def message(self, text: str) -> dict[str, Any]:
        """A whole answer's message."""
        deltas = self.push(text, is_last=True)
        content = "".join(one.get("content", "") for one in deltas)
        calls = [call for one in deltas for call in one.get("tool_calls", [])]
        message: dict[str, Any] = {"role": "assistant", "content": content}
        reasoning = "".join(one.get("reasoning_content", "") for one in deltas)
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
        return message

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.num_calls else reason


def call_dict(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
