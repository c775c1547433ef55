"""Kinds of plan steps beside channel pruning: one file each, registered in `compress.plan.STEPS`."""
