"""What tests of what was left behind share: journals that they put into a guest, and what the cluster's objects and events say."""

from __future__ import annotations

import json
import secrets
from typing import Any

import libvirt

from tests.lab.guests import Guest
from tests.stack import Stack
from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal

NOBODY = "0b6f7d1e-0000-4000-8000-00000000dead"
"""The UID of a VMSnapshot that never was."""


def mark(guest: Guest, element: str | None) -> None:
    """Put a journal into the guest's metadata as it stands here, or remove it."""
    flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
    kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    prefix = journals.PREFIX if element is not None else None
    guest.domain().setMetadata(kind, element, prefix, journals.NAMESPACE, flags)


def marked(guest: Guest) -> bool:
    """Whether the guest bears a journal."""
    try:
        guest.domain().metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, journals.NAMESPACE, 0)
    except libvirt.libvirtError:
        return False
    return True


def a_journal(installation: str, **changes: Any) -> Journal:
    facts = {"owner_uid": NOBODY, "nonce": secrets.token_hex(16), "attempt": 1, "method": "GuestAgent", "budget": 600.0}
    return Journal(installation=installation, **(facts | changes))


def get(stack: Stack, resource: str, name: str) -> dict[str, Any] | None:
    text = stack.lab.kubectl("get", resource, name, "-o", "json", "--ignore-not-found")
    return json.loads(text) if text.strip() else None


def events(stack: Stack, reason: str) -> list[str]:
    """What the events of one reason say."""
    found = json.loads(stack.lab.kubectl("get", "events.events.k8s.io", "-A", "-o", "json"))["items"]
    return [e["note"] for e in found if e["reason"] == reason]
