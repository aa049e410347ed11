"""Any reference model -> its stream program: by the rules, or as the adapter of a user's own module says."""

from __future__ import annotations

from exporters import adapter, program
from exporters.adapter import AdaptedProgram
from exporters.program import StreamProgram
from mscompile.contracts import Profile
from mscompile.models.family import ReferenceModel
from mscompile.models.own import OwnModule


def build(model: ReferenceModel, profile: Profile, context: int | None = None) -> StreamProgram | AdaptedProgram:
    """The stream program of a model in eval mode. Raises Refusal, with the reason, where there is none."""
    if isinstance(model, OwnModule):
        return adapter.build(model, profile)
    return program.build(model, profile, context)
