"""Read a configuration that is a Python file without running it.

The file is parsed and its assignments are followed: constants, names, `dict(...)`, lists, attributes
of imported names, and plain arithmetic. Whatever would need the file to run (calls, conditions,
loops, other files) is kept as an `Unknown` that says why, so that who asks for it can name it.
"""

import ast
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deadpan.errors import DeadpanError

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_LARGEST_EXPONENT = 64
"""`10**9**9` is short to write and does not end."""


@dataclass(frozen=True)
class Dotted:
    """Something imported, such as `torch.optim.AdamW`; it is named, never looked up."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Unknown:
    """What could not be read without running the file.

    Attributes:
        text: How it is written there.
        reason: Why it cannot be read.
    """

    text: str
    reason: str

    def __str__(self) -> str:
        return self.text


@dataclass
class Node:
    """A value and the line it is written on.

    Attributes:
        value: A plain value, `Dotted`, `Unknown`, or a dict or list of nodes. Tuples are lists.
        line: Counted from 1. A name leads to the line of its assignment.
    """

    value: Any
    line: int

    def plain(self) -> Any:
        """The value without lines; what was imported or is unknown stays as it is."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclass
class StaticConfig:
    """The top-level names of a configuration.

    Attributes:
        where: The file, for messages.
        names: Every assigned name.
        used: The names that other assignments refer to.
    """

    where: str
    names: dict[str, Node]
    used: set[str]

    def find(self, path: str) -> Node | None:
        """The node at a dotted path, such as `model.llm_lora.r`; the nearest unknown one above it.

        List items are numbers: `custom_hooks.0.type`.
        """
        first, *rest = path.split(".")
        node = self.names.get(first)
        for part in rest:
            if node is None or isinstance(node.value, Unknown):
                return node
            if isinstance(node.value, list) and part.isdecimal():
                node = node.value[int(part)] if int(part) < len(node.value) else None
            else:
                node = node.value.get(part) if isinstance(node.value, dict) else None
        return node

    def leaves(self, path: str) -> Iterator[tuple[str, Node]]:
        """Every value at or below a path that is not itself a dict or a list with something in it."""
        node = self.find(path)
        if node is None:
            return
        if isinstance(node.value, dict) and node.value:
            for key in node.value:
                yield from self.leaves(f"{path}.{key}")
        elif isinstance(node.value, list) and any(
            isinstance(item.value, dict | list) for item in node.value
        ):
            for number in range(len(node.value)):
                yield from self.leaves(f"{path}.{number}")
        else:
            yield path, node


