"""Exact curvature blocks of small networks by plain Jacobians; slow, one image and one output number at a time."""

import torch
from torch.nn import functional


def layer_parameters(model, name):
    module = model.get_submodule(name)
    return [module.weight] + ([module.bias] if module.bias is not None else [])


def jacobian(model, name, x):
    """d output / d (weight row by row, bias as its last column) of one image, [numel of output, o (d + 1)]."""
    parameters = layer_parameters(model, name)
    output = model(x[None])[0].flatten()
    rows = []
    for value in output:
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        matrix = grads[0].flatten(1)
        rows.append((torch.cat([matrix, grads[1][:, None]], 1) if len(grads) == 2 else matrix).flatten())
    return torch.stack(rows)


def output_hessian(z, loss):
    if loss == "mse":
        return torch.eye(z.numel(), dtype=z.dtype)
    p = z.softmax(0)
    return p.diag() - p[:, None] * p


def ggn_block(model, name, images, loss="cross_entropy"):
    """Exact generalised Gauss-Newton block per image, [o (d + 1), o (d + 1)]."""
    total = 0
    for x in images:
        j = jacobian(model, name, x)
        total = total + j.T @ output_hessian(model(x[None])[0].flatten().detach(), loss) @ j
    return total / len(images)


def empirical_block(model, name, images, labels):
    """Average outer product of the gradients of the given labels' losses."""
    total = 0
    for x, y in zip(images, labels, strict=True):
        grads = torch.autograd.grad(functional.cross_entropy(model(x[None]), y[None]), layer_parameters(model, name))
        matrix = grads[0].flatten(1)
        vector = (torch.cat([matrix, grads[1][:, None]], 1) if len(grads) == 2 else matrix).flatten()
        total = total + vector[:, None] * vector
    return total / len(images)
