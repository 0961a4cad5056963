"""What a run tells machines: logs, metrics, signs of life, and where the time of a step goes."""
