"""Define the base class of all sections of a config, and the number types that they share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NAME = r"^[\w-][\w.-]*$"  # pattern of names that become names of folders or files
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
