"""Packaging metadata. `pip install -e .` from a checkout is the main way to install.

A built wheel carries `kernels` and `models` as `compress.kernels` and `compress.models`: both names are generic, and a wheel with
top-level packages of that name could overwrite the files of another distribution. An editable install only points at this folder, so
there the top-level names are kept.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
EDITABLE = "editable_wheel" in sys.argv or "develop" in sys.argv
COMPRESS = find_packages(str(ROOT), include=["compress", "compress.*"])
SIBLINGS = find_packages(str(ROOT), include=["kernels", "kernels.*", "models", "models.*"])

if EDITABLE:
    layout = {"packages": COMPRESS + SIBLINGS}
else:
    layout = {
        "packages": COMPRESS + [f"compress.{name}" for name in SIBLINGS],
        "package_dir": {"compress": "compress", "compress.kernels": "kernels", "compress.models": "models"},
    }

EXPORT = ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.18"]

setup(
    name="compress-toolkit",
    version="0.1.0",
    description="Structured and low-rank compression of trained PyTorch networks, with sparse kernels and a proof of what it cost",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "scipy>=1.11",
        "tensorly>=0.9",
        "pydantic>=2.6",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
    ],
    extras_require={
        "export": EXPORT,
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "curvlinops-for-pytorch==3.0.1", "nngeometry>=0.4", *EXPORT],
        "bench": ["torch-pruning==1.6.1"],
    },
    package_data={"": ["*.jinja", "*.css", "*.c"]},
    entry_points={"console_scripts": ["compress-prune=compress.cli:main"]},
    **layout,
)
