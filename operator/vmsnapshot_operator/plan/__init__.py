"""What should happen: pure decisions, without I/O and without a clock of their own."""
