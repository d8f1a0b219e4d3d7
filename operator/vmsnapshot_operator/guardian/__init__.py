"""The small program that frees a VM when nobody else does: libvirt, the journal's format and the standard library."""
