import pytest

from quantflow.upstream.replaced import exclusively, replaced


class Base:
    name = "base"


class Inherits(Base):
    pass


@pytest.mark.parametrize("owner", [Base, Inherits])
def test_the_old_value_comes_back_also_after_an_error(owner):
    before = dict(vars(owner))
    seen = []
    with pytest.raises(ZeroDivisionError), exclusively(), replaced(owner, "name", "new"):
        seen.append(owner.name) or 1 / 0
    assert seen == ["new"]
    assert dict(vars(owner)) == before


def test_replacements_nest():
    with exclusively(), replaced(Base, "name", "outer"):
        with replaced(Base, "name", "inner"):
            assert Base.name == "inner"
        assert Base.name == "outer"
    assert Base.name == "base"


def test_a_missing_name_is_an_error():
    with exclusively(), pytest.raises(AttributeError), replaced(Base, "missing", 1):
        pass
