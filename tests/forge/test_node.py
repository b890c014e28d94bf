"""What the decorator makes of a function, and what it refuses."""

import msgspec
import pytest

from engine import ConfigError
from forge import Draws, equals, has, missing, node
from tests.forge.nodes_for_tests import Half, Number, Shift, call, draw_number, halve


class Optional(msgspec.Struct):
    number: int
    style: str = "plain"


def test_fields_become_conditions():
    bound = halve.bind("half")
    assert bound.name == "half" and bound.version == 1
    assert bound.preconditions == {"number": has("number"), "half": missing("half")}
    assert bound.effects == {"half": has("half")}
    assert (bound.reads, bound.writes) == ({"number": int}, {"half": int})


def test_field_with_a_default_is_not_required():
    @node()
    def kind(value: Optional) -> Half:
        return Half(len(value.style))

    assert kind.preconditions == {"number": has("number")}
    assert call(kind, {"number": 1}) == {"half": 5}
    assert call(kind, {"number": 1, "style": "x"}) == {"half": 1}


def test_async_and_plain_functions_are_called_alike():
    assert call(draw_number, {}, Draws(5)) == {"number": Draws(5).integer(0, 99)}
    assert call(halve, {"number": 6}, by=2) == {"half": 4}


def test_unknown_parameter_names_the_nearest():
    with pytest.raises(ConfigError, match=r'node "shifted" has no "bye" \(did you mean "by"\?\)'):
        halve.bind("shifted", {"bye": 1})
    with pytest.raises(ConfigError, match=r"Expected `int`, got `str`"):
        halve.bind("shifted", {"by": "one"})
    with pytest.raises(ConfigError, match="takes Shift, not Number"):
        halve.bind("shifted", Number(1))


def test_parameters_decide_the_hash():
    assert halve.bind("a", {"by": 0}).parameters_hash == halve.bind("b").parameters_hash
    assert halve.bind("a", Shift(by=1)).parameters_hash != halve.bind("a").parameters_hash


def test_written_fields_must_have_their_types():
    @node()
    def wrong_type() -> Number:
        return Number("7")  # type: ignore[arg-type]

    @node()
    def wrong_struct() -> Number:
        return Half(7)  # type: ignore[return-value]

    with pytest.raises(msgspec.ValidationError, match=r"Expected `int`, got `str`"):
        call(wrong_type, {})
    with pytest.raises(msgspec.ValidationError, match="returned Half, not Number"):
        call(wrong_struct, {})


def test_signatures_that_cannot_be_used_are_refused():
    with pytest.raises(ConfigError, match='"f" takes one, two; put the fields it reads into one struct'):

        @node()
        def f(one: Number, two: Number) -> Half:
            return Half(0)

    with pytest.raises(ConfigError, match='the argument "number" must be annotated'):

        @node()
        def g(number: int) -> Half:
            return Half(0)

    with pytest.raises(ConfigError, match="what it returns must be annotated"):

        @node()
        def h(value: Number):
            return Half(0)


def test_promise_about_a_field_not_written_is_refused():
    with pytest.raises(ConfigError, match=r'promises equals\("hal", 1\) but writes no "hal" \(did you mean "half"\?\)'):

        @node(postconditions=[equals("hal", 1)])
        def f(value: Number) -> Half:
            return Half(1)

    with pytest.raises(ConfigError, match="exclude each other"):

        @node(postconditions=[missing("half")])
        def g(value: Number) -> Half:
            return Half(1)
