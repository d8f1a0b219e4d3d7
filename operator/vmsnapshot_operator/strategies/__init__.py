"""The workflows: each owns taking and deleting a snapshot as a whole."""
