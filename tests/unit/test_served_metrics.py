"""What the metrics endpoint serves of a record."""

from __future__ import annotations

import socket
import urllib.request

import torch

from rechub_dist.reporting.device_memory import peak_memory
from rechub_dist.reporting.metrics import Metrics


def test_the_memory_of_a_gpu_is_served_by_rank() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = Metrics(port, 3, 4)
    values = {"loss": 0.5, "gpu_memory_allocated_bytes": 4e9, "gpu_memory_reserved_bytes": 5e9}
    metrics.record("train", 7, values)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    metrics.close()
    assert 'rechub_gpu_memory_peak_bytes{of="tensors",rank="3"} 4e+09' in text
    assert 'rechub_gpu_memory_peak_bytes{of="reserved",rank="3"} 5e+09' in text


def test_there_is_none_on_a_cpu() -> None:
    assert peak_memory(torch.device("cpu")) == {}
