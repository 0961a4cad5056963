"""Mistakes in a run file, or in what is set on the command line."""

from __future__ import annotations

from mistaken.scene import Scene, Section

RUN_FILES = Section("The run file")
mistake = RUN_FILES.mistake


@mistake("a run file that is not there")
def _(_: Scene) -> list[str]:
    return ["train", "rum.yaml"]


@mistake("a folder instead of a run file")
def _(_: Scene) -> list[str]:
    return ["train", "data"]


@mistake("an empty run file")
def _(scene: Scene) -> list[str]:
    scene.write("run.yaml", "")
    return ["train", "run.yaml"]


@mistake("a run file that is no YAML", (1, 2))
def _(scene: Scene) -> list[str]:
    scene.write("run.yaml", "model: {name: DeepFM\n")
    return ["train", "run.yaml"]


@mistake("a run file of bytes")
def _(scene: Scene) -> list[str]:
    scene.write("run.yaml", b"\x80\x81\x82")
    return ["train", "run.yaml"]


@mistake("a run file that is a list")
def _(scene: Scene) -> list[str]:
    scene.write("run.yaml", "- model\n- data\n")
    return ["train", "run.yaml"]


@mistake("a key that is there twice")
def _(scene: Scene) -> list[str]:
    scene.write("run.yaml", "output_dir: out\noutput_dir: other\n")
    return ["train", "run.yaml"]


@mistake("a section that is a value")
def _(scene: Scene) -> list[str]:
    return scene.run(train=3)


@mistake("no model")
def _(scene: Scene) -> list[str]:
    scene.write("run.yaml", "output_dir: out\ndata: {root: data}\n")
    return ["train", "run.yaml"]


@mistake("a checkpoint as run file")
def _(scene: Scene) -> list[str]:
    manifest = scene.checkpoints()[-1] / "manifest.json"
    return ["train", str(manifest.relative_to(scene.folder))]


RUN_FILES.settings(
    (1,),
    ("train.epoch=3",),
    ("train",),
    ("train.epochs.more=1",),
    ("train.epochs=many",),
    ("train.epochs=0",),
    ("data.batch_size=-1",),
    ("data.batch_size=1e30",),
    ("optimizer.lr=fast",),
    ("optimizer.lr=-1",),
    ("optimizer.name=adm",),
    ("optimizer.arguments={amsgrad: true}",),
    ("optimizer.schedule.name=cosin",),
    ("checkpoint.keep_last=0",),
    ("checkpoint.every_step=5",),
    ("distributed.timeout_seconds=-1",),
    ("device=gpu",),
    ("seed=-1",),
    ("version=99",),
    ("output_dir=s3://bucket/out",),
    ("data.order=random",),
    ("data.follow=true",),
    ("train.best_mode=best",),
    ("embedding.rules=[{tables: user, kernel: uvm}]",),
    ("warm_start={}",),
    ("warm_start={fron: other}",),
    ("objective={name: pointwise, loss_arguments: {a: 1}}",),
    ("evaluation.metrics=[{name: auc, of: 3}]",),
    ("model.name=module:",),
)
RUN_FILES.settings(
    (1,),
    ("model.hidden_unit=[3]",),
    ("model.hidden_units=[0]",),
    ("model.embedding_dim=0",),
    ("model.features=[user, itme]",),
    ("model.features=user",),
    ("model.features=[]",),
    ("data.labels=[clik]",),
    ("data.labels=[click, click]",),
    ("device=cuda",),
    ("objective={name: retrieval}",),
    ("optimizer.name=torch.optim:LBFGS",),
    ("optimizer.name=torch.optim:SparseAdam",),
    ("optimizer.name=torch.optim:RAdam", "optimizer.arguments={beta: [0.9, 0.9]}"),
    ("optimizer.name=torch.optim:Nothing",),
    ("optimizer.name=no_such_module:Adam",),
    ("optimizer.schedule.name=step",),
    ("embedding.optimizer.name=lazy_adam",),
    ("embedding.rules=[{tables: usr}]",),
    ("embedding.sharding=column_wise",),
    ("train.precision=bf16", "train.tf32=true"),
    ("evaluation.metrics=[{name: grouped_auc, group: nobody}]",),
)
RUN_FILES.settings(
    (1, 2),
    ("model.name=DeepFn",),
    ("model.hidden_units=[a]",),
    ("train.best_metric=acu",),
    ("optimizer.betas=[2, 0.9]",),
    ("optimizer.name=torch.optim:RAdam", "optimizer.arguments={betas: [2, 0.9]}"),
    ("embedding.optimizer={name: adam}", "embedding.sharding=replicated", "embedding.optimizer.betas=[2, 2]"),
    ("embedding.memory_per_rank_gb=1e-6",),
    ("optimizer={name: sgd, lr: 1e30}",),
)
