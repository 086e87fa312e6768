"""What the driver tells a person when a run cannot start or cannot go on."""


class LaunchError(Exception):
    """One clear line: what was asked, what there is, what to do."""


class Interrupted(Exception):
    """A signal asked the run to end; carries the exit code that says so."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.exit_code = 128 + signal_number
