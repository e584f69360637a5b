"""The card and the versions behind a page of benchmarks/gpu.py, and which kernel torch's SDPA picks on it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

import torch
from gpu_parts import Part
from torch.nn.attention import SDPBackend


def measure(part: Part) -> None:
    table = part.table("", ["what"])
    if part.device.cuda:
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        part.set(table, "card", {"what": card.name})
        part.set(
            table, "compute capability", {"what": f"{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors"}
        )
        part.set(table, "memory, GiB", {"what": f"{total / 2**30:.0f}, of which {free / 2**30:.0f} free"})
        part.set(table, "CUDA of torch", {"what": str(torch.version.cuda)})
        part.set(table, "cuDNN", {"what": str(torch.backends.cudnn.version())})
    part.set(table, "Python", {"what": platform.python_version()})
    for name in ("torch", "transformers", "triton", "diffusers"):
        try:
            part.set(table, name, {"what": importlib.metadata.version(name)})
        except importlib.metadata.PackageNotFoundError:
            part.set(table, name, {"what": "not installed"})
    compilers = [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))]
    part.set(table, "C compiler, which Triton asks for", {"what": ", ".join(compilers) or "none"})
    kernels(part)


def kernels(part: Part) -> None:
    """Torch's own choice (`_fused_sdp_choice`), by head size, dtype and what is asked."""
    table = part.table("The kernel that torch's SDPA picks", ["prefill", "prefill, mask", "one row", "one row, mask"])
    n = 128 if part.dry else 4096
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (64, 80, 128, 256):
            row = f"{str(dtype).removeprefix('torch.')}, head size {dim}, 32 heads on 8"
            cells = {}
            for name, queries in (("prefill", n), ("one row", 1)):
                cells[name] = choice(queries, n, dim, dtype, part.device.device, None)
                mask = torch.zeros(1, 1, queries, n, dtype=dtype, device=part.device.device)
                cells[f"{name}, mask"] = choice(queries, n, dim, dtype, part.device.device, mask)
            part.set(table, row, cells)


def choice(queries: int, keys: int, dim: int, dtype: torch.dtype, device: torch.device, mask: torch.Tensor | None) -> str:
    query = torch.randn(1, 32, queries, dim, dtype=dtype, device=device)
    key = torch.randn(1, 8, keys, dim, dtype=dtype, device=device)
    try:
        number = torch._fused_sdp_choice(query, key, key, mask, 0.0, queries > 1 and mask is None, scale=None, enable_gqa=True)
        return SDPBackend(number).name.lower().replace("_", " ")
    except Exception as error:  # a private function
        return type(error).__name__
