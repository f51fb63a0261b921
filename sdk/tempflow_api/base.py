"""What every section of the custom resource has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Section(BaseModel):
    """A block of the manifest: camelCase outside, strict about types, refuses unknown keys.

    A string below a field is the field's description; it travels into the schema and the docs.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
    )


# Every string and list is bounded: the API server estimates the cost of a validation rule from
# these bounds, and refuses a resource whose estimate is too high.
Name = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
]
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000)]
Uri = Annotated[str, Field(min_length=1, max_length=1024)]
Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
Text = Annotated[str, Field(max_length=1024)]
Quantity = Annotated[
    str, Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")
]
Timestamp = Annotated[
    str, Field(max_length=32, pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")
]
"""An instant in UTC as Kubernetes writes it, for instance ``2026-01-31T12:00:00Z``."""
