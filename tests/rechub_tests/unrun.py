"""What in the documentation is run by a test of its own, and what is run by none, with the reason.

Commands that are not listed here are run by tests/distributed/test_documented_commands.py.
"""

from __future__ import annotations

# page, beginning of the block (empty: every block of a shell), test
RUN_BY: tuple[tuple[str, str, str], ...] = (
    ("docs/daily.md", "", "tests/distributed/test_daily.py"),
    ("docs/export.md", "rechub-dist export runs/deepfm --out deltas/", "tests/distributed/test_deltas.py"),
    ("docs/import.md", "", "tests/unit/test_import_page.py"),
    ("docs/models.md", "rechub-dist data synthesize", "tests/distributed/test_own_code_runs.py"),
    ("docs/notebook.md", "import pandas", "tests/distributed/test_python.py"),
    ("docs/retrieval.md", "", "tests/distributed/test_retrieval_commands.py"),
    ("docs/retrieval.md", "from rechub_dist.inference", "tests/distributed/test_retrieval_commands.py"),
    ("docs/serving.md", "curl", "tests/distributed/test_serving_page.py"),
    ("docs/serving.md", "import io", "tests/distributed/test_serving_page.py"),
    ("docs/start.md", "", "tests/distributed/test_start_page.py"),
    ("docs/start.md", "mine/plan.yaml", "tests/distributed/test_start_page.py"),
    ("docs/start.md", "rows  ", "tests/distributed/test_start_page.py"),
    ("examples/own_model/README.md", "", "tests/distributed/test_own_code_runs.py"),
)

CLUSTER = "needs a Ray cluster; tests/launch/test_ray_*.py start such clusters and run these subcommands"
HOSTS = "needs several hosts; tests/launch/test_hosts.py runs it on hosts that are network namespaces"
STORE = "needs a bucket; tests/distributed/test_object_store.py runs such addresses against a server"
PUBLIC = "needs a public data set; see RECHUB_DATA in CONTRIBUTING.md"
ENDLESS = "runs until it is stopped"
MEANWHILE = "while a run lasts; tests/distributed/test_monitoring.py reads the same endpoint"
CLIENT = "needs a server of that kind; written by its documentation"
SHOWN = "what was printed for a public data set"

# program, reason
PROGRAMS: dict[str, str] = {
    "apt-get": "installs; .ci/run does the same where it is needed",
    "docker": "needs a container engine; tests/launch/test_docker_image.py builds the images where there is one",
    "kubectl": "needs a cluster; the manifests are held against schemas by tests/launch/test_k8s_*.py",
    "make": "builds environments; .ci/run runs demo, test, check, docs and test-slow",
    "pip": "installs; `make install` installs the same",
    "ray": CLUSTER,
    "sbatch": "needs Slurm",
    "tensorboard": ENDLESS,
    "tritonserver": "needs Triton; tests/distributed/test_bundle_formats.py holds its configuration against the schema",
}

# page, beginning of the command, reason
COMMANDS: tuple[tuple[str, str, str], ...] = (
    *((page, "launch/torchrun.sh run.yaml", HOSTS) for page in ("README.md", "docs/runs.md")),
    *((page, "rechub-dist ray train run.yaml --address auto", CLUSTER) for page in ("README.md", "docs/runs.md")),
    ("docs/checkpoints.md", "rechub-dist checkpoint verify s3:", STORE),
    ("docs/commands.md", "rechub-dist doctor --data s3:", STORE),
    ("docs/commands.md", "rechub-dist publish runs/deepfm --to published/deepfm --every 60", ENDLESS),
    ("docs/commands.md", "rechub-dist ray", CLUSTER),
    ("docs/export.md", "rechub-dist train configs/runs/deepfm_movielens_1m.yaml", PUBLIC),
    ("docs/export.md", "rechub-dist export runs/deepfm_movielens_1m", PUBLIC),
    ("docs/import_scale.md", "rechub-dist ray import", CLUSTER),
    ("docs/inspect.md", "rechub-dist data inspect s3:", STORE),
    ("docs/installation.md", "grep -v ^torchrec", "installs; `make install` does the same"),
    ("docs/installation.md", "rechub-dist doctor run.yaml --rdzv", HOSTS),
    ("docs/installation.md", "rechub-dist doctor --data s3:", STORE),
    ("docs/launch.md", "rechub-dist train RUN.yaml --nproc 8", "needs room for eight ranks; --nproc 2 is run"),
    ("docs/launch.md", "launch/torchrun.sh", HOSTS),
    ("docs/launch.md", "rechub-dist store", ENDLESS + "; benchmarks/survival.py starts one"),
    ("docs/launch.md", "rechub-dist ray", CLUSTER),
    ("docs/launch.md", "curl -s http://127.0.0.1:9400", MEANWHILE),
    ("docs/models.md", "python benchmarks/leaderboard.py", PUBLIC),
    (
        "docs/performance.md",
        ".venv-bench/bin/python benchmarks/suite.py",
        "measures for most of an hour; tests/launch/test_bench_suite.py runs parts of it",
    ),
    ("docs/runs.md", "rechub-dist ray", CLUSTER),
    ("docs/runs.md", "rechub-dist publish runs/deepfm --to published --every 60", ENDLESS),
    ("docs/serving.md", "rechub-dist publish runs/deepfm --to published/deepfm --every 60", ENDLESS),
)

# page, beginning of the block, reason: blocks that are neither commands nor configuration
BLOCKS: tuple[tuple[str, str, str], ...] = (
    ("docs/inspect.md", "taken as user", SHOWN),
    ("docs/launch.md", "rechub_step", MEANWHILE),
    ("docs/retrieval.md", "# Milvus", CLIENT),
    ("docs/retrieval.md", "# Qdrant", CLIENT),
)

# pattern of pages, language, what the block is compared with
CHECKED: tuple[tuple[str, str, str], ...] = (
    ("docs/*.md", "mermaid", "a picture: `make docs` draws it"),
    ("docs/performance.md", "text", "measured: `make bench` writes it"),
    ("docs/python.md", "text", "made of the code: tests/unit/test_python_page.py"),
    ("docs/commands.md", "text", "made of the code: tests/unit/test_commands_page.py"),
    ("docs/models/*.md", "text", "made of the code: tests/unit/test_model_pages.py"),
    ("docs/models/*.md", "mermaid", "made of the code: tests/unit/test_model_pages.py"),
)
