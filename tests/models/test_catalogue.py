"""What holds for every model, found by listing the folders."""

from __future__ import annotations

import copy
import inspect
import typing

import pytest
import torch

import rechub_dist.models
from rechub_dist.embedded import Embedded
from rechub_dist.features import Feature, SequenceFeature, SparseFeature
from rechub_dist.models import FAMILIES, Model, RecallModel, catalogue
from rechub_dist.models import family as family_of
from rechub_tests.cases import build, loss_of, make_batch, pad_with, real, row_of, vectors_of

MODELS = catalogue()
BATCHES = {"several": None, "one": [3], "empty histories": [0, 0, 0], "one empty": [0], "none": []}

# The public constructors: parameters by position.
SPECIFICATION = {
    "dssm": "user_features item_features hidden_units dropout_rates embedding_dim",
    "facebookdssm": "user_features item_features hidden_units num_tasks task_types",
    "youtubednn": "user_features item_features hidden_units embedding_dim max_seq_len",
    "gru4rec": "item_num hidden_size num_layers dropout_rate embedding_dim",
    "narm": "item_num hidden_size attention_size dropout_rate embedding_dim",
    "sasrec": "item_num max_len num_heads num_layers hidden_size dropout_rate",
    "mind": "item_num num_interests routing_iterations hidden_size embedding_dim",
    "widedeep": "wide_features deep_features hidden_units dropout_rates",
    "deepfm": "features hidden_units dropout_rates embedding_dim",
    "dcn": "features cross_num hidden_units",
    "dcnv2": "features cross_num hidden_units cross_parameterization",
    "afm": "features attention_units embedding_dim dropout_rate",
    "fibinet": "features bilinear_type hidden_units reduction_ratio",
    "din": "features behavior_features attention_units hidden_units activation",
    "dien": "features behavior_features interest_units gru_type hidden_units",
    "bst": "features behavior_features num_heads num_layers hidden_size dropout_rate",
    "edcn": "features cross_num hidden_units gate_type",
    "sharedbottom": "features hidden_units task_hidden_units num_tasks task_types",
    "esmm": "features hidden_units tower_units embedding_dim",
    "mmoe": "features expert_units num_experts num_tasks expert_activation gate_activation",
    "ple": "features expert_units num_experts num_layers num_shared_experts task_types",
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return build(MODELS[request.param])


def batch_of(model: Model, kind: str) -> Embedded:
    lengths = [5, 0, 3, 1, 2, 4] if BATCHES[kind] is None else BATCHES[kind]
    return make_batch(model, len(lengths), lengths=lengths)


@pytest.mark.parametrize("name", MODELS)
def test_the_constructor_is_the_specification(name: str) -> None:
    parameters = list(inspect.signature(MODELS[name].__init__).parameters.values())[1:]
    hints = typing.get_type_hints(MODELS[name].__init__)
    first = SPECIFICATION.get(name.lower(), "").split()
    assert [p.name for p in parameters[: len(first)]] == first
    if first:
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[: len(first)])
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(first) :])
    for parameter in parameters:
        if parameter.name.endswith("features"):
            lists = (list[Feature], list[SequenceFeature], list[SparseFeature])
            assert hints[parameter.name] in (*lists, *(kind | None for kind in lists))
    table_width = MODELS[name].table_width
    assert table_width is None or table_width in hints
    assert MODELS[name].paper


@pytest.mark.parametrize("name", MODELS)
def test_models_are_found_by_name(name: str) -> None:
    assert getattr(rechub_dist.models, name) is MODELS[name]
    assert family_of(MODELS[name]) in FAMILIES
    assert MODELS[name].__module__.split(".")[-1] == name.lower()
    assert issubclass(MODELS[name], RecallModel) == (family_of(MODELS[name]) == "recall")


def test_a_wrong_name_is_no_model() -> None:
    with pytest.raises(AttributeError, match="DeepFN"):
        _ = rechub_dist.models.DeepFN


def test_lookups_are_distinct_and_sized(model: Model) -> None:
    lookups = model.lookups()
    assert len({lookup.name for lookup in lookups}) == len(lookups)
    shapes: dict[str, tuple[int, int]] = {}
    for lookup in lookups:
        shape = lookup.table.rows, lookup.dim
        assert shapes.setdefault(lookup.table.name, shape) == shape
        assert lookup.name in (lookup.feature.name, f"{lookup.feature.name}.linear")


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("training", [True, False])
def test_shapes(model: Model, kind: str, training: bool) -> None:
    embedded = batch_of(model, kind)
    rows = len(BATCHES[kind] or range(6)) if kind != "none" else 0
    output = model.train(training)(embedded)
    if isinstance(model, RecallModel):
        user, mask = model.user(embedded)
        item = model.item(embedded)
        assert user.shape[0] == mask.shape[0] == item.shape[0] == rows
        assert user.shape[:2] == mask.shape
        assert user.shape[2] == item.shape[1]
        assert mask.dtype == torch.bool
        assert mask.any(dim=1).all()
        assert user.isfinite().all()
        assert output.user.shape[:2] == output.user_mask.shape
        assert output.user.shape[:2] == output.item.shape[:2]
        assert output.item.shape[2] == user.shape[2]
        states = output.user[output.user_mask]  # of all interests side by side with MIND's readout "max"
        assert model.score(states, item).shape == (len(states), rows)
        if model.num_tasks:
            assert output.logits.shape == (rows, model.num_tasks)
    else:
        assert output.logits.shape[0] == rows
        assert output.logits.dim() == 2
    for value in real(output).values():
        assert value.isfinite().all()


