"""Settings of optimizers. Importing this imports no torch: pipelines are checked without it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from base.config import StrictConfig


class GroupConfig(StrictConfig):
    """Other settings for some of the parameters."""

    match: str = Field(
        min_length=1,
        description="Names of parameters, `*` standing for any text: `embedding.*`, `*.mixer.A_log`. The first group "
        "that matches a parameter counts.",
    )
    lr_ratio: float = Field(1.0, ge=0, description="Their learning rate, in units of lr; 0 keeps them as they are.")
    weight_decay: float | None = Field(
        None, ge=0, description="Their decay; null: as without the group, which is none for norms and SSM parameters."
    )


class TransferConfig(StrictConfig):
    """A smaller model whose best lr, decay and init_std are to be best here too (muP and CompleteP).

    The two models have the same head_dim, ssm_head_dim and d_state. Heads and d_ff grow with d_model.
    """

    base_d_model: PositiveInt = Field(description="Its d_model. At this width nothing changes.")
    base_num_layers: PositiveInt | None = Field(
        None, description="Its number of layers; null: as many as here, whatever their number."
    )


class AdamWConfig(StrictConfig):
    """AdamW for all parameters (arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"


class MuonConfig(StrictConfig):
    """Muon for the matrices inside the layers; AdamW for embeddings, head, norms, convolutions and SSM parameters.

    lr and weight_decay count for both: Muon's update has the root mean square of AdamW's (arXiv:2502.16982).
    """

    kind: Literal["muon"]
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay rate of the mean of the gradients.")
    num_iterations: PositiveInt = Field(
        5, le=20, description="Newton-Schulz iterations, which bring the singular values of an update near 1."
    )


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]
