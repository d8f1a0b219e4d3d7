"""The journal in a domain's metadata: read, write, clear, find. Blocking, on a given virConnect; raise libvirtError.

Not what it says (`core.journal`) nor when it is written (`strategies`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import libvirt

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.errors import ForeignJournalError, NotPermittedError

_ELEMENT = libvirt.VIR_DOMAIN_METADATA_ELEMENT
_LIVE, _CONFIG = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG
_NONE_THERE = frozenset({libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_SUPPORT})


def read(domain: Any) -> Journal | None:
    """Return the journal of a domain: that of the running one, else that of its definition. Raises UnreadableJournalError."""
    for place in _places(domain):
        text = _text(domain, place)
        if text is not None:
            return journals.from_xml(text)
    return None


def write(domain: Any, journal: Journal, permit: Callable[[], str]) -> None:
    """Write a journal and read it back. Raises ForeignJournalError if another one is there, then or at once after.

    `permit` is asked right before: why it may not be written any more, or nothing. Raises NotPermittedError: a process that was
    stopped since it looked would write over the journal of the one who took over.
    """
    try:
        there = read(domain)
    except UnreadableJournalError as error:
        raise ForeignJournalError(f"domain {domain.name()}: {error}") from error
    if there is not None and there.nonce != journal.nonce:
        raise ForeignJournalError(
            f"domain {domain.name()} is held by installation {there.installation}, object {there.owner_uid}"
        )
    places = _places(domain)
    if why := permit():
        raise NotPermittedError(f"the journal of domain {domain.name()} was not written: {why}")
    domain.setMetadata(_ELEMENT, journals.to_xml(journal), journals.PREFIX, journals.NAMESPACE, sum(places))
    for place in places:
        text = _text(domain, place)
        written = _or_none(text) if text is not None else None
        if written is None or written.nonce != journal.nonce:
            raise ForeignJournalError(
                f"domain {domain.name()}: somebody else wrote or removed a journal at the same moment"
            )


def update(domain: Any, journal: Journal, *, held: bool = False) -> bool:
    """Have the journal with this nonce say something else now, wherever it stands; False if it stands nowhere any more.

    Several may free a VM at once, and what was written down since then (what the bases were like, which commits began) must not
    be lost by the slowest of them: what stands there is added to. `held`: only where it still says that the VM is held.
    """
    found = False
    for place in _places(domain):
        text = _text(domain, place)
        there = _or_none(text) if text is not None else None
        if there is not None and there.nonce == journal.nonce:
            found = True
            if there.holds or not held:
                text = journals.to_xml(journals.merged(journal, there))
                domain.setMetadata(_ELEMENT, text, journals.PREFIX, journals.NAMESPACE, place)
    return found


def another(domain: Any, nonce: str) -> Journal | None:
    """Return the journal that a running domain bears if it can be read and is another than this one.

    Never raises: who cannot see whose it is frees the VM, which harms a snapshot at most.
    """
    try:
        text = _text(domain, _LIVE)
    except libvirt.libvirtError:
        return None
    there = _or_none(text) if text is not None else None
    return there if there is not None and there.nonce != nonce else None


def clear(domain: Any, nonce: str) -> None:
    """Remove the journal with this nonce, and no other, wherever it stands."""
    _clear(domain, nonce, lambda _: True)


def clear_left(domain: Any, nonce: str) -> None:
    """Remove the journal with this nonce from the definition of a domain that does not run here, if it says that the VM is held."""
    if not domain.isActive():
        _clear(domain, nonce, lambda journal: journal.holds)


def _clear(domain: Any, nonce: str, is_meant: Callable[[Journal], bool]) -> None:
    for place in _places(domain):
        text = _text(domain, place)
        there = _or_none(text) if text is not None else None
        if there is not None and there.nonce == nonce and is_meant(there):
            domain.setMetadata(_ELEMENT, None, None, journals.NAMESPACE, place)


def sweep(connection: Any) -> Iterator[tuple[Any, Journal | None, str]]:
    """Yield all domains that bear a journal, running or not: the domain, the journal, or why it cannot be read.

    One domain that cannot be asked hides none of the others; a connection that broke raises libvirtError.
    """
    for domain in connection.listAllDomains():
        try:
            journal = _read_again(domain)
        except UnreadableJournalError as error:
            yield domain, None, str(error)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                continue  # it went away meanwhile
            if not connection.isAlive():
                raise
            yield domain, None, f"whether the domain bears a journal cannot be seen: {error}"
        else:
            if journal is not None:
                yield domain, journal, ""


def _read_again(domain: Any) -> Journal | None:
    """Read a journal, once more if the domain started or stopped while it was read."""
    try:
        return read(domain)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
            raise
    return read(domain)


def _places(domain: Any) -> tuple[int, ...]:
    live = (_LIVE,) if domain.isActive() else ()
    return (*live, _CONFIG) if domain.isPersistent() else live


def _text(domain: Any, place: int) -> str | None:
    try:
        return str(domain.metadata(_ELEMENT, journals.NAMESPACE, place))
    except libvirt.libvirtError as error:
        if error.get_error_code() in _NONE_THERE:
            return None
        raise


def _or_none(text: str) -> Journal | None:
    try:
        return journals.from_xml(text)
    except UnreadableJournalError:
        return None
