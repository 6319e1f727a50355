"""OpenAI tool definitions: brought into form, checked, and their parameters' schemas compiled once.

Source: https://platform.openai.com/docs/api-reference/chat/create (tools); parameters are JSON Schema, draft 2020-12.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError as SchemaFault
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from referencing import Registry
from typing_extensions import TypedDict

from numina_finetune.data.normalise import (
    Fault,
    decode_json,
    is_encodable,
    kind,
    quoted,
    shape_faults,
    unencodable,
    without_none,
)

FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]

_STRICT = with_config(ConfigDict(strict=True))

NAME_NEED = "1 to 64 letters a-z and A-Z, digits, _ and -"


class Toolbox(NamedTuple):
    """A conversation's tools."""

    tools: list[dict[str, Any]] | None
    """In form; None where there are none."""
    faults: list[str]
    """With their places; where there are any, ``tools`` and ``schemas`` hold only what could be read."""
    schemas: dict[str, ParameterSchema | None]
    """By the name of the function; None where it describes no parameters."""


class ParameterSchema:
    """The compiled schema of a function's parameters.

    Args:
        schema: passed the check against its metaschema.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        # An empty registry: what refers outside the schema is refused, never fetched.
        self._validator = Draft202012Validator(schema, registry=Registry())

    def faults(self, arguments: dict[str, Any]) -> list[str]:
        """Why the arguments do not fit; empty if they do."""
        try:
            # Once each: jsonschema tells every missing property apart, we tell them together.
            return list(dict.fromkeys(map(_misfit, self._validator.iter_errors(arguments))))
        except Exception as error:  # the schema is foreign: references to nowhere or in circles, overflowing numbers, …
            reason = type(error).__name__.lstrip("_")
            return [f"cannot be checked, since the tool's parameters are no usable schema ({reason})"]


def read_tools(tools: Any) -> Toolbox:
    """The tools in form, with every fault. Never raises.

    Args:
        tools: a list of definitions, with or without the ``{"type": "function"}`` wrapper, each or all as JSON text; or
            None.
    """
    try:
        tools = _decoded(tools) if isinstance(tools, str) else tools
        if tools is None or (isinstance(tools, list | tuple) and not tools):
            return Toolbox(None, [], {})
        if not isinstance(tools, list | tuple):
            return Toolbox(None, [f"tools: {kind(tools)}, needs a list of tool definitions"], {})
        return _toolbox(tools)
    except _NoJsonTextError as error:
        return Toolbox(None, [f"tools: {error}"], {})
    except RecursionError:
        return Toolbox(None, ["tools: are nested too deeply"], {})


@_STRICT
class _Function(TypedDict):
    name: FunctionName
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    strict: NotRequired[bool]


@_STRICT
class _Tool(TypedDict):
    type: Literal["function"]
    function: _Function


class _Checked(NamedTuple):
    """What there is to say about one tool, wherever it stands."""

    name: str | None
    """None where it cannot be called."""
    faults: tuple[Fault, ...]
    schema: ParameterSchema | None


_TOOL = TypeAdapter(_Tool)

_NEEDS = {
    "": "an object with type and function",
    ".type": "'function', the only kind of tool that can be trained on",
    ".function": "an object with name and parameters",
    ".function.name": NAME_NEED,
    ".function.description": "text",
    ".function.parameters": "a JSON Schema object",
    ".function.strict": "true or false",
}

_METASCHEMA = Draft202012Validator(Draft202012Validator.META_SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)


def _toolbox(tools: list[Any] | tuple[Any, ...]) -> Toolbox:
    read: list[dict[str, Any]] = []
    box = Toolbox(read, [], {})
    for position, tool in enumerate(tools):
        place = f"tools[{position}]"
        try:
            text = json.dumps(_in_form(tool), allow_nan=False)
        except _NoJsonTextError as error:
            box.faults.append(f"{place}{error.path}: {error}")
            continue
        except (TypeError, ValueError):
            box.faults.append(f"{place}: holds a value that JSON cannot write, such as NaN: use numbers and text")
            continue
        checked = _checked(text)
        read.append(json.loads(text))
        box.faults.extend(f"{place}{fault.path}: {fault.words}" for fault in checked.faults)
        if checked.name in box.schemas:
            box.faults.append(f"{place}.function.name: {quoted(checked.name)} is the name of an earlier tool too")
        elif checked.name is not None:
            box.schemas[checked.name] = checked.schema
    return box


def _in_form(tool: Any) -> Any:
    """A copy with its wrapper, and with its parameters as an object."""
    tool = _decoded(tool) if isinstance(tool, str) else without_none(tool)
    if not isinstance(tool, dict):
        return tool
    if "function" not in tool and "name" in tool:
        tool = {"type": tool.pop("type", "function"), "function": tool}
    tool.setdefault("type", "function")
    function = tool.get("function")
    if isinstance(function, dict) and isinstance(function.get("parameters"), str):
        parameters = _decoded(function.pop("parameters"), ".function.parameters")
        if parameters is not None:
            function["parameters"] = parameters
    return tool


class _NoJsonTextError(Exception):
    """Text that should be JSON; says where in the tool it stands."""

    def __init__(self, words: str, path: str) -> None:
        super().__init__(words)
        self.path = path


def _decoded(text: str, path: str = "") -> Any:
    """JSON text as ``without_none`` leaves it; blank text is None."""
    if not text.strip():
        return None
    try:
        return without_none(decode_json(text))
    except ValueError as error:
        raise _NoJsonTextError(f"{quoted(text)} is not JSON ({error})", path) from None


@lru_cache(maxsize=4096)
def _checked(text: str) -> _Checked:
    """The verdict on a tool in form, by its JSON text: datasets repeat the same tools in row after row."""
    tool = json.loads(text)
    faults = []
    if not is_encodable(tool):
        faults = [Fault(0, path, words) for path, words in unencodable(tool)]
    try:
        _TOOL.validate_python(tool)
    except ValidationError as error:
        return _Checked(None, (*faults, *shape_faults(error, _NEEDS, many=False)), None)
    function = tool["function"]
    if faults or "parameters" not in function:
        return _Checked(function["name"], tuple(faults), None)
    faults = _schema_faults(function["parameters"])
    schema = None if faults else ParameterSchema(function["parameters"])
    return _Checked(function["name"], tuple(faults), schema)


def _schema_faults(parameters: dict[str, Any]) -> list[Fault]:
    path = ".function.parameters"
    try:
        errors = list(_METASCHEMA.iter_errors(parameters))
    except Exception as error:  # such as a pattern whose numbers overflow
        return [Fault(0, path, f"is not valid JSON Schema, draft 2020-12 ({type(error).__name__})")]
    words = dict.fromkeys(f"is not valid JSON Schema, draft 2020-12: {_misfit(error)}" for error in errors)
    return [Fault(0, path, text) for text in words]


def _misfit(error: SchemaFault) -> str:
    """What jsonschema found, in words that differ between rows in quoted values only."""
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    at = f"at {quoted(where)} " if where else ""
    if error.validator is None:  # the schema `false`
        return f"{at}{quoted(_json(error.instance))} stands where the schema allows nothing"
    if error.validator == "required":
        missing = [name for name in error.validator_value if name not in error.instance]
        return f"{at}required {quoted(', '.join(missing))} missing"
    if error.validator == "additionalProperties" and "patternProperties" not in error.schema:
        known = error.schema.get("properties", {})
        return f"{at}the schema has no {quoted(', '.join(name for name in error.instance if name not in known))}"
    return (
        f"{at}{quoted(_json(error.instance))} breaks the rule {error.validator}: {quoted(_json(error.validator_value))}"
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
