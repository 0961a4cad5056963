#!/usr/bin/env bash
# Build the CPU image and have two containers train together: non-root, read-only, an address each. The second one is
# stopped in the middle and started again, as a cluster does when it drains a node.
#
#   RECHUB_ENGINE=podman docker/build_and_try.sh
#
#   RECHUB_ENGINE         docker (default) or podman
#   RECHUB_BASE           base image (default: the Dockerfile's), or debian: made here with mmdebstrap, without a registry
#   RECHUB_BUILD_OPTIONS  more options of the build: --build-arg PIP_EXTRA_INDEX_URL=..., --volume, --network host
#   RECHUB_RUN_OPTIONS    more options of each container
set -euo pipefail
cd "$(dirname "$0")/.."
engine=${RECHUB_ENGINE:-docker}
base=${RECHUB_BASE:-}
image=localhost/rechub-dist:cpu
network=rechub-dist-trial
subnet=${RECHUB_SUBNET:-10.89.77}
read -ra build_options <<<"${RECHUB_BUILD_OPTIONS:-}"
read -ra run_options <<<"${RECHUB_RUN_OPTIONS:-}"
work=$(mktemp -d)
mkdir "$work/data" "$work/runs"
chmod 777 "$work/data" "$work/runs" # for the user of the containers; nobody else gets into $work

clean() {
    "$engine" rm --force worker-0 worker-1 >/dev/null 2>&1 || true
    "$engine" network rm "$network" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean EXIT

if [[ $base == debian ]]; then
    base=localhost/python-base:bookworm
    if ! "$engine" image inspect "$base" >/dev/null 2>&1; then
        mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/base.tar"
        "$engine" import "$work/base.tar" "$base" >/dev/null
        rm "$work/base.tar"
    fi
fi
[[ -z $base ]] || build_options+=(--build-arg "BASE=$base")
"$engine" build --file docker/Dockerfile --target cpu --tag "$image" "${build_options[@]}" .

container() { # [option of run]... -- [argument]...
    local options=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    "$engine" run --read-only --tmpfs /tmp --tmpfs /home/rechub --cap-drop ALL --user 1000:1000 \
        --security-opt no-new-privileges --volume "$work/runs:/runs" "${run_options[@]}" "${options[@]}" "$image" "$@"
}

container --rm --network none --volume "$work/data:/data" --entrypoint rechub-dist -- \
    data synthesize --out /data/synthetic --rows 400000 --dense 4 --sparse 8

worker() { # index
    "$engine" rm --force "worker-$1" >/dev/null 2>&1 || true
    container --name "worker-$1" --hostname "worker-$1" --network "$network" --ip "$subnet.1$1" \
        --add-host "worker-0:$subnet.10" --shm-size 256m --volume "$work/data:/data:ro" \
        --env RECHUB_PREEMPTED_EXIT_CODE=75 -- \
        --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=worker-0:29400 --rdzv-id=trial \
        "--local-addr=$subnet.1$1" --max-restarts=3 --shutdown-timeout=60 \
        -m rechub_dist train configs/runs/deepfm_synthetic.yaml --set data.root=/data/synthetic \
        --set output_dir=/runs/deepfm --set distributed.threads=1 --set train.log_every=10 --set train.epochs=3
}

steps() { # the newest training record's step
    sed -n 's/^{"step": \([0-9]*\),.*"split": "train".*/\1/p' "$work/runs/deepfm/metrics.jsonl" 2>/dev/null | tail -1
}

"$engine" network create --subnet "$subnet.0/24" "$network" >/dev/null
worker 0 &
first=$!
worker 1 &
second=$!
until (($(steps || true) + 0 >= 50)); do
    kill -0 "$first" 2>/dev/null || { echo "worker 0 ended before step 50" >&2; exit 1; }
    sleep 0.5
done
echo "== step $(steps): stopping worker 1"
"$engine" stop --time 90 worker-1 >/dev/null
wait "$second" && { echo "worker 1 was stopped, but took itself for done" >&2; exit 1; }
kill -0 "$first" 2>/dev/null || { echo "worker 0 ended with worker 1" >&2; exit 1; }
echo "== starting worker 1 again"
worker 1 &
second=$!
wait "$first"
wait "$second"
owners=$(find "$work/runs" -mindepth 1 ! -uid 1000 | wc -l)
((owners == 0)) || { echo "$owners files of another user" >&2; exit 1; }
grep '"split": "test"' "$work/runs/deepfm/metrics.jsonl"
echo "== both workers are done at step $(steps)"
