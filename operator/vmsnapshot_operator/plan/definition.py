"""What happens to a VM's definition when its disks are set back: the gate, its true form again, and the marker that it was done.

Pure: one text of libvirt's in, another out. Not the definition of a new VM (`new_definition`), nor when each is defined.

While its disks are neither old nor new nobody may start a VM. So its disks point to a path that cannot exist and names the
VMRestore; libvirt repeats it to whoever tries. The true disks stand in the gate itself, in the domain's metadata: whoever has
the host can put them back, also when all else is lost.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from datetime import UTC, datetime

from vmsnapshot_operator.core.driver import is_reason
from vmsnapshot_operator.core.markers import (
    GATE_NAMESPACE,
    PREFIX,
    RESTORED_NAMESPACE,
    WENT_BACK_NAMESPACE,
    Gate,
    Marker,
    marker_of,
)
from vmsnapshot_operator.errors import ForeignJournalError, RefusedError
from vmsnapshot_operator.plan import domain_tree as tree
from vmsnapshot_operator.plan.domain_tree import refusal

GATE_FOLDER = "/dev/null/VMRestore"
"""Nothing can be beneath a device, whoever may write where: such a path is missing on every host."""

DONE_KEPT = 16
"""So many restores of a VM are remembered: each of them may be created anew by a tool that applies manifests again."""

_ENDED = "ended"
_OF_THE_SOURCE = ("driver", "source", "auth", "encryption", "backingStore", "mirror", "transient")


def gated(text: str, gate: Gate, *, again_since: datetime | None = None) -> str:
    """Return the definition without the disks `gate.targets`: it can be defined, and not be started.

    `text` is the definition of the inactive domain with its secrets (VIR_DOMAIN_XML_SECURE): libvirt leaves a display's
    password out without a trace otherwise, and defined so the VM would have none. The mark of one that went back stays: its
    VMRestore may not have said so yet. `again_since`: when this restore began, whose gate somebody defined away. Twice equals
    once. Raises RefusedError for a definition that cannot be worked with or does not have these disks, or if this restore is
    done or went back already, or (`again_since`) another one came to its end since; ForeignJournalError if another VMRestore's
    gate is there.
    """
    root = tree.parse(text)
    there = _gate(root)
    if there is not None:
        _same(there[0].marker, gate.marker)
        return text
    if gate.marker in done(text):
        # Decided before it was done, and carried out by one who stood still meanwhile: all would be set back again.
        raise refusal(f"VMRestore {gate.marker.restore} is done already: the gate is not closed again")
    if (back := went_back(text)) is not None and back[0] == gate.marker:
        raise refusal(f"VMRestore {gate.marker.restore} went back already: the gate is not closed again")
    if again_since is not None and (later := later_restore(text, gate.marker.restore_uid, again_since)) is not None:
        raise refusal(f"VMRestore {later.restore} had the VM's disks since: the gate is not closed again")
    if not gate.targets:
        raise refusal("a gate that takes no disk away keeps nobody from starting the VM")
    found = tree.disks(root)
    element = _element("gate", GATE_NAMESPACE, gate.marker)
    element.set("autostart", "yes" if gate.autostart else "no")
    for target in gate.targets:
        if target not in found:
            raise refusal(f"the VM has no disk {target}, but {', '.join(found) or 'none'}")
        disk = found[target]
        if next(disk.iter("cookies"), None) is not None:
            # They are secrets, and everybody who may see a domain sees its metadata.
            raise refusal(f"disk {target} is addressed with cookies: they could not be kept while it is being restored")
        element.append(tree.copy_of(disk))
        tree.replace(tree.devices(root), disk, _missing(disk, gate_path(gate.marker, target)))
    tree.add_own(root, element)
    return tree.text_of(root)


def restored(text: str, marker: Marker, *, genid: str, now: datetime | None = None) -> str:
    """Return the definition with its true disks, a done-marker before the older ones instead of the gate, and a new generation id.

    `text` is the definition as `gated` made it, as it is now, with its secrets; what an administrator changed in it
    meanwhile stays, but for the disks. A guest that has a generation id (as a domain controller, which counts on it) learns
    by `genid` that it went back in time. `now` stands with the marker, for `later_restore`. Twice equals once. Raises
    RefusedError, ForeignJournalError as `gated`.
    """
    root = tree.parse(text)
    there = _gate(root)
    if there is None:
        if marker in done(text):
            return text
        raise refusal("the VM bears no gate: somebody else defined it meanwhile, so nobody can tell what its disks are")
    gate, kept = there
    _same(gate.marker, marker)
    _put_back(root, gate, kept)
    found = root.find("genid")
    if found is not None:
        found.text = genid
    # One that is created anew takes the place of its predecessor.
    before = [m for m in done(text) if not m.same_order(marker)]
    tree.drop_own(root, GATE_NAMESPACE, RESTORED_NAMESPACE)
    add_done(root, marker, now=now)
    # libvirt keeps one element of a namespace; and who knows of one marker alone reads the last.
    tree.own(root, RESTORED_NAMESPACE)[0].extend(ET.Element("before", m.attributes()) for m in before[: DONE_KEPT - 1])
    return tree.text_of(root)


def reopened(text: str, marker: Marker, *, why: str = "", now: datetime | None = None) -> str:
    """Return the definition as it was before `gated`: for a restore that came to nothing, whose disks are as they were.

    With `why`, the reason of its end, a mark says so in place of an earlier one's: else nobody could tell it later from one whose
    gate somebody defined away. For a reason that could not be read again `WentBack` is written. `now` as in `restored`. Raises
    RefusedError, ForeignJournalError as `gated`. A definition without a gate is returned as it is.
    """
    root = tree.parse(text)
    there = _gate(root)
    if there is None:
        return text
    gate, kept = there
    _same(gate.marker, marker)
    _put_back(root, gate, kept)
    tree.drop_own(root, GATE_NAMESPACE)
    if why:
        mark = _element("went-back", WENT_BACK_NAMESPACE, marker, now)
        mark.set("reason", why if is_reason(why) else "WentBack")
        tree.drop_own(root, WENT_BACK_NAMESPACE)
        tree.add_own(root, mark)
    return tree.text_of(root)


def gate_of(text: str) -> Gate | None:
    """Return the gate in a definition, with or without its secrets; raises RefusedError, also for one that cannot be read."""
    found = _gate(tree.parse(text))
    return found[0] if found is not None else None


def done(text: str) -> tuple[Marker, ...]:
    """Return the markers of the restores that were done, the last one first; raises RefusedError, also for one that cannot be read."""
    element = _one(tree.parse(text), RESTORED_NAMESPACE)
    return (_marker(element), *(_marker(e) for e in element.findall("before"))) if element is not None else ()


def went_back(text: str) -> tuple[Marker, str] | None:
    """Return which restore went back, and the reason; raises RefusedError, also for a mark that cannot be read."""
    element = _one(tree.parse(text), WENT_BACK_NAMESPACE)
    if element is None:
        return None
    if not is_reason(reason := element.get("reason", "")):
        raise _unreadable("a restore went back for no reason")
    return _marker(element), reason


def later_restore(text: str, own_uid: str, since: datetime) -> Marker | None:
    """Return the other restore that has the VM's disks now, or had them since then; of several the one that is there, or ended last.

    While a gate is closed nobody else closes one, so such a one began after somebody had defined the gate of `own_uid` away.
    A mark without a time is of a new VM, which was made before anybody could set it back; a time that cannot be read counts as
    later. Raises as `gate_of`, `went_back`.
    """
    root = tree.parse(text)
    found = _gate(root)
    if found is not None and found[0].marker.restore_uid != own_uid:
        return found[0].marker
    for namespace in (RESTORED_NAMESPACE, WENT_BACK_NAMESPACE):
        element = _one(root, namespace)
        if element is not None and _is_since(element.get(_ENDED), since):
            marker = _marker(element)
            if marker.restore_uid != own_uid:
                return marker
    return None


def _is_since(ended: str | None, since: datetime) -> bool:
    if ended is None:
        return False
    try:
        return datetime.fromisoformat(ended).astimezone(UTC) >= since
    except ValueError:
        return True


def true_disks(text: str) -> Mapping[str, str]:
    """Return the disks that a gate keeps, each as libvirt's XML by its target; raises as `gate_of`."""
    found = _gate(tree.parse(text))
    return {t: tree.text_of(e) for t, e in found[1].items()} if found is not None else {}


