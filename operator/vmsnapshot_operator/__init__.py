"""One consistent snapshot of a virtual machine whose disks lie on several storage systems."""