@pytest.mark.parametrize("kind", BATCHES)
def test_every_parameter_gets_a_gradient(model: Model, kind: str) -> None:
    embedded = batch_of(model, kind)
    loss_of(model(embedded)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not in the graph"
        assert parameter.grad.isfinite().all(), f"{name} has a bad gradient"
        if kind == "several":
            assert parameter.grad.abs().sum() > 0, f"{name} has no say"
    for name, vectors in vectors_of(embedded).items():
        assert vectors.grad is not None, f"{name} is not in the graph"
        assert vectors.grad.isfinite().all(), f"{name} has a bad gradient"
        if kind == "several":
            assert vectors.grad.abs().sum() > 0, f"{name} is looked up and not used"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("more", [0, 1])
def test_padding_changes_nothing(model: Model, training: bool, more: int) -> None:
    embedded = batch_of(model, "several")
    other = copy.deepcopy(model).train(training)
    garbage = pad_with(embedded, 1e6, more)
    expected, actual = model.train(training)(embedded), other(garbage)
    torch.testing.assert_close(real(actual), real(expected))
    loss_of(expected).backward()
    loss_of(actual).backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(twin.grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    for name, (values, lengths, _) in garbage.sequences.items():
        assert not values.grad[torch.arange(values.shape[1]) >= lengths[:, None]].any(), f"{name}: padding is trained"
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))


def test_rows_are_independent_when_evaluated(model: Model) -> None:
    for _ in range(3):
        model.train()(make_batch(model, 6))  # moves running statistics off their start
    model.eval()
    embedded = batch_of(model, "several")
    together = model(embedded)
    for row in range(6):
        alone = row_of(embedded, row)
        single = model(alone)
        if together.logits is not None:
            torch.testing.assert_close(single.logits[0], together.logits[row])
        if together.user is not None:
            live = together.user_mask[row]
            torch.testing.assert_close(single.user[single.user_mask], together.user[row][live])
        if isinstance(model, RecallModel):
            torch.testing.assert_close(model.user(alone)[0][0], model.user(embedded)[0][row])
            torch.testing.assert_close(model.item(alone)[0], model.item(embedded)[row])


def test_a_forward_pass_leaves_its_input_alone(model: Model) -> None:
    embedded = batch_of(model, "several")
    before = {name: value.detach().clone() for name, value in (vectors_of(embedded) | embedded.dense).items()}
    model(embedded)
    torch.testing.assert_close({k: v.detach() for k, v in (vectors_of(embedded) | embedded.dense).items()}, before)


def test_items_need_their_own_lookups_only(model: Model) -> None:
    if not isinstance(model, RecallModel):
        pytest.skip("no item side")
    embedded = batch_of(model, "several")
    names = {lookup.name for lookup in model.item_lookups()}
    assert names
    assert set(model.item_lookups()) <= set(model.lookups())
    part = Embedded(
        {name: value for name, value in embedded.vectors.items() if name in names},
        {name: value for name, value in embedded.sequences.items() if name in names},
        {feature.name: embedded.dense[feature.name] for feature in model.item_dense_features()},
    )
    assert set(model.item_dense_features()) <= set(model.dense_features())
    torch.testing.assert_close(model.item(part), model.item(embedded))


def test_what_the_objective_needs_to_know(model: Model) -> None:
    if not isinstance(model, RecallModel):
        pytest.skip("trained on labels")
    assert model.objectives == ("retrieval",)
    assert model.loss in ("bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge")
    assert model.negatives in ("sampled", "in_batch", "in_batch_and_sampled", "full")
    assert model.margin > 0
    assert isinstance(model.item_lookups()[0].feature, SparseFeature)
    assert model.item_lookups()[0].feature.name == "item"
    assert model.history().name == "history"
    embedded = batch_of(model, "several")
    mask = embedded.sequences["history"].mask if model.every_position else torch.ones(6, 1, dtype=torch.bool)
    assert torch.equal(model(embedded).user_mask, mask)


def test_weights_survive_a_state_dict(model: Model) -> None:
    model.train()(batch_of(model, "several"))
    other = build(type(model), seed=1)
    other.load_state_dict(model.state_dict())
    embedded = batch_of(model, "several")
    torch.testing.assert_close(real(other.eval()(embedded)), real(model.eval()(embedded)), rtol=0, atol=0)
