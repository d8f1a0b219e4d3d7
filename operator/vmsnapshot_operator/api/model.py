"""What all models of the API share: how they are parsed and written, their bounded types, and rules for the API server.

The API server enforces the whole schema, rules in CEL included, before we see an object. The models enforce types,
bounds and patterns once more; rules over several fields stand in CEL alone, so that there is one source of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel

from vmsnapshot_operator.core.volumes import Consistency
from vmsnapshot_operator.errors import RefusedError

PATTERN_MESSAGE = "x-pattern-message"
"""In a field's schema: what to say instead of the API server's "should match '^…$'". The generator makes a rule of it."""

RULES = "x-kubernetes-validations"
LIST_TYPE = "x-kubernetes-list-type"
LIST_MAP_KEYS = "x-kubernetes-list-map-keys"


class Model(BaseModel):
    """A part of an object: immutable, strict, camelCase on the wire; an unknown field is an error."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Self:
        """Read what the API server sent; raises RefusedError naming each field that does not fit."""
        try:
            # By way of JSON: the strict mode then takes a text for a time and a list for a tuple, and nothing else.
            return cls.model_validate_json(json.dumps(dict(body), default=dict))
        except ValidationError as error:
            # Without the cause: its text repeats the values.
            raise RefusedError(f"{cls.__name__}: {_told(error)}", reason="InvalidObject") from None

    def to_body(self) -> dict[str, Any]:
        """Return it as the API server takes it: camelCase, plain JSON values, absent fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Report(Model):
    """A part of status: what a later version of the operator added is passed over."""

    model_config = ConfigDict(extra="ignore")


def _told(error: ValidationError) -> str:
    # Without the values: they may be anything, also something secret in the wrong place.
    found = [f"{'.'.join(str(p) for p in e['loc']) or 'it'}: {e['msg']}" for e in error.errors(include_input=False)]
    return "; ".join(found[:10])


class ObjectMeta(Report):
    """The part of an object's metadata that we read."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: AwareDatetime | None = None
    deletion_timestamp: AwareDatetime | None = None
    finalizers: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Object(Report):
    """A whole object: kinds add `spec` and `status`."""

    api_version: str
    kind: str
    metadata: ObjectMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of `kubectl get`; `wide` ones are shown by `-o wide` only."""

    name: str
    type: str
    path: str
    description: str
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of the group: how it is called, and its model."""

    model: type[Object]
    name: str
    plural: str
    short_names: tuple[str, ...]
    namespaced: bool
    columns: tuple[Column, ...]

    @property
    def singular(self) -> str:
        """The kind in lower case."""
        return self.name.lower()


def rule(expression: str, message: str, *, path: str = "") -> dict[str, str]:
    """Return one rule in CEL with what the user is told; `path` is the field that it is told of (`.field`)."""
    return {"rule": expression, "message": message} | ({"fieldPath": path} if path else {})


def rules(*each: Mapping[str, str]) -> dict[str, Any]:
    """Return what a model or field carries to have these rules in its schema."""
    return {RULES: [dict(r) for r in each]}


def ready_column() -> Column:
    """Return the column that every kind has."""
    return Column(
        name="Ready",
        type="string",
        path='.status.conditions[?(@.type=="Ready")].status',
        description="Whether it can be used.",
    )


def message_column() -> Column:
    """Return the wide column with what the Ready condition says."""
    return Column(
        name="Message",
        type="string",
        path='.status.conditions[?(@.type=="Ready")].message',
        description="What the Ready condition says.",
        wide=True,
    )


AGE = Column(name="Age", type="date", path=".metadata.creationTimestamp", description="Since it was created.")


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _consistency(value: object) -> Consistency:
    return value if isinstance(value, Consistency) else Consistency.from_word(str(value))


_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"

ObjectName = Annotated[
    str,
    Field(
        max_length=253,
        pattern=_SUBDOMAIN,
        json_schema_extra={
            PATTERN_MESSAGE: "must be the name of an object: lower case letters, digits, '-' and '.', with a letter or digit at both ends"
        },
    ),
]
"""The name of another object."""

Trimmed = Annotated[
    str,
    Field(
        max_length=255,
        pattern=r"^[^\s\x00-\x1f]([^\x00-\x1f]*[^\s\x00-\x1f])?$",
        json_schema_extra={
            PATTERN_MESSAGE: "must not be empty, begin or end with a space, or contain control characters"
        },
    ),
]
"""A name that somebody else gives."""

PluginName = Annotated[
    str,
    Field(
        max_length=63,
        pattern=r"^[A-Z][A-Za-z0-9]*$",
        json_schema_extra={
            PATTERN_MESSAGE: "must be one CamelCase word: a capital letter, then letters and digits, as in Auto"
        },
    ),
]
"""The name of a quiesce method or of a strategy: an open list, since plug-ins add to it."""

Word = Annotated[str, Field(max_length=63)]
"""A short word that we write."""

ReasonWord = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
"""A stable CamelCase word; ours are in `reasons`, storage drivers add their own."""

Message = Annotated[str, Field(max_length=1024)]
"""A text for people; who writes it cuts it to this length."""

Name = Annotated[str, Field(max_length=255)]
"""A name that we copied from elsewhere."""

Path = Annotated[str, Field(max_length=4096)]
"""A path, an image or another address of something stored."""

Time = Annotated[AwareDatetime, PlainSerializer(_utc, return_type=str, when_used="json")]
"""A moment, written in UTC with microseconds."""

Count = Annotated[int, Field(ge=0, le=1_000_000)]
"""How many."""

Milliseconds = Annotated[int, Field(ge=0, le=315_360_000_000)]
"""A duration: ten years at most, since a report of what went wrong must never be refused for its size."""

Bytes = Annotated[int, Field(ge=0, le=2**62)]
"""A size in bytes."""

Generation = Annotated[int, Field(ge=-1, le=2**62)]
"""A generation of an object; -1 before it was ever looked at."""

ConsistencyWord = Annotated[
    Consistency,
    PlainValidator(_consistency),
    PlainSerializer(lambda c: c.word, return_type=str),
    WithJsonSchema({"type": "string", "enum": [c.word for c in sorted(Consistency, reverse=True)]}),
]
"""A consistency by its word on the wire."""
