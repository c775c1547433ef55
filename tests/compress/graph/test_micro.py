"""Oracle: the masked original (tests/compress/graph/oracle.py) in float64; what must shrink or stay is written in the table by hand."""

import pytest
import torch

from compress.graph import trace
from compress.graph.copies import real_copy
from tests.compress.graph.micro import CASES
from tests.compress.graph.oracle import choose, distance, kill, masked, outputs, randomise


def prepared(name):
    torch.manual_seed(0)
    case, generator = CASES[name], torch.Generator().manual_seed(1)
    model = real_copy(randomise(case.build(), generator), torch.float64)
    if case.integers:
        return case, model, torch.randint(0, case.integers, case.shape, generator=generator), generator
    return case, model, torch.randn(case.shape, generator=generator, dtype=torch.float64), generator


@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused_with_the_operator(name):
    case, model, x, generator = prepared(name)
    graph = trace(model, x)
    free = {member.parameter.split(".")[0] for group in graph.groups if group.prunable for member in group.members if member.role == "out"}
    assert not set(case.free) - free, "a layer that can be pruned was not"
    for layer, word in case.pinned.items():
        reasons = [reason for parameter, reason in graph.pinned.items() if parameter.split(".")[0] == layer]
        assert layer not in free and any(word in reason for reason in reasons), (layer, reasons)
    removals = choose(graph, generator)
    if not removals:
        return
    dense, expected = outputs(model, x), outputs(masked(real_copy(model), removals), x)
    graph.prune(model, removals)
    got = outputs(model, x)
    assert distance(expected, got) <= 1e-10
    assert distance(dense, got) > 1e-6, "the cut changed nothing, so that the comparison shows nothing"


ZERO_STAYS_ZERO = ["chain", "residual", "concat", "concat_into_grouped", "two_group_counts", "grouped", "depthwise_with_multiplier",
                   "transposed_grouped", "nhwc_reshape_linear", "concat_flatten_linear", "channel_shuffle_by_views",
                   "channel_shuffle_module", "flip", "roll", "pixel_shuffle", "zero_pad_module", "c2f", "chunk_gate",
                   "temporal_shift", "slice_assigned_in_place", "module_used_twice", "linear_view_transposed",
                   "einsum_with_a_parameter", "squeeze_excite", "repeated_channels", "unfolded"]


@pytest.mark.parametrize("name", ZERO_STAYS_ZERO)
def test_planted_dead_channels_are_removed_without_a_trace(name):
    """Channels whose producers are zero carry nothing, so that removing them changes nothing at all."""
    case, model, x, generator = prepared(name)
    graph = trace(model, x)
    removals = choose(graph, generator, 0.4)
    kill(model, removals)
    before = outputs(model, x)
    assert max(float(out.abs().max()) for out in before) > 0
    graph.prune(model, removals, verify=False)
    assert distance(before, outputs(model, x)) <= 1e-12


@pytest.mark.parametrize("name, sizes", [
    ("c2f", {"a": 6, "b": 6, "d": 6}),  # halves of a: the same position of both
    ("chunk_gate", {"a": 6}),
    ("slice_by_a_share", {"a": 6}),
    ("slice_of_the_front", {"a": 8, "b": 4}),  # 12 - 4 behind the fixed front; 9 - 5 behind the fixed start
    ("roll", {"a": 5}),  # three wrap around
    ("channel_shuffle_by_views", {"a": 2, "b": 4}),  # pairs of the shuffle, and of these the same position in both groups of b
    ("channel_shuffle_module", {"a": 4}),
    ("pixel_shuffle", {"a": 4}),
    ("pixel_shuffle_by_views", {"a": 4}),
    ("group_norm", {"a": 4}),
    ("depthwise_with_multiplier", {"a": 6}),
    ("groups_with_one_output_each", {"a": 4}),
    ("two_group_counts", {"a": 2}),
    ("concat_into_grouped", {"a": 4}),
    ("concat_with_the_input", {"a": 6}),
    ("linear_view_transposed", {"a": 8, "b": 6}),
    ("tied_embedding_and_head", {"a": 8}),
])
def test_sizes_of_groups(name, sizes):
    """Numbers of removable channels, counted by hand."""
    case, model, x, _ = prepared(name)
    graph = trace(model, x)
    found = {}
    for group in graph.groups:
        if group.prunable:
            for layer in {member.parameter.split(".")[0] for member in group.members if member.role == "out"}:
                found[layer] = found.get(layer, 0) + group.size
    assert {layer: found[layer] for layer in sizes} == sizes
