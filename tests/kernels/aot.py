"""Compiles the kernels for real GPUs and prints one JSON line per configuration (started by test_compile.py, without TRITON_INTERPRET).

Usage: python -m tests.kernels.aot default|all [kernel ...]
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Iterator

from .compiling import SHARED_LIMIT, build

CAPABILITIES = (80, 90, 100)
TYPES = ("bf16", "fp16", "fp32")
FULL_EPILOGUE = {"HAS_SCALE": True, "HAS_BIAS": True, "HAS_RESIDUAL": True, "ACTIVATION": "gelu"}
NO_EPILOGUE = {"HAS_SCALE": False, "HAS_BIAS": False, "HAS_RESIDUAL": False, "ACTIVATION": "none"}


def run16(full: bool) -> Iterator[dict]:
    from kernels.run16.triton import CONFIGS, registers_for, run16_kernel

    chosen = [(0, 0, 1, {"warps": 4, "splits": 2}), (0, 1, 1, {"warps": 4, "splits": 2}), (1, 0, 8, {"warps": 4, "splits": 2}), (2, 1, 4, CONFIGS[0])]
    every = itertools.product(range(3), range(2), (1, 2, 4, 8), CONFIGS)
    for (kind, coding, batch, config), capability in itertools.product(every if full else chosen, CAPABILITIES):
        # float16 with eight columns on sm_100 is where ptxas spills when it is left alone
        if not full and (kind or coding) and capability != 90 and (kind, batch, capability) != (1, 8, 100):
            continue
        word = ("*fp32" if kind == 2 else "*i16") if batch == 1 else "*i64"
        of_type = "*" + TYPES[kind]
        pointers = {"x": word, "values": "*i64", "start": "*i16", "gaps": "*i64", "perm": "*i32", "slice_ptr": "*i32", "y": of_type,
                    "scale": of_type,
                    "bias": of_type, "residual": of_type, "partial": "*fp32", "counter": "*i32"}
        constants = {"NP": batch, "KIND": kind, "CODING": coding, "WIDE": False, "WARPS": config["warps"], "SPLITS": config["splits"],
                     **FULL_EPILOGUE}
        # Up to eight columns of x are one chunk, and Triton compiles a kernel of its own for an integer that is 1.
        sizes = ("rows", "columns", "batch", *(("chunks",) if batch == 8 else ()))
        constants |= {} if "chunks" in sizes else {"chunks": 1}
        built = build(run16_kernel, pointers, dict.fromkeys(sizes, "i32"), constants, capability, config["warps"], loops=batch == 1,
                      maxnreg=registers_for(batch))
        body = max((len(loop) for loop in built.loops), default=0)
        facts = {"per_nonzero": body / 16 if batch == 1 else None, "coding": coding, "kind": TYPES[kind]}
        yield row("run16", f"{TYPES[kind]} coding {coding} N {batch} {config}", capability, built, config["warps"], **facts)


def vector_block(full: bool) -> Iterator[dict]:
    from kernels.vector_block.triton import CONFIGS, registers_for, vector_block_kernel

    chosen = [("bf16", c) for c in CONFIGS if c["splits"] == 1 and c["height"] == 64] + [("fp32", {**CONFIGS[0], "step": 32})]
    every = ((kind, {**c, "step": 32} if kind == "fp32" else c) for kind in TYPES for c in CONFIGS)
    for (kind, c), capability in itertools.product(every if full else chosen, CAPABILITIES):
        if (kind == "fp32" and c["width"] > 32) or (not full and capability != 90 and c["width"] != 128):
            continue
        of_type = "*" + kind
        pointers = {"x": of_type, "values": of_type, "kept": "*i32", "step_ptr": "*i32", "order": "*i32", "y": of_type, "scale": of_type,
                    "bias": of_type,
                    "residual": of_type, "partial": "*fp32", "counter": "*i32"}
        scalars = dict.fromkeys(("rows", "batch", "blocks", "x_stride", *(("tiles",) if c["width"] > 16 else ())), "i32")
        constants = {"V": c["height"], "STEP": c["step"], "BN": c["width"], "SPLITS": c["splits"], "STAGES": 3, "PRECISION": "ieee",
                     "WIDEN": False, **FULL_EPILOGUE}
        constants |= {} if "tiles" in scalars else {"tiles": 1}
        built = build(vector_block_kernel, pointers, scalars, constants, capability, c["warps"], aligned=("x_stride",),
                      maxnreg=registers_for(c["width"]))
        yield row("vector_block", f"{kind} {c}", capability, built, c["warps"], kind=kind, height=c["height"])


def sparse_conv(full: bool) -> Iterator[dict]:
    from kernels.sparse_conv.triton import CONFIGS, registers_for, sparse_conv_kernel, warps_for

    chosen = [("bf16", c) for c in CONFIGS if c["splits"] == 1 and c["height"] == 64 and c["pixels"] == 128 and c["group"] == 16]
    chosen += [("fp16", {**CONFIGS[0], "group": 1, "splits": 4})]
    every = ((kind, {**c, "step": 32, "warps": warps_for(c["height"], c["pixels"], c["group"], 4)} if kind == "fp32" else c)
             for kind in TYPES for c in CONFIGS)
    for (kind, c), capability in itertools.product(every if full else chosen, CAPABILITIES):
        if (kind == "fp32" and c["height"] * c["pixels"] > 64 * 64) or (not full and kind == "fp16" and capability != 90):
            continue
        of_type = "*" + kind
        pointers = {"x": of_type, "values": of_type, "kept": "*i32", "step_ptr": "*i32", "order": "*i32", "y": of_type, "scale": of_type,
                    "bias": of_type,
                    "residual": of_type, "partial": "*fp32", "counter": "*i32"}
        scalars = dict.fromkeys(("rows", "pixels", "blocks", "groups", "height", "width", "out_height", "out_width", "stride_h", "stride_w", "pad_h",
                                 "pad_w",
                                 "dilation_h", "dilation_w"), "i32")
        constants = {"V": c["height"], "STEP": c["step"], "BP": c["pixels"], "G": c["group"], "SPLITS": c["splits"], "STAGES": 3,
                     "PRECISION": "ieee",
                     "WIDEN": False, **FULL_EPILOGUE}
        # A network's last layer may have any number of channels.
        for aligned, blocks in ((("rows",), {}), ((), {}), ((), {"blocks": 1})):
            sizes = {name: of for name, of in scalars.items() if name not in blocks}
            built = build(sparse_conv_kernel, pointers, sizes, {**constants, **blocks}, capability, c["warps"], aligned=aligned,
                          maxnreg=registers_for(c["group"], 4 if kind == "fp32" else 2))
            yield row("sparse_conv", f"{kind} {c} aligned {aligned} {blocks}", capability, built, c["warps"], kind=kind, group=c["group"])


def compact(full: bool) -> Iterator[dict]:
    from kernels.compact.triton import CONFIGS, compact_decode_kernel

    every = itertools.product(TYPES, CONFIGS, CAPABILITIES)
    for kind, c, capability in every if full else [("bf16", CONFIGS[-1], 90)]:
        pointers = {"values": "*" + kind, "bitmap": "*i32", "row_ptr": "*i64", "y": "*" + kind}
        built = build(compact_decode_kernel, pointers, {"columns": "i32", "words": "i32"}, {"WORDS": c["words"]}, capability, c["warps"],
                      loops=True)
        counted = any("POPC" in opcode for loop in built.loops for opcode in loop)
        yield row("compact", f"{kind} {c}", capability, built, c["warps"], kind=kind, counted=counted)


KERNELS = {"run16": run16, "vector_block": vector_block, "sparse_conv": sparse_conv, "compact": compact}


def row(kernel: str, case: str, capability: int, built, warps: int, **facts) -> dict:
    return {"kernel": kernel, "case": case, "capability": capability, "registers": built.registers, "stack": built.stack,
            "local": built.local,
            "shared": built.shared, "shared_limit": SHARED_LIMIT[capability], "threads": 32 * warps, "wgmma": "wgmma" in built.ptx,
            "cp_async": "cp.async" in built.ptx, **facts}


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in arguments[1:] or list(KERNELS):
        for line in KERNELS[name](arguments[0] == "all"):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
