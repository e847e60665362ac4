"""Turns pydantic's errors into sentences: where, what is wrong with the value, what is allowed, did you mean.

Surprising: pydantic puts the tag of a union into an error's location (data.sources.pages.ocr.max_patches.number); such
parts are dropped, because the user never wrote them.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "dict_type": "a section (a mapping of keys to values)",
    "model_type": "a section (a mapping of keys to values)",
    "model_attributes_type": "a section (a mapping of keys to values)",
    "tuple_type": "a list",
}

_Choice = tuple[type[BaseModel], str | None, bool]
"""A section that can stand in a place: its class, its union tag, and whether it is the value of a map."""


def describe_errors(error: ValidationError, data: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Returns one sentence per mistake in `data`, which was checked against `model`."""
    lines: list[str] = []
    for details in error.errors():
        lines.extend(_describe(details, data, model))
    return list(dict.fromkeys(lines))


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields every key a configuration may hold, as "a.b: annotation = default"; <name> stands for a free name."""
    for name, field in model.model_fields.items():
        children = list(_models_in(field.annotation))
        path = f"{prefix}{name}"
        if not children or _holds_plain_value(field.annotation):
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            yield f"{path}: {_type_name(field.annotation)} = {default}"
        for child, tag, is_map in children:
            yield from field_paths(child, f"{path}{'.<name>' if is_map else ''}{f'[{tag}]' if tag else ''}.")


def _describe(details: ErrorDetails, data: dict[str, Any], model: type[BaseModel]) -> list[str]:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    path = _real_path(details["loc"], data, is_missing=kind == "missing")
    name = ".".join(path)
    if kind == "extra_forbidden":
        return [f"unknown key '{name}'{_suggestion(path, data, model)}"]
    if kind == "union_tag_not_found" or (kind == "missing" and path[-1] == "kind"):
        section = path if kind == "union_tag_not_found" else path[:-1]
        return [_missing_kind(section, data, model)]
    if kind == "missing":
        return [f"missing key '{name}': it has no default; add it"]
    if kind == "value_error":
        prefix = f"{name}: " if name else ""
        return [prefix + line for line in str(context["error"]).splitlines()]
    if kind in ("literal_error", "union_tag_invalid"):
        tag = ".kind" if kind == "union_tag_invalid" else ""
        shown = context.get("tag") if tag else value
        allowed = (context.get("expected") or context.get("expected_tags", "")).replace("'", "")
        return [f"{name}{tag} = {shown!r} is not one of the known values; use {allowed}"]
    if kind == "too_short":
        form = "section" if isinstance(value, dict) else "list"
        return [f"{name} is an empty {form}, but at least {context['min_length']} value is needed; add one"]
    if kind in _TYPE_NAMES:
        return [f"{name} = {value!r} is {_kind_of(value)}, but {_TYPE_NAMES[kind]} is needed; correct the value"]
    message = details["msg"].replace("Input should", "it should", 1)
    return [f"{name} = {value!r} is not allowed: {message[0].lower()}{message[1:]}"]


def _real_path(location: Sequence[int | str], data: Any, *, is_missing: bool) -> list[str]:
    """Drops union tags: parts that are not in the data, except the last part where a key is missing."""
    path: list[str] = []
    for depth, part in enumerate(location):
        if isinstance(data, dict) and part in data:  # noqa: SIM114  # together they are too long to read
            data = data[part]
        elif isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not is_missing or depth < len(location) - 1:
            continue
        path.append(str(part))
    return path


def _suggestion(path: Sequence[str], data: dict[str, Any], model: type[BaseModel]) -> str:
    known = _keys_beside(path, data, model)
    close = difflib.get_close_matches(path[-1], known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known here: {', '.join(sorted(known))}" if known else "; remove it"


def _missing_kind(section: Sequence[str], data: dict[str, Any], model: type[BaseModel]) -> str:
    kinds = [tag for _, tag, _ in _choices_at(section, data, model) if tag]
    lines = " or ".join(f"'kind: {tag}'" for tag in kinds)
    return f"missing key '{'.'.join(section)}.kind': it says which kind of section this is; add {lines or 'it'}"


def _keys_beside(path: Sequence[str], data: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """Returns the keys that the section holding the last part of `path` knows."""
    choices = _choices_at(path[:-1], data, model)
    is_map = bool(choices) and choices[0][2]
    section = None if is_map else _choose(choices, _value_at(path[:-1], data))
    return list(section.model_fields) if section else []


def _choices_at(path: Sequence[str], data: dict[str, Any], model: type[BaseModel]) -> list[_Choice]:
    """Returns what the section at `path` can be; none where there is no section."""
    choices: list[_Choice] = [(model, None, False)]
    for depth, part in enumerate(path):
        section = _choose(choices, _value_at(path[:depth], data))
        if choices and choices[0][2]:  # of a map: `part` is a free name
            choices = [(choice, tag, False) for choice, tag, _ in choices]
        elif section and part in section.model_fields:
            choices = list(_models_in(section.model_fields[part].annotation))
        else:
            choices = []
    return choices


def _value_at(path: Sequence[str], data: Any) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _choose(choices: Sequence[_Choice], data: Any) -> type[BaseModel] | None:
    tag = data.get("kind") if isinstance(data, dict) else None
    first = choices[0][0] if choices else None
    return next((model for model, its_tag, _ in choices if its_tag == tag), first)


def _models_in(annotation: Any) -> Iterator[_Choice]:
    """Yields each section that an annotation can hold."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, _tag(annotation), False
    elif origin is dict:
        for child, tag, _ in _models_in(typing.get_args(annotation)[1]):
            yield child, tag, True
    elif origin in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _models_in(part)


def _holds_plain_value(annotation: Any) -> bool:
    """Whether an annotation with sections in it can also hold a value that is none."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _holds_plain_value(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return any(_holds_plain_value(part) for part in typing.get_args(annotation))
    return annotation is not type(None) and origin is not dict and not any(_models_in(annotation))


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    values = typing.get_args(field.annotation) if field else ()
    return values[0] if len(values) == 1 else None


def _kind_of(value: Any) -> str:
    names = {str: "a text", bool: "a boolean", int: "a whole number", float: "a number", dict: "a section"}
    return "empty" if value is None else names.get(type(value), "a list")


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in typing.get_args(annotation))
    if origin is tuple:
        return f"tuple[{', '.join(_type_name(part) for part in typing.get_args(annotation))}]"
    if annotation in (type(None), ...):
        return "None" if annotation is type(None) else "..."
    return annotation.__name__ if origin is None else str(annotation).replace("typing.", "")
