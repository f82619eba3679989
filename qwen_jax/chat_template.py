"""Chat templates: the jinja2 texts that turn messages into a prompt, run in a sandbox as in transformers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_jax.errors import CheckpointError


class ChatTemplateError(CheckpointError):
    """A chat template that is missing, broken, or refuses the messages it was given."""


class ChatTemplate:
    """The named chat templates of one checkpoint.

    Args:
        templates: jinja2 text by name; the one called "default" is used unless another is asked for.
        variables: values every template sees, such as `eos_token`.
        source: where the templates come from, for error messages.
    """

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, Any], source: str) -> None:
        self._templates = dict(templates)
        self._variables = dict(variables)
        self._source = source
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer_config: Mapping[str, Any], variables: Mapping[str, Any]
    ) -> ChatTemplate:
        """Reads chat_template.jinja and additional_chat_templates/*.jinja, else tokenizer_config.json.

        Raises:
            ChatTemplateError: `chat_template` is neither a text nor a list of {"name": ..., "template": ...}.
        """
        file = folder / "chat_template.jinja"
        extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if file.is_file() or extra:
            templates = {path.stem: _read(path) for path in extra}
            if file.is_file():
                templates["default"] = _read(file)
            return cls(templates, variables, str(folder))
        path = folder / "tokenizer_config.json"
        return cls(_from_config(tokenizer_config.get("chat_template"), path), variables, str(path))

    @property
    def names(self) -> tuple[str, ...]:
        """The templates there are; empty when the checkpoint has none."""
        return tuple(self._templates)

    def render(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`.

        Args:
            messages: a text (one message of the user) or mappings {"role": ..., "content": ...}.
            add_generation_prompt: end with the opening of the assistant's answer.
            template: name of the template; None: "default", or "tool_use" if it exists and there are `tools`.
            **variables: what the template may use besides, for instance `tools` as a list of JSON schemas.

        Raises:
            ChatTemplateError: no such template, a broken one, or one that refuses these messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if any(callable(tool) for tool in variables.get("tools") or ()):
            raise ChatTemplateError("tools must be given as JSON schemas, not as Python functions")
        variables = {"tools": None, "documents": None} | self._variables | variables
        name = template or ("tool_use" if variables["tools"] and "tool_use" in self._templates else "default")
        try:
            return self._compile(name).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **variables
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise ChatTemplateError(
                f"{self._source}: chat template {name!r} failed on these messages: {_one_line(error)}"
            ) from None

    def _compile(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            if not self._templates:
                raise ChatTemplateError(
                    f"{self._source}: no chat template; give a plain prompt, or add a chat_template.jinja"
                )
            if name not in self._templates:
                raise ChatTemplateError(
                    f"{self._source}: no chat template {name!r}; there are: {', '.join(self._templates)}"
                )
            try:
                self._compiled[name] = _environment().from_string(self._templates[name])
            except jinja2.TemplateSyntaxError as error:
                raise ChatTemplateError(
                    f"{self._source}: chat template {name!r}, line {error.lineno}: {_one_line(error)}"
                ) from None
        return self._compiled[name]


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes HTML, which would change the prompt."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _from_config(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        templates = {None: None}
    if not all(isinstance(part, str) for item in templates.items() for part in item):
        raise ChatTemplateError(
            f"{path}: chat_template must be a text or a list of name and template, got {value!r:.80}"
        )
    return templates


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"{path}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
