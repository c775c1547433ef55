"""This project's kernels as sides of the GPU benchmark: packed forms of a layer, and the launch settings that are tried on each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from benchmarks._sides import OWN_CHOICE, Side, copies, fastest
from kernels import SparseConv2d, SparseLinear
from kernels.formats import Packed
from kernels.run16.reference import stored_bytes as run16_bytes
from kernels.two_four.reference import parts
from kernels.vector_block.reference import stored_bytes as block_bytes

# Places of the launch settings among a format's options; 2:4 has none, because cuSPARSELt searches for its algorithm itself.
PLACES = {"run16": {"warps": 1, "splits": 2}, "vector_block": {"width": 0, "splits": 1, "warps": 2},
          "sparse_conv": {"pixels": 3, "splits": 4, "warps": 5}}
SPLITS = (1, 2, 4, 8, 16)
LARGEST_TILE = 128 * 64
MOST_PROGRAMS = 132 * 16  # more shares than these cannot fill a GPU any better and only cost memory


def weight_bytes(packed: Packed) -> int:
    """What one product reads of a packed weight; the bits for the backward pass are not among it. 2:4 is 9 bits of every dense 16."""
    if packed.format == "two_four":
        _, remainder = parts(packed.values, packed.index)
        return packed.rows * packed.columns * packed.values.element_size() * 9 // 16 + run16_bytes(remainder, packed.index[1:])
    return (run16_bytes if packed.format == "run16" else block_bytes)(packed.values, packed.index)


def launch_settings(packed: Packed, columns: int) -> Iterator[dict[str, int]]:
    """The kernel's own choice ({}) first, then a few settings around it, for `columns` columns of x (output pixels of a convolution)."""
    yield {}
    if packed.format == "run16":
        start, slices = packed.index[0], max(1, packed.index[3].numel() - 1)
        for warps in (4, 8):
            yield from ({"warps": warps, "splits": s} for s in SPLITS[:4] if s == 1 or s * warps * slices <= start.shape[0])
    elif packed.format in PLACES:
        steps, _, height = packed.values.shape
        blocks = max(1, packed.index[2].numel())
        name, tiles = next(iter(PLACES[packed.format])), _tiles(packed, columns)
        for tile in tiles:
            programs = blocks * -(-columns // tile)
            yield from ({name: tile, "splits": s} for s in SPLITS if s == 1 or (s * blocks <= steps and s * programs <= MOST_PROGRAMS))


def _tiles(packed: Packed, columns: int) -> list[int]:
    """Columns of x (or pixels) per program that are worth trying; an accumulator of more numbers than LARGEST_TILE does not fit into registers."""
    height, half = packed.values.shape[2], packed.values.element_size() == 2
    if packed.format == "sparse_conv":
        return [tile for tile in (64, 128) if tile == 64 or (half and height * tile <= LARGEST_TILE)]
    from kernels.vector_block.triton import WIDTHS, width_for

    width = width_for(columns, height, packed.values.element_size())
    return [tile for tile in (width, width // 2) if tile in WIDTHS]


class Form:
    """A packed form of a layer, packed once and copied as often as its rotation needs; used for every x."""

    def __init__(self, layer: nn.Module, format: str, **options) -> None:
        kind = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
        module = kind.from_dense(layer, format=format, **options)
        self.packed = module.packed
        self.weight_bytes = weight_bytes(self.packed)
        self.modules = copies(lambda: copy.deepcopy(module), self.weight_bytes, layer.weight.device)

    def side(self, x: Tensor, expected: Tensor, seconds: float) -> Side:
        """The form with the fastest launch settings for x."""
        offered = launch_settings(self.packed, expected.numel() // self.packed.rows)
        sides = {_name(settings): Side(self._calls(x, settings), self.weight_bytes) for settings in offered}
        if len(sides) == 1 or not seconds:
            return sides[OWN_CHOICE]
        return fastest(sides, expected, seconds)

    def _calls(self, x: Tensor, settings: dict[str, int]) -> list[Callable[[], Tensor]]:
        options = list(self.packed.options)
        for name, value in settings.items():
            options[PLACES[self.packed.format][name]] = value

        def call(module: nn.Module) -> Tensor:
            # The copies serve all settings, and a graph keeps those that it was captured with.
            module.options = options
            return module(x)

        return [lambda module=module: call(module) for module in self.modules]


def _name(settings: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or OWN_CHOICE