def gate_path(marker: Marker, target: str) -> str:
    """Return the path that a disk points to meanwhile."""
    return f"{GATE_FOLDER}/{marker.restore}/{target}"


def add_done(root: ET.Element, marker: Marker, *, now: datetime | None = None) -> None:
    """Put the done-marker into a definition that has none."""
    tree.add_own(root, _element("restored", RESTORED_NAMESPACE, marker, now))


def _put_back(root: ET.Element, gate: Gate, kept: Mapping[str, ET.Element]) -> None:
    found = tree.disks(root)
    for target in gate.targets:
        if target not in found:
            raise refusal(
                f"disk {target} was removed from the VM while VMRestore {gate.marker.restore} had it: plug one of that"
                " target in again"
            )
        tree.replace(tree.devices(root), found[target], tree.copy_of(kept[target]))


def _missing(disk: ET.Element, path: str) -> ET.Element:
    """A disk in the same place in the VM, of nothing. Without startupPolicy, which would let the VM start without it."""
    made = ET.Element("disk", {"type": "file", "device": "disk"})
    made.text = disk.text
    ET.SubElement(made, "driver", {"name": "qemu", "type": "raw"})
    ET.SubElement(made, "source", {"file": path})
    for child in disk:
        if child.tag not in _OF_THE_SOURCE:
            made.append(tree.copy_of(child))
    return made


