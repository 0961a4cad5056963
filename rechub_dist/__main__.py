"""`python -m rechub_dist`, so that `torchrun ... -m rechub_dist train RUN.yaml` works."""

from rechub_dist.cli.main import main

main()
