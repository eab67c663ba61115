"""The one error that users cause, and how a command exits on it."""

BAD_INPUT = 2
FACTS_DO_NOT_HOLD = 3
DOES_NOT_FIT = 4  # the chips' memory
DEVICES = 5  # a mesh or a topology that the devices are not
PROCESS_LOST = 6  # a coordinator that cannot be reached, another process that died
OTHER_RUN = 7  # a directory or a checkpoint of another config or of other facts
PREEMPTED = 75  # everything is saved: start again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Something that whoever runs a command can put right: one line that says what, where and how."""

    def __init__(self, message: str, status: int = BAD_INPUT):
        super().__init__(message)
        self.status = status
