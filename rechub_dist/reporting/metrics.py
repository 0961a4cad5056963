"""Prometheus metrics of a rank, at http://HOST:PORT/metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, start_http_server

from rechub_dist.errors import UserError
from rechub_dist.reporting.device_memory import ALLOCATED, RESERVED
from rechub_dist.reporting.step_times import PARTS


class Metrics:
    """Serves the run's records from a thread, until `close`.

    Every metric has the label `rank`. Process metrics are included: resident memory, CPU seconds, open files.

    Args:
        port: 0 for any free port.
        rank: of this process.
        world_size: ranks of the run.
        address: of this host, to listen on; 0.0.0.0 for all.

    Raises:
        UserError: the port is in use, or the address is not this host's.
    """

    def __init__(self, port: int, rank: int, world_size: int, address: str = "127.0.0.1") -> None:
        self._registry = CollectorRegistry()
        self._rank = str(rank)
        ProcessCollector(registry=self._registry)
        self._step = self._gauge("rechub_step", "Training steps completed")
        self._loss = self._gauge("rechub_loss", "Mean loss over all ranks since the previous record")
        self._rate = self._gauge("rechub_samples_per_second", "Training rows per second over all ranks")
        self._learning_rate = self._gauge("rechub_learning_rate", "Learning rate of the dense parameters")
        self._memory = self._gauge(
            "rechub_gpu_memory_peak_bytes",
            "Peak GPU memory since the previous record: of tensors, and reserved by torch",
            "of",
        )
        self._saved = 0.0
        age = self._gauge("rechub_checkpoint_age_seconds", "Time since the last checkpoint, or since the start")
        began = time.time()
        age.labels(self._rank).set_function(lambda: time.time() - (self._saved or began))
        self._checkpoint = self._gauge("rechub_checkpoint_step", "Step of the last checkpoint")
        ranks = self._gauge("rechub_world_size", "World size of the run")
        ranks.labels(self._rank).set(world_size)
        self._parts = self._gauge("rechub_step_seconds", "Time of the last profiled step, by part", "part")
        self._evaluation = self._gauge("rechub_evaluation", "Metrics of the last evaluation", "split", "metric")
        self._skipped = Counter("rechub_rows_skipped", "Rows skipped", ["rank"], registry=self._registry)
        self._skipped.labels(self._rank)
        try:
            self._server = start_http_server(port, address, registry=self._registry)[0]
        except (OSError, OverflowError) as error:
            raise UserError(
                f"monitor.metrics_port: rank {rank} cannot listen on port {port} of {address}: {error}; set another "
                f"one, followed by enough free ports for all ranks of a host, and as monitor.metrics_address one of "
                f"this host's addresses"
            ) from error

    def record(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Update the metrics from a record of `metrics.jsonl`."""
        if split == "train":
            self._step.labels(self._rank).set(step)
            for gauge, name in (
                (self._loss, "loss"),
                (self._rate, "samples_per_second"),
                (self._learning_rate, "learning_rate"),
            ):
                if name in values:
                    gauge.labels(self._rank).set(values[name])
            for of, name in (("tensors", ALLOCATED), ("reserved", RESERVED)):
                if name in values:
                    self._memory.labels(self._rank, of).set(values[name])
        elif split == "time":
            for part in PARTS:
                self._parts.labels(self._rank, part).set(values[part])
        elif split == "checkpoint":
            self._saved = time.time()
            self._checkpoint.labels(self._rank).set(step)
        elif split == "rows":
            self._skipped.labels(self._rank).inc(values["rows_skipped"])
        else:
            for name, value in values.items():
                self._evaluation.labels(self._rank, split, name).set(value)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(name, help_text, ["rank", *labels], registry=self._registry)
