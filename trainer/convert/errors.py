"""The one error that a conversion raises for what a person can put right."""


class ConversionError(ValueError):
    """An input is not usable, or cannot be expressed; one line, which names the file."""
