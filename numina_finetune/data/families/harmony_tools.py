"""Tools as gpt-oss reads them: a namespace of function types in the manner of TypeScript.

::

    namespace functions {

    // Runs Python and gives what it prints.
    type python = (_: {
    // The program.
    code: string,
    timeout?: number, // default: 10
    }) => any;

    } // namespace functions

Source: https://github.com/openai/harmony (release 0.0.8), quirks included, because the model was trained on them: lines
inside an object that is a property's value are indented by four, an object's description stands before its brace, only
a tool's own description is broken into comment lines, and ``anyOf`` and ``$ref`` are not read.
"""

from __future__ import annotations

import json
from typing import Any

from numina_finetune.errors import DataError

Schema = dict[str, Any]
"""A JSON schema that is an object; what else may stand for a schema (``True``) is written ``any``."""

_SIMPLE = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def functions_section(tools: list[dict[str, Any]]) -> str:
    """The developer message's section on the tools that the model may call.

    Args:
        tools: OpenAI tool definitions, each with a function that has a name; not empty.

    Raises:
        DataError: a description is no text, or parameters are no JSON schema object.
    """
    faults: list[str] = []
    for position, tool in enumerate(tools):
        for key, kind, need in (("description", str, "text"), ("parameters", dict, "a JSON schema object")):
            value = tool["function"].get(key)
            if value is not None and not isinstance(value, kind):
                faults.append(f"tools[{position}].function.{key}: is {type(value).__name__}, needs {need}")
    if faults:
        raise DataError(faults)
    functions = "\n".join(_function(tool["function"]) for tool in tools)
    return f"# Tools\n\n## functions\n\nnamespace functions {{\n\n{functions}\n}} // namespace functions"


def _function(function: dict[str, Any]) -> str:
    description = function.get("description") or ""
    # Not splitlines(), which breaks at further characters.
    lines = description.replace("\r\n", "\n").removesuffix("\n").split("\n") if description else []
    parameters = function.get("parameters")
    argument = "" if parameters is None else f"_: {_type(parameters, '')}"
    return "".join(f"// {line}\n" for line in lines) + f"type {function['name']} = ({argument}) => any;\n"


def _type(schema: Any, indent: str) -> str:
    if not isinstance(schema, dict):
        return "any"
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join(_inner_variant(variant, indent) for variant in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = [name for name in kind if isinstance(name, str)]
        return " | ".join("number" if name == "integer" else name for name in names) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and isinstance(values := schema.get("enum"), list):
        return " | ".join(f'"{value}"' for value in values if isinstance(value, str)) or "string"
    return _SIMPLE.get(kind, "any") if isinstance(kind, str) else "any"


def _nullable(schema: Any, indent: str) -> str:
    text = _type(schema, indent)
    nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def _object(schema: Schema, indent: str) -> str:
    properties, required = schema.get("properties"), schema.get("required")
    lines = "".join(
        _property(name, value, indent, required=isinstance(required, list) and name in required)
        for name, value in (properties.items() if isinstance(properties, dict) else ())
    )
    description = _text(schema, "description")
    above = [] if description is None else [f"// {description}"]
    return f"{_above(above, indent)}{{\n{lines}{indent}}}"


def _property(name: str, schema: Any, indent: str, *, required: bool) -> str:
    """One property with its comments, as whole lines."""
    above: list[str] = []
    if (title := _text(schema, "title")) is not None:
        above += [f"// {title}", "//"]
    description = _text(schema, "description")
    choice = isinstance(schema, dict) and "oneOf" in schema
    if description is not None and not choice:
        above.append(f"// {description}")
    above += _examples(schema)
    key = name if required else f"{name}?"
    if choice and isinstance(schema["oneOf"], list):
        return _choice(key, schema, indent, above)
    below = [] if choice else _default(schema)
    value = f"{key}: {_nullable(schema, indent + '    ')},{_trailing(below)}"
    return f"{_above(above, indent)}{indent}{value}\n"


def _choice(key: str, schema: Schema, indent: str, above: list[str]) -> str:
    """A property whose schema is ``oneOf``: one line a variant, with the variant's comments behind it."""
    variants, description = schema["oneOf"], _text(schema, "description")
    # The description stands above the property, unless the first variant's comment would say the same.
    told_above = description is not None and not (variants and _text(variants[0], "description") == description)
    told = [description] if description is not None and told_above else []
    above = above + [f"// {comment}" for comment in [*told, *_default(schema)]]
    lines = []
    for number, variant in enumerate(variants):
        own = _text(variant, "description")
        silent = own is None or own == description or (number == 0 and told_above)
        below = ([] if silent or own is None else [own]) + _default(variant)
        lines.append(f"{indent} | {_nullable(variant, indent + '   ')}{_trailing(below)}\n")
    return f"{_above(above, indent)}{indent}{key}:\n{''.join(lines)}{indent},\n"


def _inner_variant(variant: Any, indent: str) -> str:
    """A variant of a ``oneOf`` that is no property: an array's items, another variant, the parameters themselves."""
    description = _text(variant, "description")
    below = ([] if description is None else [description]) + _default(variant, bare_enums=False)
    return f"\n{indent} | {_nullable(variant, indent + '   ')}{_trailing(below)}"


def _examples(schema: Any) -> list[str]:
    examples = schema.get("examples") if isinstance(schema, dict) else None
    if not isinstance(examples, list) or not examples:
        return []
    return ["// Examples:", *(f'// - "{example}"' for example in examples if isinstance(example, str))]


def _default(schema: Any, *, bare_enums: bool = True) -> list[str]:
    if not isinstance(schema, dict) or "default" not in schema:
        return []
    value = schema["default"]
    if not isinstance(value, str):
        return [f"default: {_json(value)}"]
    enum = schema.get("enum")
    if not (isinstance(enum, list) and enum):
        return [f'default: "{value}"']
    return [f"default: {value if bare_enums else _json(value)}"]


def _above(comments: list[str], indent: str) -> str:
    return "".join(f"{indent}{comment}\n" for comment in comments)


def _trailing(comments: list[str]) -> str:
    return f" // {' '.join(comments)}" if comments else ""


def _text(schema: Any, key: str) -> str | None:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, str) else None


def _json(value: Any) -> str:
    """Compact JSON with numbers as Rust's serde_json writes them: ``0.00001``, ``1e-7``, ``1e16``."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(key)}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_json(item) for item in value) + "]"
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, float) or "e" not in text:
        return text
    digits, exponent = text.split("e")
    if int(exponent) == -5:  # the one magnitude that Python writes with an exponent and serde_json without
        return f"{'-' * (value < 0)}0.0000{digits.lstrip('-').replace('.', '')}"
    return f"{digits}e{int(exponent)}"
