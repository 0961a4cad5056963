"""GPU memory used by a rank."""

from __future__ import annotations

import torch

ALLOCATED, RESERVED = "gpu_memory_allocated_bytes", "gpu_memory_reserved_bytes"


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak bytes allocated for tensors, and reserved by torch's allocator, since the last call; empty on CPU.

    Does not synchronise with the device. Memory outside torch's allocator, such as NCCL's buffers, is not included.
    """
    if device.type != "cuda":
        return {}
    found = {
        ALLOCATED: float(torch.cuda.max_memory_allocated(device)),
        RESERVED: float(torch.cuda.max_memory_reserved(device)),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found
