"""The journal kept in a domain's metadata while we hold a VM still: enough to free it without the API server.

Its format is the contract between the operator and the guardian, therefore this module needs the standard library only.
Written before anything is frozen, removed after the guest is free. Not: who reads or writes it in libvirt.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

NAMESPACE = "https://vmsnapshot.io/journal/1"
"""XML namespace (and key) of the metadata element."""

PREFIX = "vmsnapshot"
VERSION = 1
_MAX_BUDGET = 600
_NONCE = re.compile(r"^[0-9a-f]{32}$")


class Phase(StrEnum):
    """How far an operation has come that goes on after the VM was freed."""

    HOLDING = "Holding"  # the VM may be held still: a guardian frees it
    OVERLAID = "Overlaid"  # it goes on, and writes to overlays; the bases stand still
    COLLAPSING = "Collapsing"  # the overlays are being committed: the bases change


class UnreadableJournalError(ValueError):
    """A journal is there and cannot be understood: whoever wrote it may hold the VM, so nothing may start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Who holds a VM still, how, and for how long at most (`budget`, seconds from the moment a guardian first sees it).

    `overlays`: the path of the overlay of each volume (by its id) that has one or is about to get one; `bases`: what betrays a
    change of the base since the switch; `begun`: volumes whose commit may have begun, so that their bases change by it; `pivoted`:
    those whose overlay was seen to be committed and left; `run_id`: libvirt's id of the run of the VM that was switched.
    """

    installation: str
    owner_uid: str
    nonce: str
    attempt: int
    method: str
    budget: float
    members: tuple[str, ...] = ()
    overlays: Mapping[str, str] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    begun: tuple[str, ...] = ()
    pivoted: tuple[str, ...] = ()
    run_id: int = -1
    phase: Phase = Phase.HOLDING
    version: int = VERSION

    @property
    def holds(self) -> bool:
        """Whether the VM itself may be held, which is what a guardian is for."""
        return self.phase is Phase.HOLDING


def merged(journal: Journal, there: Journal) -> Journal:
    """Return what `journal` says, and all that `there`, which is the same one as another wrote it, says beyond it.

    Several may bring a VM back at once: none forgets what the others did, and no phase goes back.
    """
    phases = list(Phase)
    return replace(
        journal,
        phase=max(journal.phase, there.phase, key=phases.index),
        bases={**there.bases, **journal.bases},
        begun=tuple(dict.fromkeys((*there.begun, *journal.begun))),
        pivoted=tuple(dict.fromkeys((*there.pivoted, *journal.pivoted))),
    )


def to_xml(journal: Journal) -> str:
    """Return the metadata element that says this journal."""
    element = ET.Element(
        "journal",
        {
            "version": str(journal.version),
            "installation": journal.installation,
            "owner": journal.owner_uid,
            "nonce": journal.nonce,
            "attempt": str(journal.attempt),
            "method": journal.method,
            "budget": f"{journal.budget:.3f}",
        },
    )
    body: dict[str, object] = {"members": list(journal.members), "overlays": dict(journal.overlays)}
    if journal.overlays:
        # A program that does not know the phases takes the VM for held, and thaws what is not frozen: that does no harm.
        element.set("phase", journal.phase)
        body |= {"bases": dict(journal.bases), "begun": list(journal.begun), "pivoted": list(journal.pivoted)}
        body["run"] = journal.run_id
    element.text = json.dumps(body, sort_keys=True)
    return ET.tostring(element, encoding="unicode")


def from_xml(text: str) -> Journal:
    """Read a metadata element written by `to_xml`, with or without namespace; raises UnreadableJournalError."""
    try:
        element = ET.fromstring(text)  # noqa: S314 - expat as libvirt hands it out: no entities are resolved from outside
        version = _known_version(element)
        body = json.loads(element.text or "{}")
        journal = Journal(
            version=version,
            installation=element.attrib["installation"],
            owner_uid=element.attrib["owner"],
            nonce=element.attrib["nonce"],
            attempt=int(element.attrib["attempt"]),
            method=element.attrib["method"],
            budget=float(element.attrib["budget"]),
            members=tuple(str(m) for m in body.get("members", ())),
            overlays={str(k): str(v) for k, v in body.get("overlays", {}).items()},
            bases={str(k): str(v) for k, v in body.get("bases", {}).items()},
            begun=tuple(str(v) for v in body.get("begun", ())),
            pivoted=tuple(str(v) for v in body.get("pivoted", ())),
            run_id=int(body.get("run", -1)),
            phase=Phase(element.attrib.get("phase", Phase.HOLDING)),
        )
    except UnreadableJournalError:
        raise
    except (ET.ParseError, KeyError, ValueError, TypeError, AttributeError) as error:
        msg = f"the journal in the domain's metadata cannot be read: {error}"
        raise UnreadableJournalError(msg) from error
    if not 0 < journal.budget <= _MAX_BUDGET or not _NONCE.match(journal.nonce):
        msg = "the journal in the domain's metadata has an impossible budget or nonce"
        raise UnreadableJournalError(msg)
    return journal


def _known_version(element: ET.Element) -> int:
    """Return the version if it is ours; asked before the rest, which another version may say in other words."""
    version = int(element.attrib["version"])
    if version != VERSION:
        msg = f"the journal in the domain's metadata has version {version}, this program knows {VERSION}"
        raise UnreadableJournalError(msg)
    return version
