"""What goes wrong for reasons a user can act on."""


class ConversionError(Exception):
    """Ends a conversion with one line and exit status 1."""
