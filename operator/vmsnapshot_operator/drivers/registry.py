"""Which storage drivers are installed, and how one is made from a class's parameters. Not where it runs (`host`, `worker`).

A driver is a class that follows `core.driver.StorageDriver`, registered under the entry point group
`vmsnapshot_operator.drivers`. Wherever a driver is named, `module:Class` is accepted too.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from vmsnapshot_operator.core.driver import StorageDriver
from vmsnapshot_operator.drivers.redaction import printable, redactor
from vmsnapshot_operator.errors import DriverUnavailableError

GROUP = "vmsnapshot_operator.drivers"

NOT_INSTALLED = "DriverNotInstalled"
NOT_LOADABLE = "DriverNotLoadable"
INVALID_PARAMETERS = "InvalidParameters"
INVALID_CREDENTIALS = "InvalidCredentials"


class DriverType(Protocol):
    """A driver's class, as the registry uses it."""

    Parameters: type[BaseModel]
    Credentials: type[BaseModel]

    def __call__(self, parameters: Any, credentials: Any) -> StorageDriver:
        """Make a driver. Quick: the storage system is first spoken to by its methods."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledDriver:
    """One registered driver. `problem` is empty, or says why it does not load (filled by `inspect` alone)."""

    name: str
    spec: str
    distribution: str
    problem: str = ""


def installed() -> tuple[InstalledDriver, ...]:
    """Return the registered drivers by name, without importing any."""
    found = (
        InstalledDriver(name=e.name, spec=e.value, distribution=e.dist.name if e.dist else "unknown")
        for e in metadata.entry_points(group=GROUP)
    )
    return tuple(sorted(set(found), key=lambda d: (d.name, d.spec)))


def inspect() -> tuple[InstalledDriver, ...]:
    """Return the registered drivers, each with why it does not load. Imports them: for a person's question, not for serving."""
    return tuple(
        InstalledDriver(name=d.name, spec=d.spec, distribution=d.distribution, problem=_problem(d)) for d in installed()
    )


def _problem(driver: InstalledDriver) -> str:
    try:
        load(find(driver.name))
    except DriverUnavailableError as error:
        return error.message
    return ""


def find(driver: str) -> str:
    """Return `module:Class` of a driver. Raises DriverUnavailableError (DriverNotInstalled) if none, or two, have the name."""
    if ":" in driver:
        return driver
    drivers = installed()
    specs = sorted({d.spec for d in drivers if d.name == driver})
    if len(specs) == 1:
        return specs[0]
    if specs:
        who = " and ".join(f"{d.spec} (of {d.distribution})" for d in drivers if d.name == driver)
        text = f'two drivers are registered as "{driver}": {who}; uninstall one'
    else:
        names = ", ".join(sorted({d.name for d in drivers})) or "none"
        text = f'no storage driver "{driver}" is installed; installed are: {names}'
    raise DriverUnavailableError(text, reason=NOT_INSTALLED, retryable=False)


def load(spec: str) -> DriverType:
    """Import the class `module:Class`. Raises DriverUnavailableError (DriverNotLoadable) with the reason."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing foreign code may raise anything; the text goes to the user
        text = f"the driver {spec} does not load: {type(error).__name__}: {printable(str(error))}"
        raise DriverUnavailableError(text, reason=NOT_LOADABLE, retryable=False) from error
    missing = [m for m in _CONTRACT if not callable(getattr(found, m, None))]
    missing += [m for m in ("Parameters", "Credentials") if not _is_model(getattr(found, m, None))]
    if missing:
        text = f"the driver {spec} does not follow the contract: it lacks {', '.join(missing)}"
        raise DriverUnavailableError(text, reason=NOT_LOADABLE, retryable=False)
    driver: DriverType = found
    return driver


_CONTRACT = sorted(m for m in vars(StorageDriver) if not m.startswith("_"))


def _is_model(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def validate(
    driver: DriverType, parameters: Mapping[str, str], credentials: Mapping[str, str]
) -> tuple[BaseModel, BaseModel]:
    """Return the driver's own models of its parameters and credentials, the strings coerced to the fields' types.

    Raises DriverUnavailableError (InvalidParameters, InvalidCredentials) that names each wrong field and never has the
    value of a credential in it. An unknown field is an error: a misspelt limit must not be silently no limit.
    """
    hide = redactor(credentials)
    return (
        _model(driver.Parameters, parameters, "parameter", INVALID_PARAMETERS, hide),
        _model(driver.Credentials, credentials, "credential", INVALID_CREDENTIALS, hide),
    )


def _model(model: type[BaseModel], given: Mapping[str, str], what: str, reason: str, hide: Any) -> BaseModel:
    try:
        return model.model_validate(dict(given), extra="forbid")
    except ValidationError as error:
        told = error.errors(include_input=False, include_url=False, include_context=False)
    lines = (
        f'{what} "{".".join(map(str, e["loc"]))}": {e["msg"]}' if e["loc"] else f"{what}s: {e['msg']}" for e in told
    )
    # Raised outside of the handler: pydantic's error, with the values in it, must not travel along as the cause.
    raise DriverUnavailableError(printable(hide("; ".join(lines))), reason=reason, retryable=False)


def make(spec: str, parameters: Mapping[str, str], credentials: Mapping[str, str]) -> StorageDriver:
    """Load, validate, construct. Raises DriverUnavailableError with one of this module's reasons."""
    driver = load(spec)
    checked = validate(driver, parameters, credentials)
    try:
        return driver(*checked)
    except Exception as error:  # noqa: BLE001 - a driver may raise anything; the text goes to the user
        text = printable(redactor(credentials)(f"the driver {spec} does not start: {type(error).__name__}: {error}"))
        raise DriverUnavailableError(text, reason=NOT_LOADABLE, retryable=False) from None
