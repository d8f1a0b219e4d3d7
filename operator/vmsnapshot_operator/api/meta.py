"""Names on the API that are promised to users and to our own later versions."""

GROUP = "vmsnapshot.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

FINALIZER = f"{GROUP}/cleanup"
"""Ours alone: kopf's own finalizer has another name and is never put on anything."""

FIELD_MANAGER = "vmsnapshot-operator"
