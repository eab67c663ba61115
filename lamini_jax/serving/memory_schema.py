"""What the memory API takes and gives, which is also its description in `/openapi.json`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_LISTED = 1000


class Request(BaseModel):
    """Something that a client sends: what it does not know is refused, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NewFact(Request):
    """A fact, which is stored word for word."""

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    also: list[str] = Field([], description="Other wordings of the question.")


class Addition(Request):
    """Facts to add; those that are stored with another answer are changed."""

    facts: list[NewFact] = Field(min_length=1)
    wait: bool = Field(False, description="Answers when the facts hold, and not as soon as they are sure to be tuned.")


class Alteration(Request):
    """Another answer of a fact, or other wordings."""

    answer: str | None = Field(None, min_length=1)
    also: list[str] | None = None
    wait: bool = False


class Question(Request):
    """A question whose nearest facts are asked for."""

    query: str = Field(min_length=1)


class Memory(BaseModel):
    """A fact. One that is pending does not answer yet, or still with what it was before."""

    id: str
    question: str
    answer: str
    also: list[str]
    state: Literal["pending", "certified", "failed"]
    reason: str | None = Field(description="Why it failed.")
    updated_at: str
    experts: int = Field(description="How many experts it has.")
    conflicts: list[str] = Field(description="Ids of facts with other answers that are hard to tell apart from it.")


class Added(Memory):
    """A fact of an addition, and what that did."""

    event: Literal["ADD", "UPDATE", "NONE"]


class Additions(BaseModel):
    """The facts of an addition, in its order."""

    results: list[Added]


class Memories(BaseModel):
    """A page of a list of facts, and how many there are."""

    results: list[Memory]
    total: int = Field(description="Facts that were found.")
    pending: int = Field(description="Facts of the whole memory that are still to be tuned.")
    limit: int
    offset: int


class Event(BaseModel):
    """Something that happened to a fact."""

    event: Literal["added", "changed", "pending", "certified", "failed"]
    created_at: str
    reason: str | None


class History(BaseModel):
    """What happened to a fact, the oldest first."""

    id: str
    results: list[Event]


class Candidate(BaseModel):
    """A stored wording near to a question."""

    id: str
    question: str
    wording: str = Field(description="The one of its wordings that is nearest.")
    answer: str
    score: float | None = Field(description="In log-odds; null if the wording is the question itself.")
    fires: bool


class Nearest(BaseModel):
    """What the scope sees of a question: the fact that answers it, if one does, and the nearest ones."""

    query: str
    threshold: float = Field(description="The score from which on a fact answers.")
    fact: str | None
    results: list[Candidate]
