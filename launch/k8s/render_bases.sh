#!/usr/bin/env bash
# Regenerate the bases below launch/k8s, or the given folder: the output of `rechub-dist k8s render` for the example run.
# PYTHON sets the interpreter.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$(realpath -m "${1:-$here}")
cd "$here/../.."
for kind in job jobset pytorchjob trainjob rayjob; do
    mkdir -p "$target/bases/$kind"
    "${PYTHON:-python3}" -m rechub_dist k8s render configs/runs/deepfm_synthetic.yaml --kind "$kind" --name deepfm \
        --image rechub-dist --workers 2 --output-claim runs --data-claim data --tensorboard \
        --set output_dir=/runs/deepfm --set data.root=/data/synthetic -o "$target/bases/$kind/manifest.yaml"
done
