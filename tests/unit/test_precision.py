"""How a model computes in training, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rechub_dist.assembly.precision import check_precision, set_training, tf32_products
from rechub_dist.config import TrainConfig
from rechub_dist.embedded import Embedded
from rechub_dist.errors import UserError
from rechub_dist.models import Model, RecallModel, catalogue
from rechub_tests.cases import build, make_batch, real

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = TrainConfig(precision="bf16")


def single(embedded: Embedded) -> Embedded:
    """The batch in float32."""

    def leaf(values: Tensor) -> Tensor:
        return values.detach().float().requires_grad_()

    return Embedded(
        {name: leaf(values) for name, values in embedded.vectors.items()},
        {name: found._replace(values=leaf(found.values)) for name, found in embedded.sequences.items()},
        {name: values.float() for name, values in embedded.dense.items()},
    )


def case(name: str, config: TrainConfig) -> tuple[Model, Embedded]:
    model = build(catalogue()[name]).float()
    set_training(model, config, "cpu")
    return model, single(make_batch(model, 12))


@pytest.mark.parametrize("name", catalogue())
def test_training_in_bf16_gives_float32_near_that_of_float32(name: str) -> None:
    plain, batch = case(name, TrainConfig())
    model, _ = case(name, BF16)
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, output = real(plain(batch)), real(model(batch))
    assert expected.keys() == output.keys()
    for key, value in output.items():
        assert value.dtype == torch.float32
        assert (value - expected[key]).norm() < 0.05 * max(1.0, float(expected[key].norm())), key
    sum(value.sum() for value in output.values()).backward()  # type: ignore[union-attr]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert {buffer.dtype for buffer in model.buffers()} == {buffer.dtype for buffer in plain.buffers()}
    model.load_state_dict(plain.state_dict())
    assert_the_same_in_evaluation(model.eval(), plain.eval(), batch)


def assert_the_same_in_evaluation(model: Model, plain: Model, batch: Embedded) -> None:
    outputs = [real(model(batch)), real(plain(batch))]
    if isinstance(model, RecallModel) and isinstance(plain, RecallModel):
        for found, recall in zip(outputs, (model, plain), strict=True):
            found |= {"as user": recall.user(batch)[0], "as item": recall.item(batch)}
    for key, value in outputs[0].items():
        assert torch.equal(value, outputs[1][key]), key


def test_bf16_is_what_is_computed_in() -> None:
    seen = []
    model, batch = case("DeepFM", BF16)
    for child in model.modules():
        if isinstance(child, nn.Linear):
            child.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    model(batch)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    model.eval()(batch)
    assert set(seen) == {torch.float32}


def test_statistics_of_a_batch_are_in_float32() -> None:
    seen = []
    model, batch = case("DIN", BF16)  # with Dice
    norms = [child for child in model.modules() if isinstance(child, nn.BatchNorm1d)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    model(batch)
    assert seen == [torch.float32] * len(seen)
    assert len(seen) >= len(norms) > 0


def test_without_a_setting_a_model_is_left_alone() -> None:
    model = build(catalogue()["DSSM"])
    set_training(model, TrainConfig(tf32=True), "cpu")
    assert not {"forward", "item"} & vars(model).keys()


def test_tf32_is_on_within_alone() -> None:
    before = torch.get_float32_matmul_precision()
    for on, within in ((False, before), (True, "high")):
        with tf32_products(on):
            assert torch.get_float32_matmul_precision() == within
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("settings", "device", "capability", "told"),
    [
        ({"tf32": True}, CPU, None, "train.tf32: only GPUs multiply in TF32, and this run is on cpu; leave it out"),
        ({"tf32": True}, CUDA, (7, 5), "train.tf32 needs a GPU of compute capability 8.0 .* A card has 7.5; leave it"),
        ({"precision": "bf16"}, CUDA, (7, 0), "train.precision: bf16 needs a GPU .* A card has 7.0; leave it out"),
        ({"tf32": True, "precision": "bf16"}, CUDA, (8, 0), None),
        ({"precision": "bf16"}, CPU, None, None),
        ({}, CUDA, (7, 0), None),
    ],
)
def test_what_a_device_has_no_use_of_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    device: torch.device,
    capability: tuple[int, int] | None,
    told: str | None,
) -> None:
    # what a driver would say of a card that is not here
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A card")
    if told is None:
        check_precision(TrainConfig(**settings), device)
    else:
        with pytest.raises(UserError, match=told):
            check_precision(TrainConfig(**settings), device)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train.compile: this host lacks a C\+\+ compiler \(no-such-compiler\)"):
        check_precision(TrainConfig(compile=True), CPU)
