"""The error for mistakes that users can fix, and the exit statuses of the commands."""

BAD_INPUT = 2
FACTS_DO_NOT_HOLD = 3
DOES_NOT_FIT = 4  # out of memory, or too large for the chips that it is compiled for
DEVICES = 5  # a mesh that does not match the devices, a slice that does not exist, or no usable device
PROCESS_LOST = 6  # a coordinator that cannot be reached, another process that died
OTHER_RUN = 7  # a directory or a checkpoint of another config, other facts, other weights or another router
PREEMPTED = 75  # everything is saved: start again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """A mistake that the user can fix. Its message is one line: what is wrong, where, and how to fix it.

    Characters that a terminal cannot show, such as a line break in a path, are escaped.
    """

    def __init__(self, message: str, status: int = BAD_INPUT):
        shown = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in message)
        super().__init__("".join(shown))
        self.status = status


class Busy(UserError):
    """Another process is at work where only one may be: the same may be done later."""


class Outdated(UserError):
    """Another process has changed what was read: it has to be read again."""
