"""The keys of a recipe in words, as its reference and its error messages show them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from deadpan.config.schema import Recipe


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str
    """Dotted, such as `optimizer.lr`."""
    expected: str
    """Its type and bounds in words, such as `number > 0`."""
    description: str
    required: bool
    default: Any
    """None where the key is required or is a section."""
    is_section: bool


@cache
def keys() -> dict[str, Key]:
    """Every key of a recipe by its dotted name, sections included, in the order of the schema."""
    schema = Recipe.model_json_schema()
    return {key.name: key for key in _walk(schema, schema["$defs"], "")}


def _walk(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, field in schema["properties"].items():
        section = definitions[field["$ref"].rpartition("/")[2]] if "$ref" in field else None
        yield Key(
            name=prefix + name,
            expected=f"mapping of {', '.join(section['properties'])}"
            if section
            else _in_words(field),
            description=(section or field)["description"],
            required=name in schema.get("required", []),
            default=None if section else field.get("default"),
            is_section=section is not None,
        )
        if section:
            yield from _walk(section, definitions, f"{prefix}{name}.")


def _in_words(field: dict[str, Any]) -> str:
    """Put a JSON schema into a few words."""
    if "anyOf" in field:
        return " or ".join(_in_words(choice) for choice in field["anyOf"])
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        *others, last = map(str, field["enum"])
        return f"{', '.join(others)} or {last}"
    if "examples" in field:
        return "one like " + ", ".join(field["examples"])
    if field["type"] == "array":
        if "prefixItems" in field:
            return f"[{', '.join(_in_words(item) for item in field['prefixItems'])}]"
        least = f"at least {field['minItems']} " if "minItems" in field else ""
        return f"list of {least}{_in_words(field['items'])}"
    if field["type"] == "boolean":
        return "true or false"
    word = field["format"] if field.get("format") == "path" else field["type"]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]}" for name, sign in signs.items() if name in field]
    if field.get("minLength"):
        bounds.append("that is not empty")
    return " ".join([word, " and ".join(bounds)]).strip()
