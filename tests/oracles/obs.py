"""Brute-force optimal brain surgeon: the constrained minimum of a quadratic by its KKT system on the flattened weights."""

import torch


def constrained_minimum(w, H, removed):
    """(update, loss) of min 1/2 dw^T H dw subject to w + dw = 0 on `removed`; w [p], H [p, p]."""
    p, r = w.numel(), removed.numel()
    E = torch.zeros(r, p, dtype=w.dtype)
    E[torch.arange(r), removed] = 1
    kkt = torch.cat([torch.cat([H, E.T], 1), torch.cat([E, torch.zeros(r, r, dtype=w.dtype)], 1)])
    right = torch.cat([torch.zeros(p, dtype=w.dtype), -w[removed]])
    dw = torch.linalg.solve(kkt, right)[:p]
    return dw, dw @ H @ dw / 2


def woodfisher_inverse(X, shift):
    """The published recursion, one rank-one update per gradient."""
    F = torch.eye(X.shape[1], dtype=X.dtype) / shift
    for g in X:
        v = F @ g
        F = F - v[:, None] * v / (len(X) + g @ v)
    return F
