"""What a server allows: its settings, its key, and how it says no."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """The limits of a server. `key` is what clients send as `Authorization: Bearer KEY`; None: anybody may ask."""

    key: str | None = None
    body_bytes: int = 2**20
    choices: int = 16  # `n` of a request
    prompts: int = 256  # of a request
    facts: int = 1000  # of a request
    seconds: float = 300.0  # that a request may take, its time in the queue included


class ApiError(Exception):
    """What a client is told, as {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers: dict[str, str] = {}
