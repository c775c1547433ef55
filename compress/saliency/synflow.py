"""SynFlow: synaptic flow S = |theta| * dR/d|theta| (Tanaka et al. 2020, arXiv:2006.05467).

R = 1^T f(1) is the summed output of the network in absolute weights for an all-ones input: biases are zero and BatchNorm is a plain
scale (`compress.saliency.flow`), so that no data is read. Biases that are to be scored take part with their absolute values.
Everything is computed in float64: R reaches 1e139 for ResNet-110. Where even float64 overflows, powers of two are carried along
(`compress.saliency.far_flow`), which scales all scores alike.

Laws (tested): for a chain the scores of every layer sum to R; the scores into a hidden unit (and its bias's) sum to the scores out of it;
rescaling a unit (w_in * a, w_out / a) changes no score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compress.errors import RunError, UserError
from compress.saliency import Batches, weight_criterion
from compress.saliency.far_flow import FarFlow
from compress.saliency.flow import PositiveFlow, constant_inputs, double_state, total
from compress.saliency.statistics import scoring_mode


@weight_criterion("synflow", iterations=100)
def synflow(
    model: nn.Module, names: Sequence[str], *, input_shape: Sequence[int] | None = None, batches: Batches | None = None, **_: object
) -> dict[str, Tensor]:
    """float64 scores. `input_shape` is the shape of one input without the batch dimension; without it the batches' shape is used."""
    if input_shape is None:
        if not batches:
            raise UserError(
                "Weight criterion 'synflow' needs the option input_shape (one input, without the batch dimension) or calibration batches."
            )
        input_shape = tuple(batches[0][0].shape[1:])
    state = double_state(model)
    for name, _unused in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name].abs_()
    chosen = [state[name].requires_grad_(True) for name in names]
    biases = [weight for name, weight in zip(names, chosen, strict=True) if name.rpartition(".")[2] == "bias"]
    for mode in (PositiveFlow(biases=biases), FarFlow(biases=biases)):
        with scoring_mode(model), torch.enable_grad(), mode:
            flow = total(functional_call(model, state, (constant_inputs(tuple(input_shape), chosen[0]),)))
        if not flow.requires_grad:
            raise UserError("Weight criterion 'synflow' found no path from the scored weights to the network's output.")
        if bool(torch.isfinite(flow)):
            grads = torch.autograd.grad(flow, chosen, allow_unused=True)
            scores = [
                torch.zeros_like(weight) if grad is None else grad.mul_(weight.detach()) for weight, grad in zip(chosen, grads, strict=True)
            ]
            if all(bool(torch.isfinite(score.sum())) for score in scores):
                return dict(zip(names, scores, strict=True))
    raise RunError("The synaptic flow of this network leaves the range of float64; normalise its layers or score it by another criterion.")
