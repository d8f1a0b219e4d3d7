"""Names of the API that never change: group, version, finalizer, labels. Not what stands in the objects."""

from __future__ import annotations

GROUP = "vmsnapshot.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

FINALIZER = f"{GROUP}/cleanup"
"""On a VMSnapshot from before anything is held for it until the storage has confirmed that nothing is."""

FIELD_MANAGER = "vmsnapshot-operator"
"""Under this name we apply; what stands in status is owned by it."""

CATEGORY = "vmsnap-all"
"""`kubectl get vmsnap-all` lists all kinds of the group.

kubectl takes a category before the name of a kind: one that is called as a kind would turn `kubectl get KIND NAME` into a
search for NAME in every kind.
"""

LABEL_INSTALLATION = f"{GROUP}/installation"
"""On a VMSnapshotContent: which installation of the operator wrote it."""

LABEL_SNAPSHOT_NAMESPACE = f"{GROUP}/snapshot-namespace"
"""On a VMSnapshotContent: the namespace of its VMSnapshot, to select by. The binding itself is `spec.vmSnapshotRef`."""

LABEL_SNAPSHOT_UID = f"{GROUP}/snapshot-uid"
"""On a VMSnapshotContent: the UID of its VMSnapshot, to select by."""

LABEL_SAFETY_OF = f"{GROUP}/safety-of"
"""On a VMSnapshot that a VMRestore takes of the VM before it touches it: the restore's name, as much of it as a label takes."""


def label_of(name: str) -> str:
    """Return as much of an object's name as the value of a label takes."""
    return name[:63].rstrip("-_.")


def content_name(uid: str) -> str:
    """Return the name of the VMSnapshotContent of the VMSnapshot with this UID: one per object, found without a search."""
    return f"vmsnapcontent-{uid}"