def read_file(path: Path) -> StaticConfig:
    """Read a Python file's assignments.

    Raises:
        DeadpanError: If it cannot be read, is not Python, or takes its values from another file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DeadpanError("The config is not UTF-8 text.", where=path) from None
    except OSError as error:
        raise DeadpanError(f"The config cannot be read: {error.strerror}.", where=path) from None
    return read_text(text, str(path))


def read_text(text: str, where: str) -> StaticConfig:
    """Read the assignments of Python source; see `read_file`."""
    try:
        tree = ast.parse(text)
        return _Reader(where).read(tree)
    except SyntaxError as error:
        raise DeadpanError(
            "The config is not valid Python.",
            where=f"{where}, line {error.lineno}",
            found=error.msg,
        ) from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise DeadpanError(
            "The config cannot be parsed.", where=where, found=str(error) or "too deep nesting"
        ) from None


class _Reader:
    """Follows the statements of a module in order."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._imported: dict[str, Dotted] = {}
        self._names: dict[str, Node] = {}
        self._used: set[str] = set()

    def read(self, tree: ast.Module) -> StaticConfig:
        for statement in tree.body:
            self._statement(statement)
        return StaticConfig(self._where, self._names, self._used)

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Import() | ast.ImportFrom():
                self._import(statement)
            case ast.With(items=[ast.withitem(ast.Call(func))]) if _is_read_base(func):
                for inner in statement.body:
                    self._statement(inner)
            case ast.Assign(targets=targets, value=value):
                node = self._node(value)
                for target in targets:
                    self._assign(target, node)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._node(value))
            case ast.AugAssign(target=ast.Name(name), op=op, value=value):
                before = self._look_up(name, statement)
                self._bind(name, self._arithmetic(statement, op, before, self._node(value)))
            case ast.Delete(targets=targets):
                for target in targets:
                    self._delete(target)
            case ast.Expr(value=ast.Constant()) | ast.Pass() | ast.Assert():
                pass
            case _:
                self._forget_what_changes(statement)

    def _import(self, statement: ast.Import | ast.ImportFrom) -> None:
        origin = ""
        if isinstance(statement, ast.ImportFrom):
            origin = "." * statement.level + (f"{statement.module}." if statement.module else "")
        for alias in statement.names:
            if alias.name == "*":
                raise self._inherits(ast.unparse(statement), statement.lineno)
            name = alias.asname or alias.name.partition(".")[0]
            full = alias.name if origin or alias.asname else name
            self._names.pop(name, None)
            self._imported[name] = Dotted(origin + full)

    def _inherits(self, how: str, line: int) -> DeadpanError:
        return DeadpanError(
            "The config takes its values from another file, and deadpan reads one.",
            where=f"{self._where}, line {line}",
            found=how,
            fix="give the whole config: mmengine writes it beside the logs of a run, as "
            "work_dirs/NAME/TIME/vis_data/config.py",
        )

    def _assign(self, target: ast.expr, node: Node) -> None:
        match target:
            case ast.Name("_base_"):
                raise self._inherits("_base_", target.lineno)
            case ast.Name(name):
                self._bind(name, node)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                items = node.value if isinstance(node.value, list) else []
                for number, inner in enumerate(targets):
                    fits = len(items) == len(targets) and not isinstance(inner, ast.Starred)
                    unknown = Unknown(ast.unparse(target), "a list is taken apart")
                    self._assign(inner, items[number] if fits else Node(unknown, target.lineno))
            case ast.Subscript(value=container, slice=key):
                inside, index = self._node(container), self._node(key).value
                fits = isinstance(inside.value, dict) and isinstance(index, str)
                if fits or _has_place(inside.value, index):
                    inside.value[index] = node
                else:
                    self._forget_what_changes(target)
            case _:
                self._forget_what_changes(target)

    def _delete(self, target: ast.expr) -> None:
        match target:
            case ast.Name(name):
                self._names.pop(name, None)
            case ast.Subscript(value=container, slice=key):
                inside, index = self._node(container).value, self._node(key).value
                if isinstance(inside, dict) and isinstance(index, str):
                    inside.pop(index, None)
                else:
                    self._forget_what_changes(target)
            case _:
                self._forget_what_changes(target)

    def _bind(self, name: str, node: Node) -> None:
        self._imported.pop(name, None)
        self._names[name] = node

    def _forget_what_changes(self, statement: ast.AST) -> None:
        """Everything that a statement may assign or change is unknown from here on."""
        for part in ast.walk(statement):
            if isinstance(part, ast.ImportFrom) and any(a.name == "*" for a in part.names):
                raise self._inherits(ast.unparse(part), part.lineno)
            self._forget(part, statement)

    def _forget(self, part: ast.AST, whole: ast.AST, in_place_only: bool = False) -> None:
        kind = _KINDS.get(type(whole), "a statement")
        for name, in_place in _changed_by(part):
            unknown = Unknown(name, f"it is set or changed by {kind}, which is not run")
            if in_place and name in self._names:
                if isinstance(self._names[name].value, dict | list):
                    self._names[name].value = unknown  # others may hold the same dict
            elif not in_place and not in_place_only:
                self._bind(name, Node(unknown, getattr(whole, "lineno", 1)))

    def _look_up(self, name: str, place: ast.expr | ast.stmt) -> Node:
        if name in self._names:
            self._used.add(name)
            return self._names[name]
        if name in self._imported:
            return Node(self._imported[name], place.lineno)
        return Node(Unknown(name, f"the name {name!r} is not defined before it"), place.lineno)

    def _node(self, expression: ast.expr) -> Node:
        line = expression.lineno
        match expression:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return Node(value, line)
            case ast.Name(name):
                return self._look_up(name, expression)
            case ast.List(elts=items) | ast.Tuple(elts=items) if not _has_star(items):
                return Node([self._node(item) for item in items], line)
            case ast.Dict(keys=keys, values=values):
                return self._dict(expression, list(zip(keys, values, strict=True)))
            case ast.Call(func=ast.Name("dict"), args=args, keywords=keywords) if (
                "dict" not in self._names
            ):
                pairs: list[tuple[ast.expr | None, ast.expr]] = [(None, arg) for arg in args]
                pairs += [(ast.Constant(k.arg) if k.arg else None, k.value) for k in keywords]
                return self._dict(expression, pairs)
            case ast.Attribute(value=inner, attr=attribute):
                base = self._node(inner).value
                if isinstance(base, Dotted):
                    return Node(Dotted(f"{base}.{attribute}"), line)
                return self._unknown(expression, "it is an attribute of a value", base)
            case ast.Subscript(value=inner, slice=key):
                return self._item(expression, self._node(inner), self._node(key))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
                value = self._node(inner).value
                if type(value) in (int, float):
                    return Node(-value if isinstance(sign, ast.USub) else value, line)
                return self._unknown(expression, "it is not a number", value)
            case ast.BinOp(left=left, op=op, right=right):
                return self._arithmetic(expression, op, self._node(left), self._node(right))
            case ast.JoinedStr(values=parts):
                return self._formatted(expression, parts)
        for part in ast.walk(expression):
            if isinstance(part, ast.Name):
                self._used.add(part.id)
            self._forget(part, expression, in_place_only=True)
        return self._unknown(
            expression, f"{_KINDS.get(type(expression), 'an expression')} is not run"
        )

    def _unknown(self, place: ast.AST, reason: str, *causes: Any) -> Node:
        """Unknown, for the reason that one of its parts is unknown, or else for its own."""
        first = next((cause for cause in causes if isinstance(cause, Unknown)), None)
        if imported := next((c for c in causes if isinstance(c, Dotted)), None):
            reason = f"{imported} stands in another file"
        text = ast.unparse(place)
        return Node(Unknown(text, first.reason if first else reason), getattr(place, "lineno", 1))

    def _dict(self, place: ast.expr, pairs: list[tuple[ast.expr | None, ast.expr]]) -> Node:
        items: dict[str, Node] = {}
        for key, expression in pairs:
            value = self._node(expression)
            if key is None:  # ** or a positional argument: another dict
                if not isinstance(value.value, dict):
                    return self._unknown(place, "it takes in what is no dict", value.value)
                items |= value.value
                continue
            name = key.value if isinstance(key, ast.Constant) else self._node(key).value
            if not isinstance(name, str):
                return self._unknown(place, "one of its keys is no text", name)
            items[name] = value
        return Node(items, place.lineno)

    def _item(self, place: ast.expr, inner: Node, key: Node) -> Node:
        base, index = inner.value, key.value
        if isinstance(base, Dotted) and isinstance(index, str | int):
            return Node(Dotted(f"{base}[{index!r}]"), place.lineno)
        if isinstance(base, dict) and isinstance(index, str) and index in base:
            return base[index]
        if _has_place(base, index):
            return base[index]
        return self._unknown(place, "there is no such item", base, index)

    def _arithmetic(self, place: ast.AST, op: ast.operator, left: Node, right: Node) -> Node:
        a, b = left.value, right.value
        line = getattr(place, "lineno", 1)
        numbers = type(a) in (int, float) and type(b) in (int, float)
        joined = isinstance(op, ast.Add) and type(a) is type(b) and type(a) in (str, list)
        small = not isinstance(op, ast.Pow) or (numbers and abs(b) <= _LARGEST_EXPONENT)
        if type(op) in _OPERATORS and (numbers or joined) and small:
            try:
                result = _OPERATORS[type(op)](a, b)
            except ArithmeticError as error:
                return self._unknown(place, str(error))
            if not isinstance(result, complex):
                return Node(result, line)
        return self._unknown(place, "it is not plain arithmetic", a, b)

    def _formatted(self, place: ast.expr, parts: list[ast.expr]) -> Node:
        text = ""
        for part in parts:
            value: Any = part
            if isinstance(part, ast.FormattedValue):
                value = self._node(part.value).value
                if part.format_spec or part.conversion != -1 or type(value) not in (str, int):
                    return self._unknown(place, "a formatted text is not run", value)
            elif isinstance(part, ast.Constant):
                value = part.value
            text += str(value)
        return Node(text, place.lineno)


