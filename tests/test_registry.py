import pytest
from hypothesis import given
from hypothesis import strategies as st

from hesper.errors import HesperError, JobError, UsageError
from hesper.registry import Registry, did_you_mean, suggest


def test_exit_codes_follow_the_contract() -> None:
    assert (UsageError.exit_code, JobError.exit_code) == (2, 1)
    assert issubclass(UsageError, HesperError) and issubclass(JobError, HesperError)


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.data())
def test_a_known_name_is_its_own_nearest(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    assert suggest(name, names)[0].lower() == name.lower()


def test_nothing_alike_lists_what_there_is() -> None:
    assert suggest("zzz", ["kl", "ce"]) == ()
    assert did_you_mean("zzz", ["kl", "ce"]) == "known are ce, kl"
    assert did_you_mean("zzz", []) == "none are known"
    assert did_you_mean("zzz", [f"a{number}" for number in range(20)]).endswith(", ...")


def test_strings_are_imported_at_first_use_and_objects_given_as_they_are() -> None:
    registry: Registry[object] = Registry("tool")
    registry.add("lazy", "colorsys:hsv_to_rgb")
    registry.add("eager", len)
    import colorsys

    assert registry["lazy"] is colorsys.hsv_to_rgb
    assert registry["lazy"] is colorsys.hsv_to_rgb
    assert registry["eager"] is len
    assert list(registry) == ["eager", "lazy"] and "lazy" in registry and "late" not in registry


def test_a_taken_name_is_refused() -> None:
    registry: Registry[object] = Registry("tool")
    registry.add("one", len)
    with pytest.raises(HesperError, match="Two tool entries are called 'one'"):
        registry.add("one", max)
    assert registry["one"] is len


def test_an_unknown_name_offers_the_nearest() -> None:
    registry: Registry[object] = Registry("criterion")
    registry.add("heart", len)
    with pytest.raises(UsageError, match="The criterion 'haert' is unknown; did you mean 'heart'"):
        registry["haert"]


def test_a_missing_package_is_named() -> None:
    registry: Registry[object] = Registry("exporter")
    registry.add("far", "no_such_package_here.sub:thing")
    with pytest.raises(UsageError, match="The exporter 'far' needs the package 'no_such_package_here'"):
        registry["far"]
