"""What a trace of torch's profiler says, summed up."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rechub_dist.reporting.step_times import union

_WAITS = ("cudaStreamSync", "cudaDeviceSync", "cudaEventSync", "cudaMemcpyAsync", "cudaLaunchKernel", "aten::item")
_SHOWN = 18

Span = tuple[float, float]  # from, to; microseconds


def summary(events: Iterable[Mapping[str, Any]], steps: int, seconds: float) -> dict[str, Any]:
    """Times in ms a step, unless a name says otherwise; `overlapped_ms` is of all steps.

    Args:
        events: of a trace in Chrome's format.
        steps: that the trace holds.
        seconds: that they took.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    device = [event for event in whole if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    streams: dict[str, list[Span]] = defaultdict(list)
    for event in device:
        streams[str(event["args"].get("stream"))].append((event["ts"], event["ts"] + event["dur"]))
    busiest = max(streams, key=lambda stream: total(streams[stream]), default=None)
    compute = union(streams[busiest]) if busiest else []
    others = union(span for stream, spans in streams.items() if stream != busiest for span in spans)
    busy = total(union([*compute, *others]))
    host = [event for event in whole if event["name"].startswith(_WAITS) and event.get("cat") != "kernel"]
    kernels = _by_name(device)
    ranges = _by_name(event for event in whole if event.get("cat") == "user_annotation")
    operators = _by_name(event for event in whole if event.get("cat") == "cpu_op")
    return {
        "ms_per_step": round(1000 * seconds / steps, 3),
        "gpu_busy_share": round(busy / (1e6 * seconds), 3),
        "streams_ms": {stream: round(total(spans) / 1000 / steps, 3) for stream, spans in streams.items()},
        "overlapped_ms": round((total(compute) + total(others) - busy) / 1000, 3),
        "launches_per_step": round(len(device) / steps, 1),
        "host_calls_per_step": {name: round(n / steps, 1) for name, n in Counter(e["name"] for e in host).items()},
        "copies_per_step": {
            name: [round(len(times) / steps, 1), _ms(times, steps)]
            for name, times in kernels.items()
            if name.startswith("Memcpy")
        },
        "kernels": {name[:70]: _ms(times, steps) for name, times in _longest(kernels)},
        "ranges": {name[:60]: _ms(times, steps) for name, times in _longest(ranges)},
        "operators": {name: _ms(times, steps) for name, times in _longest(operators)},  # with those that they call
    }


def total(spans: Iterable[Span]) -> float:
    """Their length, added up."""
    return sum(ended - began for began, ended in spans)


def _by_name(events: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        found[" ".join(word for word in event["name"].split() if not word.isdigit())].append(event["dur"])
    return found


def _longest(found: Mapping[str, list[float]]) -> list[tuple[str, list[float]]]:
    return sorted(found.items(), key=lambda item: -sum(item[1]))[:_SHOWN]


def _ms(times: list[float], steps: int) -> float:
    return round(sum(times) / 1000 / steps, 4)
