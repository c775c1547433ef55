"""BatchNorm scale (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming").

    s_c = |gamma_c|        gamma [channels]: the scale of a BatchNorm or InstanceNorm layer of the group

Compared over layers as it is (`normalize="none"`, as published): after normalisation gamma is the layer's output scale. The mean over
the normalisation layers of a group that has several.
"""

from __future__ import annotations

from pydantic import Field
from torch.nn.modules.batchnorm import _NormBase

from compress.criteria import CRITERIA
from compress.criteria.base import Criterion, LayerOptions, Normalize, aggregate, normalize, slices, tensors


class BnScaleOptions(LayerOptions):
    """Options of `bn_scale`."""

    normalize: Normalize = Field("none", description="divide each layer's scores by this, before members are combined")


@CRITERIA.register("bn_scale")
class BnScale(Criterion):
    """Absolute value of the normalisation scale."""

    name = "bn_scale"
    Options = BnScaleOptions

    lacks = "it has no BatchNorm scale"

    @classmethod
    def members(cls, group, owners, options):
        return [m for m in group.members if isinstance(owners.get(m.parameter), _NormBase) and m.parameter.rpartition(".")[2] == "weight"]

    @classmethod
    def measure(cls, picked, model, batches, loss_fn, generator, options):
        named = tensors(model)
        for _, members in picked:
            yield aggregate([normalize(slices(named[m.parameter], m.dim, m.indices).abs().mean(1), options.normalize) for m in members],
                            options.aggregate)
