"""How much memory of its GPU a rank takes."""

from __future__ import annotations

import torch

ALLOCATED, RESERVED = "gpu_memory_allocated_bytes", "gpu_memory_reserved_bytes"


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most bytes that tensors took, and that torch held for them, since the last call; nothing on CPU.

    No wait for the device. What else takes memory there, NCCL's buffers for one, is in neither.
    """
    if device.type != "cuda":
        return {}
    found = {
        ALLOCATED: float(torch.cuda.max_memory_allocated(device)),
        RESERVED: float(torch.cuda.max_memory_reserved(device)),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found
