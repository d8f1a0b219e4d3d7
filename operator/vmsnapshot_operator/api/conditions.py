"""Conditions as every kind has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vmsnapshot_operator.api.base import Generation, Message, Model, Moment


class Condition(Model):
    """One aspect of the object's state, in Kubernetes's own form."""

    type: Annotated[str, Field(min_length=1, max_length=64, description="Aspect, such as Ready.")]
    status: Annotated[Literal["True", "False", "Unknown"], Field(description="True, False or Unknown.")]
    observed_generation: Annotated[Generation, Field(description="Generation of the spec that this was decided for.")] = 0
    last_transition_time: Annotated[Moment, Field(description="When the status last flipped.")]
    reason: Annotated[str, Field(min_length=1, max_length=64, description="Stable CamelCase word, for programs.")]
    message: Annotated[Message, Field(description="What was found, where, and what to do, for people.")] = ""


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=16,
        description="State by aspect.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


class Status(Model):
    """What every status has. A fresh object counts as in progress: its observedGeneration is behind."""

    observed_generation: Annotated[Generation, Field(description="Generation of the spec that was looked at last.")] = -1
    conditions: Conditions = []
