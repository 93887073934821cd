import textwrap
from pathlib import Path

import pytest

from deadpan.config.static_python import Dotted, StaticConfig, Unknown, read_file, read_text
from deadpan.errors import DeadpanError


def read(text: str) -> StaticConfig:
    return read_text(textwrap.dedent(text), "config.py")


def value(text: str, path: str = "x") -> object:
    node = read(text).find(path)
    return None if node is None else node.plain()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1e-5", 1e-5),
        ("x = -3", -3),
        ("x: int = 3", 3),
        ("a = './data/'\nx = a + 'b.json'", "./data/b.json"),
        ("a = 3\nx = f'{a}-b'", "3-b"),
        ("a = 0.25\nx = a * 8 + 1 - 2 ** 3 // 3 % 2 / 1", 3.0),
        ("a = [1]\nx = a + [2]", [1, 2]),
        ("x = (0.9, None, True)", [0.9, None, True]),
        ("a = dict(b=1, c=2)\nx = dict(a, c=3, **{'d': 4})", {"b": 1, "c": 3, "d": 4}),
        ("a = {'b': [5, 6]}\nx = a['b'][-1]", 6),
        ("x = 1\nx += 2", 3),
        ("x, y = 1, 2", 1),
        ("x = dict(a=1)\nx['a'] = 2", {"a": 2}),
        ("x = [1, 2]\nx[0] = 5", [5, 2]),
        ("a = dict(b=1)\nx = dict(a=a)\na['b'] = 2", {"a": {"b": 2}}),
        ("from torch.optim import AdamW\nx = AdamW", Dotted("torch.optim.AdamW")),
        ("import torch.optim as o\nx = o.AdamW", Dotted("torch.optim.AdamW")),
        ("import torch.optim\nx = torch.optim.AdamW", Dotted("torch.optim.AdamW")),
        ("from . import base\nx = base.lr", Dotted(".base.lr")),
        ("with read_base():\n    from .base import lr\nx = lr", Dotted(".base.lr")),
        ("from y import T\nx = T['a']", Dotted("y.T['a']")),
        ("x = 1\nprint(x)", 1),
        ("from y import x\nx = 4", 4),
        ("x = dict(a=1, b=2)\ndel x['a']", {"b": 2}),
    ],
)
def test_what_is_written_is_read(text: str, expected: object) -> None:
    assert value(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import os\nx = os.environ['LR']", None),
        ("import os\nx = float(os.environ['LR'])", "a call is not run"),
        ("x = y", "the name 'y' is not defined before it"),
        ("from .base import lr\nx = lr * 2", ".base.lr stands in another file"),
        ("if True:\n    x = 1", "it is set or changed by an `if`, which is not run"),
        ("x = 1\nfor i in [2]:\n    x = i", "it is set or changed by a loop, which is not run"),
        ("x = dict(a=1)\nx.update(a=2)", "it is set or changed by a call, which is not run"),
        ("x = [1]\ny = x.pop()", "it is set or changed by a call, which is not run"),
        ("x = [1]\ndel x[0]", "it is set or changed by a statement, which is not run"),
        ("def x(): pass", "it is set or changed by a function, which is not run"),
        ("x = 1 if y else 2", "a condition is not run"),
        ("x = [i for i in range(3)]", "a loop is not run"),
        ("x = 9 ** 9 ** 9", "it is not plain arithmetic"),
        ("x = 'a' * 10 ** 10", "it is not plain arithmetic"),
        ("x = 1 / 0", "division by zero"),
        ("x = 'a' + 1", "it is not plain arithmetic"),
        ("x = f'{3.5:.2f}'", "a formatted text is not run"),
        ("x = dict(**y)", "the name 'y' is not defined before it"),
        ("x = {1: 2}", "one of its keys is no text"),
        ("x = [1][3]", "there is no such item"),
        ("dict = 3\nx = dict(a=1)", "a call is not run"),
        ("x = 1\ndel x\ny = x\nx = y", "the name 'x' is not defined before it"),
    ],
)
def test_what_would_have_to_run_is_unknown_with_its_reason(text: str, reason: str | None) -> None:
    found = value(text)
    if reason is None:
        assert found == Dotted("os.environ['LR']")
    else:
        assert isinstance(found, Unknown)
        assert found.reason == reason


def test_a_call_that_may_change_a_dict_is_not_overlooked_through_another_name() -> None:
    found = value("a = dict(b=1)\nx = dict(a=a)\na.update(b=2)", "x.a")
    assert isinstance(found, Unknown)


def test_nothing_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    read(f"import os\nx = os.system('touch {trap}')\nopen({str(trap)!r}, 'w')")
    assert not trap.exists()


def test_lines_lead_to_where_a_value_is_written() -> None:
    config = read("lr = 1\n\nx = dict(\n    a=lr,\n    b=2)\n")
    nodes = [config.find(path) for path in ("x.a", "x.b", "x.c")]
    assert [node and node.line for node in nodes] == [1, 5, None]
    assert config.used == {"lr"}


def test_leaves_are_values_and_lists_of_values() -> None:
    config = read("x = dict(a=[1, 2], b=[dict(c=3)], d={})")
    found = [(path, node.plain()) for path, node in config.leaves("x")]
    assert found == [("x.a", [1, 2]), ("x.b.0.c", 3), ("x.d", {})]


@pytest.mark.parametrize(
    "text",
    [
        "_base_ = './base.py'",
        "from .base import *",
        "with read_base():\n    from .base import *",
        "if 1:\n    from .base import *",
    ],
)
def test_a_config_that_inherits_is_refused(text: str) -> None:
    with pytest.raises(DeadpanError, match="takes its values from another file") as raised:
        read(text)
    assert raised.value.where is not None
    assert raised.value.where.startswith("config.py, line ")


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(DeadpanError, match="not valid Python") as raised:
        read("x = 1\ny = (")
    assert raised.value.where == "config.py, line 2"
    with pytest.raises(DeadpanError, match="cannot be parsed"):
        read("x = " + "-" * 100_000 + "1")
    with pytest.raises(DeadpanError, match="No such file"):
        read_file(tmp_path / "none.py")
    (tmp_path / "latin.py").write_bytes("x = 'é'".encode("latin-1"))
    with pytest.raises(DeadpanError, match="not UTF-8"):
        read_file(tmp_path / "latin.py")