_KINDS: dict[type[ast.AST], str] = {
    ast.If: "an `if`",
    ast.For: "a loop",
    ast.While: "a loop",
    ast.Try: "a `try`",
    ast.With: "a `with`",
    ast.FunctionDef: "a function",
    ast.ClassDef: "a class",
    ast.Expr: "a call",
    ast.Call: "a call",
    ast.Lambda: "a function",
    ast.IfExp: "a condition",
    ast.Compare: "a comparison",
    ast.BoolOp: "a condition",
    ast.ListComp: "a loop",
    ast.DictComp: "a loop",
}


_HARMLESS = {"dict", "float", "int", "len", "list", "max", "min", "print", "round", "str", "sum"}
"""Calls that leave what they are given as it was."""


def _is_read_base(function: ast.expr) -> bool:
    return ast.unparse(function).rpartition(".")[2] == "read_base"


def _has_place(value: Any, index: Any) -> bool:
    """Whether a value is a list and an index lies in it."""
    return isinstance(value, list) and type(index) is int and -len(value) <= index < len(value)


def _has_star(items: list[ast.expr]) -> bool:
    return any(isinstance(item, ast.Starred) for item in items)


def _changed_by(part: ast.AST) -> list[tuple[str, bool]]:
    """The names that a part of a statement binds, or may change in place."""
    match part:
        case ast.Name(name, ctx=ast.Store()):
            return [(name, False)]
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [(name, False)]
        case ast.alias(name=name, asname=other):
            return [(other or name.partition(".")[0], False)]
        case ast.Call(func=ast.Name(name)) if name in _HARMLESS:
            return []
        case ast.Call(func=function, args=args, keywords=keywords):
            owners = [function.value] if isinstance(function, ast.Attribute) else []
            inner = [*owners, *args, *(keyword.value for keyword in keywords)]
            return [(root, True) for expression in inner if (root := _root(expression))]
        case ast.Subscript(ctx=ast.Store() | ast.Del()) | ast.Attribute(ctx=ast.Store()):
            return [(root, True)] if (root := _root(part)) else []
    return []


def _root(expression: ast.AST) -> str | None:
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None
