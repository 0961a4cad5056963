"""Kubernetes' validation rules for names, labels, quantities, ports, images and numbers.

The patterns are those of its API server (k8s.io/apimachinery: util/validation, api/resource), and for images those of
github.com/distribution/reference, which the nodes use.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

INT32: Final = 2**31 - 1
MOST_PODS: Final = 100_000  # of an indexed Job
PORTS: Final = range(1024, 65536)  # lower ports may be reserved for root
CONFIG_MAP_BYTES: Final = 1024**2

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_QUALIFIED = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"

_QUANTITY = re.compile(
    r"(?P<number>(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+)))((?P<suffix>[KMGTPE]i|[numkMGTPE])|[eE](?P<exponent>(\+|-)?[0-9]{1,2}))?"
)
_UNITS = {suffix: Decimal(1000) ** power for power, suffix in enumerate("num", start=-3)} | {"": Decimal(1)}
_UNITS |= {suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", start=1)}
_UNITS |= {f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)}

_DOMAIN = r"[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?"
_HOST = rf"({_DOMAIN}(\.{_DOMAIN})*|\[[a-fA-F0-9:]+\])(:[0-9]+)?"
_COMPONENT = r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?P<name>({_HOST}/)?{_COMPONENT}(/{_COMPONENT})*)"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
    r"(@[A-Za-z][A-Za-z0-9]*([-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?"
)


def is_label_name(text: str) -> bool:
    """Whether this is a valid namespace name (RFC 1123 label)."""
    return len(text) <= 63 and re.fullmatch(_LABEL, text) is not None


def is_service_name(text: str) -> bool:
    """Whether this is a valid Service name: a namespace name that begins with a letter (RFC 1035 label)."""
    return is_label_name(text) and text[0].isalpha()


def is_object_name(text: str) -> bool:
    """Whether this is a valid name of a claim, Secret or ServiceAccount (RFC 1123 subdomain)."""
    return len(text) <= 253 and re.fullmatch(_SUBDOMAIN, text) is not None


def is_label_key(text: str) -> bool:
    """Whether this is a valid label key: `pool`, `example.com/pool`."""
    prefix, slash, name = text.rpartition("/")
    good = len(name) <= 63 and re.fullmatch(_QUALIFIED, name) is not None
    return good and (not slash or is_object_name(prefix))


def is_label_value(text: str) -> bool:
    """Whether this is a valid label value, possibly empty."""
    return not text or (len(text) <= 63 and re.fullmatch(_QUALIFIED, text) is not None)


def is_image(text: str) -> bool:
    """Whether this is a valid image reference. Only the registry host may have upper-case letters."""
    match = _IMAGE.fullmatch(text)
    return match is not None and len(match["name"]) <= 255


def quantity(text: str) -> Decimal | None:
    """The value of a quantity such as 500m, 4 or 16Gi; None if it is invalid or not above 0."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    scale = _UNITS[match["suffix"] or ""] * Decimal(10) ** int(match["exponent"] or 0)
    amount = Decimal(match["number"]) * scale
    return amount if amount > 0 else None
