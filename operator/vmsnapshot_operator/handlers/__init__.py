"""The running operator: kopf's wiring, the keyed work queue, and what keeps live connections for the objects it serves."""
