"""What messages are made of: content blocks and token counts, as the CLI and the provider write them."""

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

JsonObject: TypeAlias = dict[str, Any]
#: Kept as it came: the CLI writes 0 and 0.5 in the same field.
Number: TypeAlias = int | float


class Wire(BaseModel):
    """A JSON object of the wire. Checked strictly: nothing is converted on the way in, so ``raw`` is exact."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, defer_build=True)

    def raw(self) -> JsonObject:
        """The JSON object this was built from, fields we do not name included."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class TextBlock(Wire):
    """Text said by the model, or handed to it."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Wire):
    """What the model thought. ``thinking`` is empty where the provider keeps it to itself."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Wire):
    """The model's wish to use a tool. ``input`` is what the tool is given."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: JsonObject


class ToolResultBlock(Wire):
    """What a tool gave. ``content`` is text or a list of content blocks, as JSON."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Any] | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """The text of the content; blocks of other kinds (images) are left out, texts stand on own lines."""
        if isinstance(self.content, str):
            return self.content
        blocks = [block for block in self.content or () if isinstance(block, dict)]
        texts = [block.get("text") for block in blocks if block.get("type") == "text"]
        return "\n".join(text for text in texts if isinstance(text, str))


class ImageBlock(Wire):
    """An image. ``source`` holds its media type and its data or address."""

    type: Literal["image"]
    source: JsonObject


class UnknownBlock(Wire):
    """A content block of a kind, or in a shape, this version does not know."""

    type: Any = None


def _tag_of_block(value: Any) -> str:
    # A block already read may be unknown although its type is known: when written, it is asked for its tag again.
    if isinstance(value, UnknownBlock):
        return "*"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) and kind in _BLOCK_TAGS else "*"


def _unknown_block_if_misshapen(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:
        return UnknownBlock.model_validate(value)


Block: TypeAlias = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[UnknownBlock, Tag("*")],
    Discriminator(_tag_of_block),
    WrapValidator(_unknown_block_if_misshapen),
]


def tags_of(union: object) -> frozenset[str]:
    """The tags of a union's members, so that what is known is written down once."""
    members = get_args(get_args(union)[0])
    return frozenset(note.tag for member in members for note in get_args(member)[1:])


_BLOCK_TAGS = tags_of(Block)


class OutputTokensDetails(Wire):
    """What the output tokens were spent on; a part of them, not an addition to them."""

    thinking_tokens: int | None = None


class Usage(Wire):
    """Tokens as the provider counts them. ``input_tokens`` excludes what the cache gave or took."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens_details: OutputTokensDetails | None = None


class ModelUsage(Wire):
    """Tokens and price of one model. ``cost_usd`` is in US dollars.

    ``cost_basis`` is ``list`` or ``managed`` (the organisation's own prices); ``unknown`` means that the CLI has
    no price for the model and guessed with another's.
    """

    input_tokens: int | None = Field(None, alias="inputTokens")
    output_tokens: int | None = Field(None, alias="outputTokens")
    cache_read_input_tokens: int | None = Field(None, alias="cacheReadInputTokens")
    cache_creation_input_tokens: int | None = Field(None, alias="cacheCreationInputTokens")
    thinking_tokens: int | None = Field(None, alias="thinkingTokens")
    cost_usd: Number | None = Field(None, alias="costUSD")
    cost_basis: str | None = Field(None, alias="costBasis")
    context_window: int | None = Field(None, alias="contextWindow")
    max_output_tokens: int | None = Field(None, alias="maxOutputTokens")

    @property
    def known_cost_usd(self) -> float | None:
        """The cost, unless it is missing or guessed."""
        return None if self.cost_usd is None or self.cost_basis == "unknown" else float(self.cost_usd)
