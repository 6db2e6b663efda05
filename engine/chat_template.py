"""Chat templates without torch: the checkpoint's Jinja template, rendered in a sandbox as `transformers` renders it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, str]


class ChatTemplate:
    """Renders messages to the text that the model was trained on.

    Raises (on rendering):
        ValueError: the template refuses the messages, and says why.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **variables,
            )
        except TemplateError as error:
            raise ValueError(f"messages: {error}") from error


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def load_chat_template(path: str) -> ChatTemplate | None:
    """The template of a checkpoint folder: `chat_template.jinja`, or the one in `tokenizer_config.json`; else None."""
    folder = Path(path)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    template_file = folder / "chat_template.jinja"
    source = template_file.read_text() if template_file.is_file() else config.get("chat_template")
    if source is None:
        return None
    special_tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        if token is not None:
            special_tokens[name] = token["content"] if isinstance(token, dict) else token
    return ChatTemplate(source, special_tokens)
