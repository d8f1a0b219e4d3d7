"""Fault injection on real parts: faults at every named step, and a judge who looks at the world and not at our status."""