def _element(name: str, namespace: str, marker: Marker, ended: datetime | None = None) -> ET.Element:
    made = ET.Element(f"{PREFIX}:{name}", {f"xmlns:{PREFIX}": namespace, **marker.attributes()})
    if ended is not None:
        made.set(_ENDED, ended.astimezone(UTC).isoformat())
    return made


def _one(root: ET.Element, namespace: str) -> ET.Element | None:
    found = tree.own(root, namespace)
    if len(found) > 1:
        raise _unreadable(f"there are {len(found)} of {namespace}")
    return found[0] if found else None


def _gate(root: ET.Element) -> tuple[Gate, Mapping[str, ET.Element]] | None:
    element = _one(root, GATE_NAMESPACE)
    if element is None:
        return None
    kept: dict[str, ET.Element] = {}
    for disk in element.findall("disk"):
        target = disk.find("target")
        kept[target.get("dev", "") if target is not None else ""] = disk
    autostart = element.get("autostart")
    if "" in kept or not kept or autostart not in ("yes", "no"):
        raise _unreadable("a disk without a target, no disk, or no word on autostart")
    return Gate(marker=_marker(element), targets=tuple(kept), autostart=autostart == "yes"), kept


def _marker(element: ET.Element) -> Marker:
    try:
        return marker_of(element.attrib)
    except ValueError as error:
        raise _unreadable(str(error)) from error


def _unreadable(why: str) -> RefusedError:
    # Whoever wrote it may be at work on the VM, so nothing may be changed.
    return RefusedError(f"a restore's marker in the domain's metadata cannot be read: {why}", reason="MarkerUnreadable")


def _same(there: Marker, wanted: Marker) -> None:
    if there != wanted:
        raise ForeignJournalError(
            f"VMRestore {there.restore} of installation {there.installation} is at work on this VM: its disks are neither"
            " old nor new until that is done"
        )
