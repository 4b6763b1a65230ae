import pytest

from minitron.config.expression import Condition
from minitron.errors import ConfigError

NAMES = ("hidden", "ffn", "layers")
VALUES = {"hidden": 512, "ffn": 1536, "layers": 26}


def holds(text: str) -> bool:
    return Condition(text, names=NAMES, key="search.filter").holds(VALUES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ffn == 3 * hidden", True),
        ("ffn / hidden < 3", False),
        ("hidden % 64 == 0 and layers % 4 == 0", False),
        ("hidden % 64 == 0 or layers % 4 == 0", True),
        ("not layers > 20", False),
        ("20 <= layers < 26", False),
        ("20 <= layers <= 26", True),
        ("-layers + 30 == 4", True),
        ("hidden - 2 * layers != 460", False),
        ("(hidden // 100) * 100 >= 5e2", True),
        ("1 + 2 * 3 == 7 and (1 + 2) * 3 == 9", True),
        (" \n layers == 26 ", True),
    ],
)
def test_conditions(text: str, expected: bool) -> None:
    assert holds(text) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden", "search.filter='hidden' is no condition; compare something"),
        ("layers > 2 and hidden", "is no condition"),
        ("hiden > 2", "names hiden; it may name hidden, ffn, layers"),
        ("hidden >", r"cannot be read \(invalid syntax\)"),
        ("__import__('os').system('true') == 0", "only numbers, names"),
        ("hidden.real > 0", "has 'hidden.real'; only numbers, names"),
        ("hidden[0] > 0", "only numbers, names"),
        ("[1][0] > 0", "only numbers, names"),
        ("(lambda: 1)() > 0", "only numbers, names"),
        ("9 ** 9 ** 9 > 0", "only numbers, names"),
        ("'a' < 'b'", "only numbers, names"),
        ("True == 1", "only numbers, names"),
        ("1j == 1", "only numbers, names"),
        ("hidden in (1, 2)", "only numbers, names"),
        ("(x := 3) > 2", "only numbers, names"),
        ("layers = 3", "cannot be read"),
        ("", "cannot be read"),
        ("(" * 300 + "1" + ")" * 99, "cannot be read"),
        ("1 < " * 200 + "2", "is 801 characters long; use at most 400"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Condition(text, names=NAMES, key="search.filter")


def test_longest_chain_of_operators_is_evaluated() -> None:
    assert holds("-" * 390 + "1 == 1")


def test_division_by_zero_is_the_users() -> None:
    with pytest.raises(ConfigError, match=r"search.filter='1 / \(layers - 26\) > 0' divides by zero"):
        holds("1 / (layers - 26) > 0")


def test_names() -> None:
    assert Condition("hidden > 2 * layers", names=NAMES, key="k").names == {"hidden", "layers"}
