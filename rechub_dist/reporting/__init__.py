"""Reporting of a run: progress, records, logs, Prometheus metrics, heartbeats and step time profiles."""
