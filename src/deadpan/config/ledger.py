"""Keep account of a foreign configuration while it is turned into a recipe.

Nothing may get lost on the way: every value of the configuration is carried over, or reported with
the reason why not, or known to need nothing; and what the recipe needs but cannot be had for certain
stops the whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deadpan.config.loader import yaml_line
from deadpan.config.static_python import Dotted, StaticConfig, Unknown
from deadpan.errors import DeadpanError

_MISSING: Any = object()


@dataclass(frozen=True)
class Setting:
    """One key of the recipe and where its value comes from."""

    key: str
    value: Any
    source: str

    def __str__(self) -> str:
        return f"{self.key}: {yaml_line(self.value)} ({self.source})"


@dataclass(frozen=True)
class Leftover:
    """Something of the config that the recipe does not say, or that deadpan does otherwise."""

    path: str
    line: int | None
    value: str
    reason: str

    def __str__(self) -> str:
        place = f" (line {self.line})" if self.line else ""
        return f"{self.path}{place}: {self.value}: {self.reason}"


@dataclass
class Translation:
    """A config as a recipe.

    Attributes:
        config: The config's name.
        settings: What differs from deadpan's defaults, in the schema's order.
        same: What is as in deadpan's defaults.
        leftovers: What has no equivalent, or another meaning.
        needless: What deadpan does by itself.
    """

    config: str
    settings: list[Setting]
    same: list[Setting]
    leftovers: list[Leftover]
    needless: list[str]

    def report(self) -> list[str]:
        """What happened to every setting of the config, in lines."""
        lines = ["Not carried over, or done otherwise:"] if self.leftovers else []
        lines += [f"- {leftover}" for leftover in self.leftovers]
        if self.same:
            lines.append("As deadpan's defaults, so not written:")
            lines += [f"- {setting}" for setting in self.same]
        if self.needless:
            lines.append("Nothing to carry over: " + ", ".join(self.needless))
        return lines

    def text(self) -> str:
        """The recipe as YAML, with comments that say where each line came from."""
        lines = [f"# {self.config}, a config of XTuner's, as a recipe.", ""]
        section = ""
        for setting in self.settings:
            above, _, leaf = setting.key.rpartition(".")
            if above and above != section:
                lines.append(f"{above}:")
            section = above
            indent = "  " if above else ""
            lines.append(f"{indent}{leaf}: {yaml_line(setting.value)}  # {setting.source}")
        comment = "\n".join(self.report())
        lines += ["", *(f"# {line}" for line in comment.splitlines())]
        return "\n".join(lines) + "\n"


@dataclass
class Ledger:
    """What has been said, left and doubted of a configuration so far.

    Attributes:
        config: The configuration.
        name: Its name, for messages.
        given: Keys of the recipe from the command line.
        said: The recipe's keys so far.
        unclear: Keys of the recipe without a certain value, and why.
        left: What is not carried over.
        seen: The paths of the configuration that have been dealt with.
    """

    config: StaticConfig
    name: str
    given: dict[str, Any]
    said: dict[str, Setting] = field(default_factory=dict)
    unclear: dict[str, str] = field(default_factory=dict)
    left: list[Leftover] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def stop_if_unclear(self, wanted: Sequence[str], fix: str) -> None:
        """Stop if one of these keys of the recipe has no certain value."""
        unclear = {key: self.unclear[key] for key in wanted if key in self.unclear}
        if unclear:
            raise DeadpanError(
                "The config leaves open what the recipe needs.",
                where=self.config.where,
                found="".join(f"\n    {key}: {reason}" for key, reason in unclear.items()),
                fix=fix,
            )

    def first(self, *paths: str) -> str:
        """The first of several paths that the config has, or else the first."""
        return next((path for path in paths if self.config.find(path)), paths[0])

    def plain(self, path: str, default: Any) -> Any:
        node = self.config.find(path)
        return default if node is None else node.plain()

    def kind(self, path: str) -> str | None:
        """The name of a class, without where it is imported from."""
        value = self.plain(path, None)
        known = isinstance(value, str | Dotted)
        return (
            str(value).rpartition(".")[2] if known else None if value is None else in_words(value)
        )

    def source(self, path: str) -> str:
        node = self.config.find(path)
        return f"{path} is not set" if node is None else f"line {node.line}: {path}"

    def say(self, key: str, value: Any, source: str) -> None:
        self.said[key] = Setting(key, value, source)

    def carry(self, path: str, key: str, kind: type, default: Any = _MISSING) -> None:
        """Take a value over as it stands, or the one that the library has where the config is silent."""
        self.seen.add(path)
        value = self.plain(path, default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if value is _MISSING or not fits:
            self.doubt(key, path)
        else:
            self.say(key, value, self.source(path))

    def doubt(self, key: str, path: str) -> None:
        self.seen.add(path)
        node = self.config.find(path)
        if node is None:
            self.unclear[key] = f"{path} is not set"
            return
        value = node.value
        why = f": {value.reason}" if isinstance(value, Unknown) else ""
        if isinstance(value, Dotted):
            why = ": it stands in another file"
        self.unclear[key] = f"line {node.line}: {path} is {in_words(node.plain())}{why}"

    def leave(self, path: str, reason: str) -> None:
        self.seen.add(path)
        node = self.config.find(path)
        value = "not set" if node is None else in_words(node.plain())
        self.left.append(Leftover(path, node.line if node else None, value, reason))


def within(path: str, above: Any) -> str | None:
    """The one of several paths that a path is, or lies below."""
    return next((top for top in above if path == top or path.startswith(f"{top}.")), None)


def in_words(value: Any) -> str:
    """A value of the config on one short line."""
    if isinstance(value, dict):
        kind = value.get("type")
        return str(kind).rpartition(".")[2] if kind is not None else f"dict of {', '.join(value)}"
    if isinstance(value, list):
        return f"[{', '.join(map(in_words, value))}]"
    return str(value) if isinstance(value, Dotted | Unknown) else repr(value)
