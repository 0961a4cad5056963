"""Which releases of torch, torchrec and fbgemm match, and error messages if they do not.

fbgemm's operators are compiled for one release of torch, and torchrec is written for one of fbgemm. torchrec's metadata
names the CUDA build of fbgemm, without a version, so pip alone cannot install a matching set on a CPU machine. Imports
nothing heavy.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from rechub_dist.errors import UserError, nearest, one_line

TORCH: Final = "2.13.0"  # default of `make install` and pip
RELEASES: Final = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9"}  # torch -> torchrec and fbgemm
_FBGEMM: Final = ("fbgemm-gpu-cpu", "fbgemm-gpu")
_RAY: Final = "pip install 'ray[default,train]>=2.60'"


def versions() -> dict[str, str]:
    """The installed versions of torch, torchrec and fbgemm, by distribution name."""
    return {name: found for name in ("torch", "torchrec", *_FBGEMM) if (found := _version(name)) is not None}


def require_builds() -> None:
    """Check that torch, torchrec and fbgemm are installed and match. Reads metadata only, imports none of them.

    Raises:
        UserError: one is missing, two builds of fbgemm overwrite each other, or their releases do not match.
    """
    found = versions()
    torch = found.get("torch")
    if torch is None:
        if importlib.util.find_spec("torch") is not None:  # built from source: trust its owner
            return
        raise UserError(f"torch is not installed: pip install torch=={TORCH}, and then {_install(TORCH)}")
    wanted = RELEASES.get(_release(torch))
    if wanted is None:
        raise UserError(
            f"torch {torch}: no matching releases of torchrec and fbgemm are known; install one of "
            f"{', '.join(RELEASES)}: pip install torch=={TORCH}, and then {_install(TORCH)}"
        )
    if all(name in found for name in _FBGEMM):
        raise UserError(
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files: pip uninstall --yes "
            f"{' '.join(_FBGEMM)}, and then {_install(torch)}"
        )
    missing = [] if "torchrec" in found or _is_importable("torchrec") else ["torchrec"]
    if not any(name in found for name in _FBGEMM) and not _is_importable("fbgemm_gpu"):
        missing.append("fbgemm")
    if missing:
        raise UserError(f"{' and '.join(missing)}: not installed; for torch {torch}: {_install(torch)}")
    for name in ("torchrec", *_FBGEMM):
        if name in found and _release(found[name]) != wanted:
            raise UserError(
                f"{name} {found[name]} does not match torch {torch}, which needs {wanted}: {_install(torch)}"
            )


def what_is_missing(error: ImportError) -> UserError | None:
    """The installation mistake behind a failed import, as an error; None if it has another cause."""
    package = (error.name or "").partition(".")[0]
    if package == "ray":
        return UserError(f"ray is not installed: {_RAY}")
    if package in ("torch", "torchrec", "fbgemm_gpu"):
        try:
            require_builds()
        except UserError as mistake:
            return mistake
        return UserError(f"{package} is installed, but cannot be imported ({one_line(error)}): reinstall it")
    return None


def requirements(pyproject: Path, release: str, extras: list[str]) -> list[str]:
    """The requirements for pip to install the project under a release of torch, such as `2.14`.

    These are the dependencies and extras of pyproject.toml, and torchrec, which is installed with `--no-deps`. Pins of
    torch, torchrec and fbgemm that match the release are kept; others become the latest matching version.

    Raises:
        UserError: the release or an extra is unknown.
    """
    if release not in RELEASES:
        raise UserError(f"TORCH={release}: unknown release, write one of {', '.join(RELEASES)}")
    project = tomllib.loads(pyproject.read_text())["project"]
    optional = project["optional-dependencies"]
    for extra in extras:
        if extra not in optional:
            raise UserError(f"{extra}: no such extra, {nearest(extra, optional)}")
    chosen = [*project["dependencies"], *(need for extra in extras for need in _needs(extra, optional))]
    torchrec = [need for need in optional["cuda"] if need.startswith("torchrec==")]
    wanted = {"torch": release, **dict.fromkeys(("torchrec", *_FBGEMM), RELEASES[release])}
    found = []
    for need in dict.fromkeys(chosen + torchrec):
        name, _, pin = need.partition("==")
        other = name in wanted and _release(pin) != wanted[name]
        found.append(f"{name}=={wanted[name]}.*" if other else need)
    return found


def _needs(extra: str, optional: dict[str, list[str]]) -> list[str]:
    """What an extra needs, other extras of the project that it names included."""
    found = []
    for need in optional[extra]:
        if own := re.fullmatch(r"rechub-dist\[(.+)\]", need):
            found += [inner for name in own[1].split(",") for inner in _needs(name.strip(), optional)]
        else:
            found.append(need)
    return found


def _install(torch: str) -> str:
    """The commands that install what matches a release of torch."""
    wanted = RELEASES[_release(torch)]
    return (
        f"pip install 'fbgemm-gpu-cpu=={wanted}.*' && pip install --no-deps 'torchrec=={wanted}.*' (for GPUs instead: "
        f"pip install 'fbgemm-gpu=={wanted}.*' 'torchrec=={wanted}.*')"
    )


def _release(found: str) -> str:
    return ".".join(found.split(".")[:2])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":  # in a checkout, before anything is installed
    try:
        if len(sys.argv) != 3:
            raise UserError("write a release of torch, and extras: python -m rechub_dist.builds 2.14 cpu,ray")
        print("\n".join(requirements(Path("pyproject.toml"), sys.argv[1], sys.argv[2].split(","))))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
