"""`python -m rechub_dist`, for `torchrun ... -m rechub_dist train RUN.yaml`."""

from rechub_dist.cli.main import main

main()
