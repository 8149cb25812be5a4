import pytest

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import QuantScheme


def test_a_scheme_survives_its_json_form() -> None:
    scheme = QuantScheme(bits=8, overrides={"*.down_proj": QuantScheme(bits=4, group_size=64)})
    assert QuantScheme.from_dict(scheme.to_dict()) == scheme


def test_unknown_keys_and_versions_are_refused() -> None:
    with pytest.raises(BadInputError, match="unknown keys"):
        QuantScheme.from_dict({**QuantScheme().to_dict(), "act_order": True})
    with pytest.raises(BadInputError, match="version 2"):
        QuantScheme.from_dict({**QuantScheme().to_dict(), "version": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits is 5; choose one of 2, 3, 4, 8"),
        ({"group_size": 48}, "group size is 48"),
        ({"group_size": 512}, "group size is 512"),
        ({"algorithm": "magic"}, "method 'magic' is unknown; choose one of awq.gptq, awq,"),
    ],
)
def test_values_outside_the_choices_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        QuantScheme(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": "4"}, "bits is '4'; it must be of type int"),
        ({"bits": 4.0}, "bits is 4.0; it must be of type int"),
        ({"symmetric": "no"}, "symmetric is 'no'; it must be of type bool"),
        ({"overrides": []}, "overrides is \\[\\]; it must be of type dict"),
        ({"overrides": {"*": 8}}, "quantization scheme is 8; it must be an object"),
    ],
)
def test_values_of_another_type_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        QuantScheme.from_dict({**QuantScheme().to_dict(), **change})
