"""Images in files, decoded by DataLoader workers, and the check that is made of all files before training starts.

A worker decodes, scales the shorter side to S pixels and cuts out the middle S x S; cropping, mirroring and normalisation follow on the
device as for every data set. Nothing random happens in a worker, so that neither their number nor their order matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from compress.data.split import Split
from compress.data.transforms import Transform, channel_statistics
from compress.errors import RunError, UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096
_STATISTICS_IMAGES = 1000
_DECODING_ERRORS = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)


def decode_image(path: Path, side: int) -> Tensor:
    """The image as RGB [3, side, side] uint8: shorter side scaled to `side`, middle cut out; raises what the decoder raises."""
    with Image.open(path) as image:
        return pil_to_tensor(center_crop(resize(image.convert("RGB"), side), side))


def _fault(path: Path) -> str | None:
    """Why `path` is no whole image. The header is read always, all pixels only where the format's end mark is not near the end."""
    try:
        size = path.stat().st_size
        if size == 0:
            return f"The image {path} is empty"
        with Image.open(path) as image:
            mark = _ENDS.get(image.format or "")
        if mark is not None:
            with open(path, "rb") as file:
                file.seek(max(0, size - _TAIL_BYTES))
                if mark in file.read():
                    return None
        with Image.open(path) as image:
            image.load()
    except _DECODING_ERRORS as error:
        return f"The image {path} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def check_images(paths: list[Path], threads: int) -> None:
    """Raise `UserError` naming the first image that is empty, has no valid header, or is cut off.

    One header and one tail are read per file, so that the time grows with the number of files and not with their size; formats other than
    JPEG and PNG are decoded. Damage in the middle of a compressed image is found when it is decoded (`RunError`).
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for fault in pool.map(_fault, paths, chunksize=64):
            if fault is not None:
                raise UserError(f"{fault}; replace or remove it.")


def measured_statistics(paths: list[Path], side: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of at most 1,000 images, evenly spaced over `paths`, at the size they are trained at."""
    every = max(1, -(-len(paths) // _STATISTICS_IMAGES))
    images = []
    for path in paths[::every]:
        try:
            images.append(decode_image(path, side))
        except _DECODING_ERRORS as error:
            raise UserError(f"The image {path} cannot be read ({error}); replace or remove it.") from error
    return channel_statistics(torch.stack(images))


class _Files(Dataset):
    """Decoded images by row; a file that cannot be decoded gives the reason instead, as an exception would lose its one sentence."""

    def __init__(self, paths: list[Path], side: int) -> None:
        self.paths, self.side = paths, side

    def __getitem__(self, row: int) -> Tensor | str:
        try:
            return decode_image(self.paths[row], self.side)
        except _DECODING_ERRORS as error:
            return f"The image {self.paths[row]} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})."


def _stack(items: list[Tensor | str]) -> Tensor | str:
    return next((item for item in items if isinstance(item, str)), None) or torch.stack(items)


class FolderSplit(Split):
    """A split whose images lie in files: `paths` and `labels` [n], scaled to `side`, decoded by `workers` processes."""

    def __init__(self, paths: list[Path], labels: Tensor, transform: Transform, device: torch.device, side: int, workers: int) -> None:
        super().__init__(labels, transform, device)
        self.paths, self.side, self.workers = paths, side, workers

    def fetch(self, chunks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        filled = [chunk for chunk in chunks if len(chunk) > 0]
        loader = DataLoader(
            _Files(self.paths, self.side),
            batch_sampler=[chunk.tolist() for chunk in filled],
            num_workers=min(self.workers, len(filled)),
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        stacks = iter(loader)
        try:
            for chunk in chunks:
                images = next(stacks) if len(chunk) > 0 else torch.empty(0, 3, self.side, self.side, dtype=torch.uint8)
                if isinstance(images, str):
                    raise RunError(images)
                yield images.to(self.device, non_blocking=True), self.labels[chunk].to(self.device, non_blocking=True)
        finally:
            # Ends the workers now: a traceback may hold this frame for long.
            del stacks

    def subset(self, rows: Tensor) -> FolderSplit:
        paths = [self.paths[row] for row in rows.tolist()]
        return FolderSplit(paths, self.labels[rows], self.transform, self.device, self.side, self.workers)
