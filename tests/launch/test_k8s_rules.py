"""Names, labels, quantities and images as Kubernetes has them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from rechub_dist.launching.kubernetes.rules import is_image, is_label_key, is_label_value, is_object_name, quantity

DIGEST = "@sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "image",
    [
        "x",
        "x:cpu",
        "library/x",
        "a__b/x-y.z_w--v:1.0_rc.1",
        "r.example/x:cpu",
        "ECR.Example.com/x:cpu",  # a host may have capitals
        "localhost:5000/x",
        "[fd00::1]:5000/team/x:1",
        f"r.example/x{DIGEST}",
        f"r.example/x:cpu{DIGEST}",
    ],
)
def test_images(image: str) -> None:
    assert is_image(image)


@pytest.mark.parametrize(
    "image",
    [
        "", "two words", "r.example//x:cpu", "r.example/", "/x", "r.example/x..y:cpu", "r.example/X:cpu", "X", "x:",
        "x:-a", f"x:{'a' * 129}", "x@sha256:12", "x___y", "-x", "x/", "r_.example:5000/x", "https://r.example/x",
        f"r.example/{'a' * 255}", "x\n",
    ],
)  # fmt: skip
def test_what_is_no_image(image: str) -> None:
    assert not is_image(image)


def test_labels() -> None:
    assert all(map(is_label_key, ["pool", "Pool_1.a", "example.com/pool", "k8s.io/" + "a" * 63]))
    bad = ["", "my label", "-pool/", "-pool/a", "/a", "a/b/c", "pool-", "Example.com/a", "a" * 64, "a" * 254 + "/b"]
    assert not any(map(is_label_key, bad))
    assert all(map(is_label_value, ["", "ok", "A.b_c-d", "v" * 63]))
    assert not any(map(is_label_value, ["ok!", "x y", "-a", "a.", "v" * 64]))


def test_names_of_objects() -> None:
    assert all(map(is_object_name, ["runs", "runs.of-2024", "7", "a" * 253]))
    assert not any(map(is_object_name, ["", "Runs", "my_claim", "a..b", "-a", "a.", "a" * 254]))


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4", "4"), ("500m", "0.5"), ("1.5", "1.5"), (".5", "0.5"), ("4.", "4"), ("+2", "2"), ("2k", "2000"),
        ("16Gi", str(16 * 2**30)), ("16G", "16e9"), ("1e9", "1e9"), ("1E", "1e18"), ("1E3", "1000"), ("5E-1", "0.5"),
        ("3Ki", "3072"), ("250u", "0.00025"), ("7n", "7e-9"),
    ],
)  # fmt: skip
def test_quantities(text: str, amount: str) -> None:
    assert quantity(text) == Decimal(amount)


@pytest.mark.parametrize("text", ["", "0", "0.0Gi", "-1", "8 GB", "8GB", "8K", "8gi", "Gi", ".", "1e", "1e9Gi", "4\n"])
def test_what_is_no_quantity_above_0(text: str) -> None:
    assert quantity(text) is None
