"""The one error a corpus build raises for what a user can put right."""


class CorpusError(ValueError):
    """An input, an argument or a corpus directory is not usable; the message says what to do."""
