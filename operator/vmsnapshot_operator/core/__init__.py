"""What a snapshot is made of: immutable facts and small protocols; no I/O, no clock, no kopf, no libvirt."""
