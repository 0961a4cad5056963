"""What `gpu.py` measures, and how it is written down."""
