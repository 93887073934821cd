"""Read a recipe, a YAML file or a bundled one, with overrides from the command line.

A recipe holds only what differs from the defaults, and names no other recipe to start from. Its
relative paths (`data.train`, `data.images`, `run`, and `model` where it is a folder) start at the
current directory, not at the recipe's own: a path means the same in a file and on the command line.
"""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.resources import files
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from deadpan.config.keys import keys
from deadpan.config.schema import CONTRADICTION, Recipe
from deadpan.errors import DeadpanError, did_you_mean

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)|[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_RESOLVERS = {
    None: [(_TAG + name, re.compile(rf"(?:{text})\Z")) for name, text in _SCALARS.items()]
}
_PLAIN_TYPES = [*_SCALARS, "str", "seq", "map"]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain types, where PyYAML has YAML 1.1's: 1e-4 is a number, and `no` is a word."""

    yaml_implicit_resolvers = _RESOLVERS
    yaml_constructors: ClassVar = {
        tag: build
        for tag, build in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _PLAIN_TYPES
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            # PyYAML lets the last of two equal keys win, and the first is silently lost.
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """The counterpart of the loader: quotes the strings that it would read as numbers."""

    yaml_implicit_resolvers = _RESOLVERS


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence(_TAG + "seq", items, flow_style=True)
)


@dataclass(frozen=True)
class _Mistake:
    key: str
    problem: str
    where: str
    expected: str | None = None
    found: str | None = None
    fix: str = "`deadpan recipe show internvl2-2b-lora` prints every key with a value that fits"

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.key} {self.problem}: {self.fix}"
        found = "" if self.found is None else f", found {self.found}"
        return f"{self.key} {self.problem}: expected {self.expected}{found}"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        source: A YAML file, or the name of a bundled recipe; a file of that name wins.
        overrides: `key=value` each, the key dotted and the value YAML: `optimizer.lr=1e-4`. Each
            replaces whatever the file says at its key, and a later one wins.

    Raises:
        DeadpanError: If the file is missing or is not YAML, or if keys or values are wrong; all
            the wrong ones are in one message.
    """
    where, text = _read(source)
    return parse_recipe(text, where, overrides)


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe's text; see `load_recipe`.

    Args:
        text: The YAML.
        where: What to call it in messages.
        overrides: As for `load_recipe`.
    """
    values = _parse(text, where)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise DeadpanError(
            "The recipe is not a mapping.",
            where=where,
            expected="lines like `epochs: 8`",
            found=inline_yaml(values),
        )
    overridden = _override(values, overrides)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        mistakes = _mistakes(error, values, where, overridden)
    raise _as_one_error(mistakes, where)


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every key, in the schema's order; `load_recipe` reads it back."""
    return _dump(recipe.model_dump(mode="json"), flow=False)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides say, by dotted key: `["optimizer.lr=1e-4"]` gives `{"optimizer.lr": 0.0001}`.

    Raises:
        DeadpanError: If one has no key, or its value is not YAML.
    """
    values: dict[str, Any] = {}
    _override(values, overrides)
    return dict(_flat(values, ""))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def yaml_line(value: object) -> str:
    """Write a value as YAML on one line."""
    return _dump(value, flow=True).removesuffix("\n").removesuffix("\n...")


def inline_yaml(value: object) -> str:
    """Write a value as YAML on one line, cut after 100 characters."""
    text = yaml_line(value)
    return text if len(text) <= 100 else text[:99] + "…"


def bundled() -> dict[str, str]:
    """The bundled recipes: names with one-line descriptions, in alphabetical order."""
    return {name: bundled_text(name).partition("\n")[0].lstrip("# ") for name in _bundled_names()}


def bundled_text(name: str) -> str:
    """The text of a bundled recipe.

    Raises:
        DeadpanError: If there is none of that name.
    """
    if name not in _bundled_names():
        raise DeadpanError(
            "There is no such bundled recipe.", where=name, fix=did_you_mean(name, _bundled_names())
        )
    return files("deadpan.config").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")


def _bundled_names() -> list[str]:
    folder = files("deadpan.config").joinpath("recipes")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    if not path.is_file():
        if str(source) in _bundled_names():
            return f"bundled recipe {source}", bundled_text(str(source))
        raise DeadpanError(
            "There is no such recipe.",
            where=source,
            expected="a YAML file or the name of a bundled recipe",
            found="a folder" if path.is_dir() else None,
            fix=f"the recipe of this run is {path / 'recipe.yaml'}"
            if (path / "recipe.yaml").is_file()
            else did_you_mean(path.name.removesuffix(".yaml"), _bundled_names()),
        )
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DeadpanError(
            "The recipe is not UTF-8 text.",
            where=path,
            found=f"the byte 0x{error.object[error.start]:02x} at position {error.start}",
            fix="save it as UTF-8",
        ) from None
    except OSError as error:
        raise DeadpanError(f"The recipe cannot be read: {error.strerror}.", where=path) from None


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        column = error.position - (before.rfind("\n") + 1) + 1
        place = f", line {before.count(chr(10)) + 1}, column {column}"
        problem = f"the character U+{error.character:04X}, which YAML does not allow"
    except (ValueError, KeyError, RecursionError) as error:
        # PyYAML lets these through: `!!int x`, an integer of 5000 digits, 1000 open brackets.
        place, problem = "", f"a value that cannot be read: {error}"
    raise DeadpanError(
        "The recipe is not valid YAML.",
        where=where + place,
        found=problem,
        fix="indent with spaces: YAML takes no tabs"
        if problem and "'\\t'" in problem
        else "check indentation and brackets; quote text that holds `: ` or ` #`",
    )


def _override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Write overrides into the values; return each one as it was given, by its key."""
    given = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (key and equals):
            raise DeadpanError(
                "An override has no key or no `=`.",
                where=f"override {override}",
                expected="KEY=VALUE, such as optimizer.lr=1e-4",
                found=override,
                fix="write it without spaces around the `=`, or quote the whole",
            )
        *parents, name = key.split(".")
        section = values
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[name] = _parse(text, f"override {override}")
        given[key] = override
    return given


