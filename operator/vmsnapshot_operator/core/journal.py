"""The journal kept in a domain's metadata while we hold a VM still: enough to free it without the API server.

Its format is the contract between the operator and the guardian, therefore this module needs the standard library only.
Written before anything is frozen, removed after the guest is free. Not: who reads or writes it in libvirt.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field

NAMESPACE = "https://vmsnapshot.io/journal/1"
"""XML namespace (and key) of the metadata element."""

PREFIX = "vmsnapshot"
VERSION = 1
_MAX_BUDGET = 600
_NONCE = re.compile(r"^[0-9a-f]{32}$")


class UnreadableJournalError(ValueError):
    """A journal is there and cannot be understood: whoever wrote it may hold the VM, so nothing may start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Who holds a VM still, how, and for how long at most (`budget`, seconds from the moment a guardian first sees it)."""

    installation: str
    owner_uid: str
    nonce: str
    attempt: int
    method: str
    budget: float
    members: tuple[str, ...] = ()
    overlays: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION


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
    element.text = json.dumps({"members": list(journal.members), "overlays": dict(journal.overlays)}, sort_keys=True)
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
