"""Configurations as tables: what goes in comes out, and mistakes are named."""

from dataclasses import dataclass, field

import pytest

from stylewright.training.loops.tables import differences, from_table, to_table


@dataclass(frozen=True)
class Inner:
    size: int = 1
    names: str | tuple[str, ...] = "all"


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    share: float | None = None
    on: bool = False
    words: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


def test_what_goes_in_comes_out():
    outer = Outer(rate=2.0, words=("a", "b"), inner=Inner(3, ("x", "y")))
    table = to_table(outer)
    assert table == {"rate": 2.0, "on": False, "words": ["a", "b"], "inner": {"size": 3, "names": ["x", "y"]}}
    assert from_table(Outer, table) == outer
    assert from_table(Outer, {}) == Outer()


def test_a_whole_number_is_a_float_where_one_is_wanted():
    made = from_table(Outer, {"rate": 1, "share": 2})
    assert (made.rate, made.share) == (1.0, 2.0)
    assert type(made.rate) is type(made.share) is float


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"rat": 1.0}, ["Unknown option rat", "did you mean rate?"]),
        ({"inner": {"siez": 1}}, ["Unknown option inner.siez", "did you mean inner.size?"]),
        ({"zzz": 1}, ["Unknown option zzz", "inner, on, rate, share, words"]),
        ({"rate": "fast"}, ["'fast' for rate", "float"]),
        ({"inner": {"size": 1.5}}, ["1.5 for inner.size", "int"]),
        ({"inner": {"size": True}}, ["True for inner.size", "int"]),
        ({"inner": 3}, ["3 for inner", "Inner"]),
        ({"share": "half"}, ["'half' for share", "float"]),
        ({"words": "a"}, ["'a' for words", "tuple"]),
        ({"words": ["a", 1]}, ["1 for words", "str"]),
    ],
)
def test_a_bad_entry_is_named(table, words):
    with pytest.raises(ValueError) as error:
        from_table(Outer, table)
    assert all(word in str(error.value) for word in words), error.value


def test_differences_have_dotted_names_and_both_values():
    old = {"a": 1, "b": {"c": [1], "d": 2}}
    new = {"a": 1, "b": {"c": [1, 2]}, "e": 3}
    assert differences(old, new) == {"b.c": ([1], [1, 2]), "b.d": (2, None), "e": (None, 3)}
    assert differences(old, old) == {}
