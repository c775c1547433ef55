"""Compiles the kernels for real GPUs and prints one JSON line per configuration (started by test_compile.py, without TRITON_INTERPRET).

Usage: python -m tests.kernels.aot default|all [kernel [capability]]

`all` is every combination that `launch` can ask for, except that the code without an epilogue, which is part of the code with one, is
compiled for the least and the most shares only.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator

from .compiling import SHARED_LIMIT, build

CAPABILITIES = (80, 90, 100)
TYPES = ("bf16", "fp16", "fp32")
FULL_EPILOGUE = {"HAS_SCALE": True, "HAS_BIAS": True, "HAS_RESIDUAL": True, "ACTIVATION": "gelu"}
NO_EPILOGUE = {"HAS_SCALE": False, "HAS_BIAS": False, "HAS_RESIDUAL": False, "ACTIVATION": "none"}
EPILOGUES = {"full": FULL_EPILOGUE, "none": NO_EPILOGUE}


def epilogues(splits: int, all_splits: tuple[int, ...]) -> Iterable[str]:
    return EPILOGUES if splits in (all_splits[0], all_splits[-1]) else ("full",)


def precisions(kind: str) -> tuple[str, ...]:
    return ("ieee", "tf32") if kind == "fp32" else ("ieee",)


def run16(full: bool) -> Iterator[dict]:
    from kernels.run16.triton import CONFIGS, KINDS, SPLITS, registers_for, run16_kernel

    few = {"warps": 4, "splits": 2}
    # float16 with eight columns on sm_100 is where ptxas spills when it is left alone; what two_four adds to float16 may be float32.
    chosen = [(0, 0, 1, few, False, "full", "bf16", c) for c in CAPABILITIES]
    chosen += [(1, 0, 8, few, False, "full", "fp16", c) for c in (90, 100)] + [(1, 0, 8, CONFIGS[0], False, "full", "fp16", 80)]
    chosen += [(0, 1, 1, few, False, "full", "bf16", 90), (2, 1, 4, CONFIGS[0], False, "full", "fp32", 90),
               (0, 1, 1, {"warps": 8, "splits": 8}, True, "none", "bf16", 90), (2, 0, 8, {"warps": 8, "splits": 4}, True, "full", "fp32", 90),
               (1, 1, 8, CONFIGS[0], False, "full", "fp32", 100)]
    every = ((kind, coding, batch, config, wide, ending, of_type, capability)
             for kind, coding, batch, config, wide in itertools.product(range(len(KINDS)), range(2), (1, 2, 4, 8), CONFIGS, (False, True))
             for ending in epilogues(config["splits"], SPLITS)
             for of_type in ({TYPES[kind]} | ({"fp32"} if ending == "full" and kind == 1 and coding == 1 else set()))
             for capability in CAPABILITIES)
    for kind, coding, batch, config, wide, ending, of_type, capability in every if full else chosen:
        word = ("*fp32" if kind == 2 else "*i16") if batch == 1 else "*i64"
        stored = "*" + TYPES[kind]
        pointers = {"x": word, "values": "*i64", "start": "*i32" if wide else "*i16", "gaps": "*i64", "perm": "*i32", "slice_ptr": "*i32",
                    "y": stored, "scale": stored, "bias": stored, "residual": "*" + of_type, "partial": "*fp32", "counter": "*i32"}
        constants = {"NP": batch, "KIND": kind, "CODING": coding, "WIDE": wide, "WARPS": config["warps"], "SPLITS": config["splits"],
                     **EPILOGUES[ending]}
        # Up to eight columns of x are one chunk, and Triton compiles a kernel of its own for an integer that is 1.
        sizes = ("rows", "columns", "batch", *(("chunks",) if batch == 8 else ()))
        constants |= {} if "chunks" in sizes else {"chunks": 1}
        built = build(run16_kernel, pointers, dict.fromkeys(sizes, "i32"), constants, capability, config["warps"], loops=batch == 1,
                      maxnreg=registers_for(batch))
        body = max((len(loop) for loop in built.loops), default=0)
        facts = {"per_nonzero": body / 16 if batch == 1 and not wide else None, "coding": coding, "kind": TYPES[kind], "wide": wide}
        case = f"{TYPES[kind]} residual {of_type} coding {coding} N {batch} {config} wide {wide}"
        yield row("run16", case, capability, built, config["warps"], config["splits"], ending, **facts)


def vector_block(full: bool) -> Iterator[dict]:
    from kernels.vector_block.triton import CONFIGS, SPLITS, registers_for, vector_block_kernel, warps_for

    def config(height: int, width: int, splits: int) -> dict:
        return {"height": height, "step": 64, "width": width, "splits": splits, "warps": warps_for(height, width)}

    chosen = [("bf16", config(64, width, 1), "ieee", "full", 90) for width in (16, 32, 64, 128)]
    chosen += [("bf16", config(64, 128, 1), "ieee", "full", capability) for capability in (80, 100)]
    chosen += [("fp32", config(64, 16, 1), "ieee", "full", 90), ("fp16", config(16, 16, 8), "ieee", "none", 90),
               ("fp32", config(32, 32, 2), "tf32", "full", 90), ("bf16", config(128, 64, 16), "ieee", "full", 90),
               ("fp32", config(128, 32, 4), "tf32", "full", 80), ("fp32", config(64, 32, 4), "tf32", "full", 100)]
    every = ((kind, c, precision, ending, capability) for kind, c in itertools.product(TYPES, CONFIGS)
             for precision in precisions(kind) for ending in epilogues(c["splits"], SPLITS) for capability in CAPABILITIES
             if kind != "fp32" or c["width"] <= 32)
    for kind, c, precision, ending, capability in every if full else chosen:
        c = {**c, "step": 32} if kind == "fp32" else c
        of_type = "*" + kind
        pointers = {"x": of_type, "values": of_type, "kept": "*i32", "step_ptr": "*i32", "order": "*i32", "y": of_type, "scale": of_type,
                    "bias": of_type, "residual": of_type, "partial": "*fp32", "counter": "*i32"}
        scalars = dict.fromkeys(("rows", "batch", "blocks", "x_stride", *(("tiles",) if c["width"] > 16 else ())), "i32")
        constants = {"V": c["height"], "STEP": c["step"], "BN": c["width"], "SPLITS": c["splits"], "STAGES": 3, "PRECISION": precision,
                     "WIDEN": False, **EPILOGUES[ending]}
        constants |= {} if "tiles" in scalars else {"tiles": 1}
        built = build(vector_block_kernel, pointers, scalars, constants, capability, c["warps"], aligned=("x_stride",),
                      maxnreg=registers_for(c["height"], c["width"]))
        yield row("vector_block", f"{kind} {c}", capability, built, c["warps"], c["splits"], ending, precision, kind=kind, height=c["height"])


def sparse_conv(full: bool) -> Iterator[dict]:
    from kernels.sparse_conv.triton import CONFIGS, SPLITS, registers_for, sparse_conv_kernel, tile_for, warps_for

    def config(height: int, pixels: int, group: int, splits: int) -> dict:
        return {"height": height, "step": 64, "pixels": pixels, "group": group, "splits": splits}

    # A network's last layer may have any number of channels.
    shapes = {"aligned": (("rows",), {}), "any": ((), {}), "one block": ((), {"blocks": 1})}
    chosen = [("bf16", config(64, 128, 16, 1), "ieee", "full", shape, capability) for shape in shapes for capability in CAPABILITIES]
    chosen += [("fp16", config(64, 64, 1, 4), "ieee", "full", shape, 90) for shape in shapes]
    chosen += [("fp32", config(16, 64, 8, 2), "tf32", "none", "any", 90),
               ("fp32", config(64, 64, 16, 2), "tf32", "full", "any", 100), ("bf16", config(32, 128, 8, 8), "ieee", "full", "any", 90),
               ("bf16", config(128, 64, 16, 16), "ieee", "full", "any", 90), ("fp32", config(128, 64, 1, 8), "ieee", "full", "any", 100)]
    # where ptxas spilled with tiles of 64 pixels, that of Triton 3.6 with 32 as well
    chosen += [("fp32", config(128, 64, 1, 16), "ieee", "full", "any", capability) for capability in (80, 90)]
    # where it spilled when left alone, and with all registers
    chosen += [("fp16", config(32, 64, 16, 2), "ieee", "full", "any", 100)]
    chosen += [("fp32", config(32, 64, 1, 1), "ieee", "none", "any", 80)]
    every = ((kind, c, precision, ending, shape, capability) for kind, c in itertools.product(TYPES, CONFIGS)
             for precision in precisions(kind) for ending in epilogues(c["splits"], SPLITS) for shape in shapes for capability in CAPABILITIES
             if (kind != "fp32" or c["pixels"] == 64) and (shape == "any" or ending == "full" and c["splits"] in (SPLITS[0], SPLITS[-1])))
    for kind, c, precision, ending, shape, capability in every if full else chosen:
        itemsize = 4 if kind == "fp32" else 2
        pixels = tile_for(c["height"], c["group"], itemsize, precision, 1, 1) if kind == "fp32" else c["pixels"]
        c = {**c, "step": 128 // itemsize, "pixels": pixels, "warps": warps_for(c["height"], pixels, c["group"], itemsize)}
        of_type = "*" + kind
        pointers = {"x": of_type, "values": of_type, "kept": "*i32", "step_ptr": "*i32", "order": "*i32", "y": of_type, "scale": of_type,
                    "bias": of_type, "residual": of_type, "partial": "*fp32", "counter": "*i32"}
        aligned, blocks = shapes[shape]
        names = ("rows", "pixels", "blocks", "groups", "height", "width", "out_height", "out_width", "stride_h", "stride_w", "pad_h", "pad_w",
                 "dilation_h", "dilation_w")
        scalars = {name: "i32" for name in names if name not in blocks}
        constants = {"V": c["height"], "STEP": c["step"], "BP": c["pixels"], "G": c["group"], "SPLITS": c["splits"], "STAGES": 3,
                     "PRECISION": precision, "WIDEN": False, **EPILOGUES[ending], **blocks}
        built = build(sparse_conv_kernel, pointers, scalars, constants, capability, c["warps"], aligned=aligned,
                      maxnreg=registers_for(c["group"], c["splits"]))
        yield row("sparse_conv", f"{kind} {c} {shape}", capability, built, c["warps"], c["splits"], ending, precision, kind=kind,
                  height=c["height"])


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


def row(kernel: str, case: str, capability: int, built, warps: int, splits: int = 1, ending: str = "none", precision: str = "ieee", **facts) -> dict:
    return {"kernel": kernel, "case": f"{case} epilogue {ending} {precision}", "capability": capability, "splits": splits, "epilogue": ending,
            "precision": precision, "registers": built.registers, "stack": built.stack, "local": built.local, "shared": built.shared,
            "shared_limit": SHARED_LIMIT[capability], "threads": 32 * warps, "wgmma": "wgmma" in built.ptx, "cp_async": "cp.async" in built.ptx,
            "tf32": bool(re.search(r"[.:]tf32\b", built.ptx)), **facts}


def main(arguments: list[str]) -> None:
    global CAPABILITIES
    warnings.simplefilter("ignore")
    if len(arguments) > 2:
        CAPABILITIES = (int(arguments[2]),)
    for name in arguments[1:2] or list(KERNELS):
        for line in KERNELS[name](arguments[0] == "all"):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