def _mistakes(
    error: ValidationError, values: Mapping[str, Any], where: str, overridden: Mapping[str, str]
) -> list[_Mistake]:
    mistakes: dict[str, _Mistake] = {}
    for detail in error.errors(include_url=False):
        key = ".".join(map(str, detail["loc"]))
        if detail["type"] in ("extra_forbidden", "invalid_key"):
            origin = _origin(key, where, overridden)
            mistakes[key] = _Mistake(key, "is unknown", origin, fix=_nearest(key))
        elif detail["type"] == "missing" and key in keys():
            for name in _required(key):
                expected = keys()[name].expected
                mistakes[name] = _Mistake(name, "is missing", where, expected, fix=f"add {name}")
        else:
            # A union reports each of its branches and a list each item: their key stands for all.
            key = _known_part(detail["loc"])
            expected = keys()[key].expected
            if detail["type"] == CONTRADICTION:
                key, expected = detail["ctx"].get("key", key), detail["ctx"]["expected"]
            mistakes[key] = _Mistake(
                key,
                "has a wrong value",
                _origin(key, where, overridden),
                expected,
                inline_yaml(reduce(getitem, key.split("."), values)),
            )
    return list(mistakes.values())


def _as_one_error(mistakes: list[_Mistake], where: str) -> DeadpanError:
    if len(mistakes) > 1:
        return DeadpanError(
            f"The recipe has {len(mistakes)} mistakes.",
            where=where,
            found="".join(
                f"\n    {mistake}" + ("" if mistake.where == where else f" ({mistake.where})")
                for mistake in mistakes
            ),
            fix=_Mistake.fix,
        )
    (only,) = mistakes
    return DeadpanError(
        f"The recipe's key {only.key!r} {only.problem}.",
        where=only.where,
        expected=only.expected,
        found=only.found,
        fix=only.fix,
    )


def _origin(key: str, where: str, overridden: Mapping[str, str]) -> str:
    for name, override in overridden.items():
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
            return f"override {override}"
    return where


def _known_part(location: Sequence[str | int]) -> str:
    key = str(location[0])
    for part in location[1:]:
        if f"{key}.{part}" not in keys():
            break
        key = f"{key}.{part}"
    return key


def _required(key: str) -> list[str]:
    """The keys to write where one is missing: those that a section needs, or the key itself."""
    inside = [name for name in keys() if name.startswith(f"{key}.") and keys()[name].required]
    return inside or [key]


def _nearest(key: str) -> str:
    """The advice for an unknown key: the section it belongs in, or the names of its own section."""
    if key in keys():
        return f"write it as {key.replace('.', ': {')}: ...}}; dotted keys are for overrides"
    section, _, leaf = key.rpartition(".")
    split = [name.rpartition(".") for name in keys()]
    if elsewhere := [repr(".".join([there, leaf])) for there, _, last in split if last == leaf]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return did_you_mean(leaf, [name for there, _, name in split if there == section])


def _dump(value: object, flow: bool) -> str:
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow,
        width=float("inf"),
    )
