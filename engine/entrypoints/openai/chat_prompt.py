"""A chat's prompt: messages and tools as the template writes them, and what follows from it for the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...chat_formats.delta import Reader
from ...chat_formats.formats import NONE, TOOL_FORMATS, ChatFormats
from ...frontend.chat_template import ChatTemplate
from ...frontend.generate_request import GenerateReqInput, parse_generate_request
from ...frontend.text_codec import TextCodec
from ...validation.field_error import FieldError
from ...validation.token_ids import Ids
from .messages import ChatMessage
from .protocol import ChatCompletionRequest

# Enough for the mark that reasoning begins or ends with.
NUM_TAIL_TOKENS = 16


def render_ids(
    template: ChatTemplate | None,
    text: TextCodec,
    messages: list[ChatMessage],
    max_tokens: int,
    /,
    *,
    split_special_tokens: bool | None = None,
    **fields: Any,
) -> list[int]:
    """Messages as the template writes them, tokenised. With `split_special_tokens` the special tokens are those that the
    template wrote; what messages, tools and variables have of them is text.

    Raises:
        ValueError: there is no template, it refuses the messages, or they do not fit.
    """
    if template is None:
        raise FieldError("messages: the checkpoint has no chat template; give input_ids", "messages")
    if fields.get("tools") and not template.takes_tools:
        raise FieldError("tools: the checkpoint's chat template takes none", "tools")
    conversation = [message.for_template() for message in messages]
    rendered = template.render(conversation, **fields)
    masked = None
    if template.split_special_tokens if split_special_tokens is None else split_special_tokens:
        masked = render_masked(template, text, rendered, conversation, fields)
    # The template writes the special tokens that there are.
    return text.encode(rendered, add_special_tokens=False, max_tokens=max_tokens, masked=masked)


def render_masked(
    template: ChatTemplate, text: TextCodec, rendered: str, conversation: list[dict[str, Any]], fields: dict[str, Any]
) -> str:
    """What the template writes when it is not shown the special tokens of the caller's.

    Raises:
        ValueError: it is something else than `rendered`, in which it was, or has one that the template has not written.
    """
    given = [conversation, fields]
    mask = text.splitting.mask(rendered)
    hidden, edges = mask.hide(given), text.splitting.edge_mask(rendered).hide(given)
    if edges == given:
        return rendered
    masked = rendered if hidden == given else template.render(hidden[0], **hidden[1])
    # One that the template has made of parts of the caller's text, by taking out what was between them.
    num_own = text.splitting.num_special(template.render(edges[0], **edges[1]))
    if mask.show(masked) != rendered or text.splitting.num_special(masked) > num_own:
        raise FieldError(
            "messages: have the text of a special token that the chat template acts on, which cannot be taken as text "
            "(split_special_tokens)",
            "messages",
        )
    return masked


@dataclass(frozen=True)
class ChatPrompt:
    """What an answer's readers need to know of its request."""

    formats: ChatFormats
    tools: list[dict[str, Any]]
    is_array: bool
    tail: str
    separates: bool
    streams_reasoning: bool

    @staticmethod
    def of(body: ChatCompletionRequest, ids: Ids | list[int], formats: ChatFormats, text: TextCodec) -> ChatPrompt:
        """
        Raises:
            ValueError: tools are given, and nothing can read calls.
        """
        tools = body.callable_tools
        if tools and not body.must_call and formats.tools == NONE:
            raise FieldError("tools: how the model writes calls is not known; set --tool-call-parser", "tools")
        tail = ""
        if formats.reasoning_format is not None and text.is_there:
            # A caller's ids are checked with the engine's request; a decoder takes no negative ones.
            tail = text.decode([one for one in ids[-NUM_TAIL_TOKENS:] if one >= 0], skip_special_tokens=False)
        return ChatPrompt(formats, tools, body.must_call, tail, body.separate_reasoning, body.stream_reasoning)

    def reader(self) -> Reader | None:
        return self.formats.reader(
            self.tools,
            prompt_tail=self.tail,
            separates=self.separates,
            streams_reasoning=self.streams_reasoning,
            is_array=self.is_array,
        )

    def keeps_special_tokens(self, special_tokens: frozenset[str]) -> bool:
        """Whether marks that are special tokens have to be in the text that is read."""
        if self.formats.uses_channels:
            return not self.is_array
        marks: list[str] = []
        form = self.formats.reasoning_format
        if form is not None:
            marks += (form.begin, form.end)
        if self.tools and self.formats.tools in TOOL_FORMATS:
            calls = TOOL_FORMATS[self.formats.tools]
            marks += (calls.begin, calls.end, *calls.frames)
        return any(mark in special_tokens for mark in marks)

    def to_generate(self, fields: dict[str, Any], text: TextCodec) -> GenerateReqInput:
        """The engine's request; a grammar begins behind the reasoning of a model that reasons.

        Raises:
            ValueError: a field is out of range, or the tokenizer has no token for the end of reasoning.
        """
        if self.keeps_special_tokens(text.special_tokens):
            params = {**fields["sampling_params"], "skip_special_tokens": False}
            fields = {**fields, "sampling_params": params}
        request = parse_generate_request(fields)
        form = self.formats.reasoning_format
        field = request.params_by_item[0].grammar_field
        if form is not None and field is not None and form.will_reason(self.tail):
            end = text.token_id(form.end)
            if end is None:
                raise FieldError(
                    f"{field}: the tokenizer has no token {form.end!r}, behind which it would begin", field
                )
            request.begin_grammar_after(end)
        return request
