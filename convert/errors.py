"""What goes wrong for reasons a user can act on."""


class ConversionError(Exception):
    """Ends a conversion with one line and exit status 1."""


def first_line(error: Exception) -> str:
    """What an exception says, in one line; its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
