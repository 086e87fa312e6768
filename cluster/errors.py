"""What the driver tells a person when a run cannot start or cannot go on."""


class LaunchError(Exception):
    """One clear line: what was asked, what there is, what to do."""


class NoRoom(LaunchError):
    """The cluster has too few free CPUs or GPUs for now."""


class TrainersNotUp(LaunchError):
    """Trainers were given room, but their processes did not come up."""


class GraceOver(Exception):
    """A run that was asked to end did not write its checkpoint in the time that it had."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"no checkpoint was committed within recovery.grace_s = {seconds:g} s of the signal"
        )


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; carries the exit code that says so.

    A KeyboardInterrupt, because that alone gets through: `except Exception` in a library would
    swallow another, and Ray's compiled calls know only this one.
    """

    def __init__(self, signal_number: int, exit_code: int | None = None) -> None:
        super().__init__(f"signal {signal_number}")
        self.exit_code = 128 + signal_number if exit_code is None else exit_code
