"""Chat templates without torch: found, compiled and rendered as `transformers` does it, by its own renderer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]

DEFAULT = "default"
# The template of a list that `transformers` takes when there are tools.
WITH_TOOLS = "tool_use"
# Arguments of the renderer, which are no variables of a template.
USES_TOOLS = re.compile(r"\btools\b")
RESERVED = frozenset(
    {
        "messages",
        "conversations",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
    }
)
MAX_RENDERED_CHARS = 1 << 25


class ChatTemplate:
    """Renders messages to the text that the model was trained on.

    `sources` are a checkpoint's templates by name. One that cannot be compiled can be rendered no more than one that is
    missing; `problem` says why there is none at all. `split_special_tokens` is what a chat wants that does not say.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        problem: str | None = None,
        max_chars: int = MAX_RENDERED_CHARS,
        split_special_tokens: bool = False,
    ) -> None:
        self.split_special_tokens = split_special_tokens
        self._sources = sources
        self._special_tokens = special_tokens
        self._max_chars = max_chars
        self._problem = problem
        self._problems = {name: found for name, source in sources.items() if (found := self._prepare(name, source))}
        for reason in [*self._problems.values(), *([problem] if problem else [])]:
            logger.warning("%s; chat takes input_ids only", reason)

    @property
    def takes_tools(self) -> bool:
        return WITH_TOOLS in self._sources or bool(USES_TOOLS.search(self._sources.get(DEFAULT, "")))

    @property
    def text(self) -> str:
        """All of its sources, to see of which family it is."""
        return "\n".join(self._sources.values())

    def _prepare(self, name: str, source: str) -> str | None:
        """Compile a template; why that cannot be done, if so."""
        try:
            template = _compile_jinja_template(source)
        # Compiling runs the expressions that are constant, and Jinja and `transformers` raise what they like.
        except Exception as error:
            return f"the chat template {name!r} cannot be compiled: {error}"
        # `render_jinja_template` finds the compiled template by its source, and joins what it yields with this.
        template.environment.concat = self._concat
        return None

    def _concat(self, pieces: Iterable[str]) -> str:
        kept, num_chars = [], 0
        for piece in pieces:
            num_chars += len(piece)
            if num_chars > self._max_chars:
                raise TemplateError(f"the template makes more than {self._max_chars} characters of them")
            kept.append(piece)
        return "".join(kept)

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """
        Raises:
            ValueError: the template refuses the messages or the variables, or cannot be used, and why.
        """
        taken = sorted((RESERVED | self._special_tokens.keys()) & variables.keys())
        if taken:
            raise ValueError(f"chat_template_kwargs: must not have {taken[0]!r}")
        source = self._source(with_tools=variables.get("tools") is not None)
        # Null is no value, as for `transformers`.
        conversation = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            rendered, _ = render_jinja_template(
                conversations=[conversation],
                chat_template=source,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **self._special_tokens,
                **{"tools": None, "documents": None, **variables},
            )
        except TemplateError as error:
            raise ValueError(f"messages: {error}") from error
        # The checkpoint's own program ran on a caller's values: it may raise anything.
        except Exception as error:
            logger.info("the chat template failed", exc_info=True)
            raise ValueError(
                f"messages, chat_template_kwargs: the template cannot use them: {type(error).__name__}: {error}"
            ) from error
        text: str = rendered[0]
        return text

    def _source(self, *, with_tools: bool) -> str:
        name = WITH_TOOLS if with_tools and WITH_TOOLS in self._sources else DEFAULT
        problem = self._problem or self._problems.get(name)
        if problem is None and name not in self._sources:
            problem = f"the checkpoint has chat templates {sorted(self._sources)} and no {DEFAULT!r} one"
        if problem is not None:
            raise ValueError(f"messages: {problem}; give input_ids")
        return self._sources[name]


def load_chat_template(
    path: str, *, max_chars: int = MAX_RENDERED_CHARS, split_special_tokens: bool = False
) -> ChatTemplate | None:
    """The templates of a checkpoint folder; None where it has none.

    `chat_template.jinja` and `additional_chat_templates/*.jinja`, if there are such files, else `tokenizer_config.json`.
    Where they cannot be read there is a template that says so when it is rendered.
    """
    folder = Path(path)
    try:
        config = _read_object(folder / "tokenizer_config.json")
        sources = _sources(folder, config)
        special_tokens = _special_tokens(folder, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return ChatTemplate({}, {}, problem=f"the chat template cannot be read: {type(error).__name__}: {error}")
    if not sources:
        return None
    return ChatTemplate(sources, special_tokens, max_chars=max_chars, split_special_tokens=split_special_tokens)


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; {} without the file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name}: must be a JSON object")
    return found


def _sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; files come before the configuration."""
    files = {file.stem: file for file in sorted((folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))}
    default = folder / CHAT_TEMPLATE_FILE
    if default.is_file():
        files.setdefault(DEFAULT, default)
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    template = config.get("chat_template")
    if template is None:
        return {}
    sources = {one["name"]: one["template"] for one in template} if isinstance(template, list) else {DEFAULT: template}
    if not all(isinstance(source, str) for source in sources.values()):
        raise ValueError("tokenizer_config.json: chat_template: must be text, or a list of {name, template}")
    return sources


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """What templates know by name: `bos_token` and all others that end so, and named extra ones."""
    named = dict(config)
    if "added_tokens_decoder" not in config:
        # Older checkpoints.
        named |= _read_object(folder / "special_tokens_map.json")
    extra = named.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    else:
        extra = {}
    tokens = {}
    for name, token in named.items():
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and (name.endswith("_token") or name in extra):
            tokens[name] = content
    return tokens
