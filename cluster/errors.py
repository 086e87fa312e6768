"""What the driver tells a person when a run cannot start or cannot go on."""


class LaunchError(Exception):
    """One clear line: what was asked, what there is, what to do."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; carries the exit code that says so.

    A KeyboardInterrupt, because that alone gets through: `except Exception` in a library would
    swallow another, and Ray's compiled calls know only this one.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.exit_code = 128 + signal_number
