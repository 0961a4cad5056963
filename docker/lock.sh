#!/usr/bin/env bash
# Write the lock files of the images, requirements-*.lock: the pins of requirements-*.txt with the hash of every file that
# may be installed for them. Needs Python 3.11 on x86-64, as the image has. Where the CPU build of torch is, pip's
# settings say (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS); nothing of that is written down.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install "uv==0.13.9"

# A local version is on no public index: its hash is that of the file which pip finds.
"${pip[@]}" download --no-deps --dest "$work/local" "$(grep ^torch== requirements-cpu.txt)"

compile() { # name [option]...
    "$work/venv/bin/uv" pip compile "requirements-$1.txt" --quiet --generate-hashes --python-version 3.11 \
        --no-annotate --no-header --output-file "$work/$1.lock" "${@:2}"
}
compile cpu --no-deps --find-links "$work/local"
compile cuda --no-deps
compile tools
compile serve --no-deps
for file in "$work"/local/*.whl; do
    hash=$(sha256sum "$file" | cut -d ' ' -f 1)
    sed -i "s|^\(torch==[^ ]*+cpu\)\$|\1 \\\\\n    --hash=sha256:$hash|" "$work/cpu.lock"
done
for name in cpu cuda serve tools; do
    {
        echo "# Written by docker/lock.sh from requirements-$name.txt."
        grep -v '^--find-links' "$work/$name.lock"
    } >"requirements-$name.lock"
done
