"""Measurements on the laboratory; nothing here is asserted, everything is written down."""
