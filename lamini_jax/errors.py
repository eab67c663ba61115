"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Bad input: the message names the file, line or flag and what to do. Commands print it and exit with `status`."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status
