#!/usr/bin/env bash
# Build the images on the base that its name stands for now, held by its digest, and write down what they are made of.
#
#   RECHUB_ENGINE=podman docker/release.sh IMAGE
#
# tags IMAGE:cpu, IMAGE:cuda and IMAGE:serve, and writes to dist/ for each: its list of packages (sbom-*.cdx.json), and its base and own
# id (image-*.txt). Pushes nothing.
#
#   RECHUB_ENGINE         docker (default) or podman
#   RECHUB_BASE           base image (default: the Dockerfile's)
#   RECHUB_BUILD_OPTIONS  more options of the build: --build-arg PIP_EXTRA_INDEX_URL=...
set -euo pipefail
image=${1:?the name of the image, such as registry.example/rechub-dist}
cd "$(dirname "$0")/.."
engine=${RECHUB_ENGINE:-docker}
base=${RECHUB_BASE:-$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)}
read -ra options <<<"${RECHUB_BUILD_OPTIONS:-}"
"$engine" pull "$base"
digest=$("$engine" image inspect --format '{{index .RepoDigests 0}}' "$base")
[[ $digest == *@sha256:* ]] || { echo "$base has no digest: it comes from no registry" >&2; exit 1; }
mkdir -p dist
for target in cpu cuda serve; do
    "$engine" build --file docker/Dockerfile --target "$target" --tag "$image:$target" \
        --build-arg "BASE=$digest" --label "org.opencontainers.image.base.name=$base" \
        --label "org.opencontainers.image.base.digest=${digest#*@}" "${options[@]}" .
    "$engine" run --rm --network none --entrypoint cat "$image:$target" /usr/share/rechub-dist/sbom.cdx.json \
        >"dist/sbom-$target.cdx.json"
    id=$("$engine" image inspect --format '{{.Id}}' "$image:$target")
    printf 'image %s %s\nbase %s\n' "$image:$target" "$id" "$digest" | tee "dist/image-$target.txt"
done
