"""Oracle: the single-process result on all images."""

import datetime
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed

from compress.curvature import collect, local, squared_gradients
from tests.compress.curvature.nets import convnet, randn

SHARES = {0: slice(0, 5), 1: slice(5, 7)}


def statistics(images):
    net = convnet()
    batches = [images[start:start + 2] for start in range(0, len(images), 2)]
    entries = {
        **collect(net, batches, fisher="exact", ekfac=True),
        **{f"channel {k}": v for k, v in collect(net, batches, fisher="exact", patch="channel").items()},
    }
    tensors = {
        f"{name} {kind}": getattr(entry, kind)
        for name, entry in entries.items()
        for kind in ("A", "G", "second")
        if getattr(entry, kind) is not None
    }
    numbers = {name: torch.tensor([entry.n, entry.positions]) for name, entry in entries.items()}
    return tensors | numbers | squared_gradients(net, batches, fisher="exact")


def sampled(images):
    """Statistics of few and of many sampled labels."""
    entry = collect(convnet(), [images], ekfac=True)["9"]
    return {"G": entry.G, "corrected": entry.second, "many": collect(convnet(), [images], samples=400)["9"].G}


def share(rank, store, images):
    """Statistics of both processes, those of sampled labels where both have the same images, and what this one measures alone."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    try:
        together, labels = statistics(images[SHARES[rank]]), sampled(images)
        alone = {}
        if rank == 0:
            with local():
                alone = statistics(images) | sampled(images)
        return together, labels, alone
    finally:
        distributed.destroy_process_group()


def test_processes_with_unequal_shares_get_the_result_of_all_images(tmp_path):
    images = randn(7, 2, 8, 9)
    alone, labels = statistics(images), sampled(images)
    other = subprocess.Popen(
        [sys.executable, "-m", __name__, str(tmp_path / "store"), str(tmp_path / "other.pt")], cwd=Path(__file__).parents[3]
    )
    mine = share(0, tmp_path / "store", images)
    assert other.wait(timeout=60) == 0
    others = torch.load(tmp_path / "other.pt", weights_only=True)
    for result in (mine[0], others[0]):
        assert result.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(result[name], alone[name], rtol=1e-10, atol=1e-12, msg=name)
    # one process that measures alone waits for no other
    assert all(torch.equal(mine[2][name], value) for name, value in (alone | labels).items())
    # both have the same images and the same seed: equal labels would give what one process finds
    for name in labels:
        torch.testing.assert_close(mine[1][name], others[1][name])
        assert (mine[1][name] - labels[name]).norm() > 1e-3 * labels[name].norm()
    exact = collect(convnet(), [images], fisher="exact")["9"].G
    assert (mine[1]["many"] - exact).norm() < 0.1 * exact.norm()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(share(1, sys.argv[1], randn(7, 2, 8, 9)), sys.argv[2])
