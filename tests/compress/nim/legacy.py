"""The accounting of the published runs, kept as an oracle: percentages, not fractions, averaged over layers without weights.

`moves` are functions survivors -> weights removed, played one after the other on every layer. With `skip`, a layer above the
target sits out.
"""

from collections.abc import Callable, Sequence

VGG16 = [
    9 * a * b for a, b in [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 512), *[(512, 512)] * 5]
]


def percent_mean(sizes: Sequence[int], moves: Sequence[Callable[[int], int]], skip: bool, steps: int = 18) -> tuple[list[float], list[int]]:
    """Published `sparsities` after each of `steps` targets 0.05, 0.10, ... (percent), and the zeros per layer at the end."""
    zeros = [0] * len(sizes)
    published = []

    def percentages() -> list[float]:
        return [100.0 * zero / size for zero, size in zip(zeros, sizes, strict=True)]

    for step in range(1, steps + 1):
        target = 0.05 * step
        while sum(percentages()) / len(sizes) <= target:
            for layer, size in enumerate(sizes):
                if not (skip and percentages()[layer] > target):
                    for move in moves:
                        zeros[layer] += move(size - zeros[layer])
        published.append(sum(percentages()) / len(sizes))
    return published, zeros
