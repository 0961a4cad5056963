"""Secrets stay out of a run's configuration, which is written to files: they come from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from rechub_dist.errors import UserError
from rechub_dist.redaction import has_secret, redacted, secrets_in

# `{env: RECHUB_SECRET_NAME}` in place of an option's value. No other variables: a checkpoint of somebody else's may ask
# for any, and have them sent to any endpoint.
_REFERENCE: Final = "env"
_PREFIX: Final = "RECHUB_SECRET_"


def refuse_secrets(tree: Any, where: str) -> None:
    """Check that settings, as read from a file or an option, hold no secret; `where` names their source.

    Raises:
        UserError: they do; it names the key and not the secret.
    """
    for key, what in secrets_in(tree):
        name = key if what == "a secret" else "data.storage.options.NAME"
        raise UserError(
            f"{where}: {key} is {what}, which would be written to config.yaml, checkpoints and manifests: use the "
            f"variables of the store's own client, such as AWS_SECRET_ACCESS_KEY or AZURE_STORAGE_KEY, or a "
            f"variable of your own, {name}: {{{_REFERENCE}: {_PREFIX}...}}; pods get variables by --env-secret"
        )


def refuse_secret_value(key: str, value: Any, where: str) -> None:
    """As `refuse_secrets`, for the value of one dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    refuse_secrets(value, where)


def refuse_secret_address(address: str) -> None:
    """Check that an address holds neither a password nor an option that is a secret.

    Raises:
        UserError: it does; the message shows the address without it.
    """
    if has_secret(address):
        raise UserError(
            f"{redacted(address)}: an address with a secret, which files and messages would show: leave it out, and "
            f"use the variables of the store's own client, such as AWS_SECRET_ACCESS_KEY, or "
            f"data.storage.options.NAME: {{{_REFERENCE}: {_PREFIX}...}}"
        )


def from_environment(options: Mapping[str, Any]) -> dict[str, Any]:
    """A storage's options with `{env: RECHUB_SECRET_NAME}`, at any depth, replaced by the variable's value.

    Raises:
        UserError: there is no such variable, or its name begins otherwise.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and value.keys() == {_REFERENCE}:
            variable = str(value[_REFERENCE])
            if not variable.startswith(_PREFIX):
                raise UserError(
                    f"storage.options.{name} stands for the environment variable {variable}, but only those that begin "
                    f"with {_PREFIX} may be used; rename it"
                )
            if variable not in os.environ:
                raise UserError(
                    f"storage.options.{name} stands for the environment variable {variable}, which is not set; set it "
                    f"on all hosts"
                )
            found[name] = os.environ[variable]
        else:
            found[name] = from_environment(value) if isinstance(value, Mapping) else value
    return found
