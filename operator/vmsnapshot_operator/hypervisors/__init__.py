"""Libvirt: connections, domains, the guest's agent, the journal in a domain's metadata. Nothing here knows of storage drivers."""
