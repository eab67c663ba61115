"""What the OpenAI API takes and gives. What would change an answer and is not known here is refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lamini_jax.serving.work import MOST_LIKELIEST

_STOPS, _TOKEN = 16, Annotated[int, Field(ge=0, lt=2**31)]
# Fields whose only values here are those that change nothing.
_NEUTRAL = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "audio": (None,),
}


class StreamOptions(BaseModel):
    """What a stream adds."""

    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=1000)
    temperature: float | None = Field(None, ge=0, le=2, description="0, or nothing: the likeliest tokens.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop):
        if len(stop or ()) > _STOPS and not isinstance(stop, str):
            raise ValueError(f"at most {_STOPS} texts")
        return stop

    @model_validator(mode="after")
    def _nothing_unknown(self):
        for name, neutral in _NEUTRAL.items():
            if (value := (self.model_extra or {}).get(name)) not in neutral:
                raise ValueError(f"{name} is not supported here; leave it out ({str(value)[:40]})")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which answers end. Empty ones end nothing."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)


class CompletionRequest(_Request):
    """A text, or its tokens, to be continued; or several."""

    prompt: str | list[_TOKEN] | list[str] | list[list[_TOKEN]]
    logprobs: bool | Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None
    echo: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt):
        if not prompt or not all(isinstance(part, int) or part for part in prompt):
            raise ValueError("is empty; send a text, or token ids")
        return prompt

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each of the prompts."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are told at each place."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What one side has said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """A conversation to be continued."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are told at each place."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def plain_messages(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        roles = {"developer": "system"}
        return [{"role": roles.get(said.role, said.role), "content": said.text} for said in self.messages]


class TokenizeRequest(BaseModel):
    """A text whose tokens are asked for."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """Tokens whose text is asked for."""

    model: str | None = None
    tokens: list[_TOKEN]


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """What completions and chats answer. `memory` says what the memory found, for each prompt."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage
    memory: dict[str, Any] | list[dict[str, Any]] | None = None


class Tokens(BaseModel):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What clients need to know of a tokenizer."""

    eos_token: str
    eos_token_id: int
    max_model_len: int


class Models(BaseModel):
    """The models that may be asked."""

    object: Literal["list"]
    data: list[dict[str, Any]]
