"""What goes wrong in the laboratory."""


class LabError(Exception):
    """A part of the laboratory is missing or does not do what it should; the text says which and what to do."""
