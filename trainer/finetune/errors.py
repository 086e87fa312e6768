"""What is wrong with a task's files, as one clear line."""


class TaskDataError(ValueError):
    """A task's file, row or column cannot be used; the message names them."""
