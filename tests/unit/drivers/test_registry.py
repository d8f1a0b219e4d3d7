from importlib import metadata

import pytest
from pydantic import BaseModel, field_validator

from tests.unit.drivers import toys
from vmsnapshot_operator.drivers import registry
from vmsnapshot_operator.errors import DriverUnavailableError

TOY = "tests.unit.drivers.toys:Toy"


def refused(call, *arguments):
    with pytest.raises(DriverUnavailableError) as caught:
        call(*arguments)
    assert caught.value.retryable is False
    return caught.value


def entry_points(monkeypatch, *entries):
    found = [metadata.EntryPoint(name=n, value=v, group=registry.GROUP) for n, v in entries]
    monkeypatch.setattr(metadata, "entry_points", lambda group: [e for e in found if e.group == group])


def test_our_own_drivers_are_installed_and_load():
    drivers = {d.name: d for d in registry.inspect()}

    assert drivers["libvirt-volume"].problem == ""
    assert drivers["ceph-rbd"].problem == ""
    assert drivers["ceph-rbd"].distribution == "vmsnapshot-operator"


def test_a_driver_that_nobody_installed_is_refused_with_those_that_are(monkeypatch):
    entry_points(monkeypatch, ("one", TOY), ("two", TOY))

    error = refused(registry.find, "ontap")

    assert error.reason == registry.NOT_INSTALLED
    assert error.message == 'no storage driver "ontap" is installed; installed are: one, two'


def test_a_name_that_two_distributions_claim_is_refused(monkeypatch):
    entry_points(monkeypatch, ("one", TOY), ("one", "other:Driver"))

    error = refused(registry.find, "one")

    assert "two drivers are registered" in error.message
    assert TOY in error.message
    assert "other:Driver" in error.message


def test_a_module_path_needs_no_registration():
    assert registry.find(TOY) == TOY
    assert registry.load(TOY) is toys.Toy


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("no.such.module:Driver", "ModuleNotFoundError: No module named 'no'"),
        ("tests.unit.drivers.toys:Missing", "AttributeError"),
        ("tests.unit.drivers.toys:Lacking", "it lacks can_handle, check_revert, clone, cut"),
        ("tests.unit.drivers.toys:Path", "it lacks"),
    ],
)
def test_why_a_driver_does_not_load_is_said(monkeypatch, spec, why):
    entry_points(monkeypatch, ("broken", spec))

    error = refused(registry.load, spec)
    shown = registry.inspect()

    assert error.reason == registry.NOT_LOADABLE
    assert why in error.message
    assert shown[0].problem == error.message


def test_strings_are_coerced_to_the_types_of_the_driver():
    parameters, credentials = registry.validate(toys.Toy, {"held": "/x", "limit": "7"}, {"password": "p"})

    assert parameters == toys.Parameters(held="/x", limit=7)
    assert credentials == toys.Credentials.model_validate({"password": "p"})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, 'parameter "held": Field required'),
        ({"held": "/x", "limit": "many"}, 'parameter "limit": Input should be a valid integer'),
        ({"held": "/x", "limt": "7"}, 'parameter "limt": Extra inputs are not permitted'),
    ],
)
def test_wrong_parameters_are_named(parameters, message):
    error = refused(registry.validate, toys.Toy, parameters, {})

    assert error.reason == registry.INVALID_PARAMETERS
    assert message in error.message


class Talkative(BaseModel):
    password: str
    port: int

    @field_validator("password")
    @classmethod
    def _strong(cls, value):
        raise ValueError(f"{value} is too weak")


class TalkativeDriver(toys.Toy):
    Credentials = Talkative


def test_wrong_credentials_are_named_without_their_values():
    error = refused(registry.validate, TalkativeDriver, {"held": "/x"}, {"password": "hunter2", "port": "s3cr3t"})

    assert error.reason == registry.INVALID_CREDENTIALS
    assert 'credential "password": Value error, [redacted] is too weak' in error.message
    assert 'credential "port": Input should be a valid integer' in error.message
    for secret in ("hunter2", "s3cr3t"):
        seen = error
        while seen is not None:
            assert secret not in repr(seen) + str(seen)
            seen = seen.__cause__ or seen.__context__


def test_a_driver_whose_constructor_fails_is_refused_without_its_secret():
    error = refused(registry.make, "tests.unit.drivers.toys:RaisesAtStart", {"held": "/x"}, {"password": "hunter2"})

    assert "RuntimeError: no luck with [redacted]" in error.message
