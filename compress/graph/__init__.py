"""Which parameter slices of a network belong together, and their removal.

`trace(model, example_inputs) -> ChannelGraph` runs the network once under a dispatch mode and follows every index of every parameter
through it. `ChannelGraph.groups` are the channels that can only be removed together; `ChannelGraph.prune` removes them and proves that
nothing else changed.
"""

from compress.graph.channel_graph import ChannelGraph, CoverageRow
from compress.graph.counting import LayerCost
from compress.graph.groups import ChannelGroup, Member
from compress.graph.tracer import trace

__all__ = ["ChannelGraph", "ChannelGroup", "CoverageRow", "LayerCost", "Member", "trace"]
