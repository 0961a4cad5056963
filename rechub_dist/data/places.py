"""All files and folders that the ranks of a run open, by the keys that name them."""

from __future__ import annotations

from rechub_dist.config import RunConfig
from rechub_dist.config.locations import Location, with_locations
from rechub_dist.data.parquet.storage import join


def places(config: RunConfig) -> list[Location]:
    """The places of a run, by the addresses that a rank opens; the checkpoints' folder also where it is the default.

    Neither the schema's file, which is read before there are ranks, nor code, of which only a host's Python knows
    where it is found.
    """
    found: list[Location] = []

    def note(place: Location) -> str:
        address = join(config.data.root, place.address) if place.below_root else place.address
        found.append(place._replace(address=address))
        return place.address

    with_locations(config, note)
    unread = {"code"} if config.data.mix is None else {"code", "data.train", "data.train.path"}
    if config.checkpoint.folder is None:
        found.append(Location("checkpoint.folder", config.checkpoint_folder, written=True))
    return [place for place in found if place.key not in unread]
