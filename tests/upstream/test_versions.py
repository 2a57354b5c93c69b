from importlib.metadata import version

import pytest

from quantflow.upstream import versions


def test_supported_are_the_versions_whose_functions_are_replaced():
    checked = [version(name).split("+")[0] == versions.CHECKED[name] for name in ("torch", "executorch")]
    assert versions.supported() == all(checked)


def test_nothing_stands_against_the_checked_versions(monkeypatch):
    monkeypatch.delenv(versions.SWITCH, raising=False)
    monkeypatch.setattr(versions, "supported", lambda: True)
    assert versions.obstacle() is None


def test_other_versions_are_named(monkeypatch):
    monkeypatch.delenv(versions.SWITCH, raising=False)
    monkeypatch.setattr(versions, "supported", lambda: False)
    monkeypatch.setattr(versions, "version", lambda name: "9.9.9+cpu")
    assert "installed are torch 9.9.9, executorch 9.9.9; checked were torch 2." in versions.obstacle()


@pytest.mark.parametrize(("value", "off"), [("0", True), ("1", False), ("", False)])
def test_the_switch(value, off, monkeypatch):
    monkeypatch.setattr(versions, "supported", lambda: True)
    monkeypatch.setenv(versions.SWITCH, value)
    assert (versions.obstacle() is not None) == off
