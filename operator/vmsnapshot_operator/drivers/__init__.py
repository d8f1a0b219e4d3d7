"""Storage drivers: how they are found, the processes that host them, and one module per driver. They know no domain."""
