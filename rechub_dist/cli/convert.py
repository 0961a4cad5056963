"""The commands `rechub-dist convert ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rechub_dist.cli.entry import Overrides
from rechub_dist.distributed.process import quiet_libraries

convert_app = typer.Typer(no_args_is_help=True, help="Make a run's checkpoint from weights trained by something else.")


@convert_app.command("torch-rechub")
def torch_rechub(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS.pth", help="What torch.save(model.state_dict()) wrote.")],
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run whose model has these weights.")],
    out: Annotated[Path, typer.Option(help="The run's output folder, for a checkpoint of step 0.")],
    set_: Overrides = None,
) -> None:
    """Make a checkpoint of weights of torch-rechub 0.9.0, for evaluate, predict, export and warm starts.

    Models whose mathematics is not the same are refused, with the reason; docs/convert.md has the list.

    Example: rechub-dist convert torch-rechub model.pth run.yaml --out runs/converted
    """
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415 - slow to import
    from rechub_dist.inference.convert import convert  # noqa: PLC0415

    quiet_libraries()
    config = load_run(run, [*(set_ or []), f"output_dir={out}", "checkpoint.folder=null"])
    convert(weights, config)
    print(f"{out}: {config.model.name} with the weights of {weights}, as a checkpoint of step 0")
