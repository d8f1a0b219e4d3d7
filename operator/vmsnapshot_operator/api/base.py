"""What all models share: camelCase names, bounded types, rules for the API server (CEL)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """A part of an object, spelled in camelCase on the API. Unknown fields are an error in our own code."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules with their messages, as the schema spells them; put it into `json_schema_extra`."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


DNS_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_NAME)]
Word = Annotated[str, Field(max_length=63)]
Reason = Annotated[str, Field(max_length=64)]
Target = Annotated[str, Field(min_length=1, max_length=64)]
Message = Annotated[str, Field(max_length=4096)]
Text = Annotated[str, Field(max_length=1024)]
Identity = Annotated[str, Field(max_length=64)]
Moment = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Milliseconds = Annotated[int, Field(ge=0, le=2_000_000_000)]
Bytes = Annotated[int, Field(ge=0, le=2**60)]
Generation = Annotated[int, Field(ge=-1, le=2**53)]
MAX_DISKS = 256
"""Disks of one VM: libvirt's virtio-scsi allows that many targets; more is not a VM that we know of."""
