"""The mistakes of `benchmarks/mistakes.py`, by what is mistaken."""
