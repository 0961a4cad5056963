#!/usr/bin/env bash
# Train on this host, as one of a run's hosts: the same command on each.
#
#   launch/torchrun.sh RUN.yaml [--nnodes 1:3] [--nproc N] [--rdzv HOST:PORT] [--set SECTION.KEY=VALUE]... \
#       [--outer-restarts N]
#
# Prints the equivalent torchrun command, and takes every option of `rechub-dist train`. torchrun restarts workers, but
# ends everywhere when the host of the rendezvous store dies: --outer-restarts starts this host's agent again, and the
# run goes on from its checkpoint as soon as that host is back. A mistake (exit code 2), a run that is done and a request
# to stop are not restarted. PYTHON names the interpreter.
set -u

outer=0
pause=${RECHUB_OUTER_PAUSE:-5}
arguments=()
while (($#)); do
    case $1 in
    --outer-restarts)
        outer=${2:?--outer-restarts needs a number}
        shift 2
        ;;
    --outer-restarts=*)
        outer=${1#*=}
        shift
        ;;
    *)
        arguments+=("$1")
        shift
        ;;
    esac
done
if ((${#arguments[@]} == 0)); then
    sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p;}' "$0"
    exit 2
fi
[[ " ${arguments[*]} " == *" --nproc"* ]] || arguments+=(--nproc 1)

child=
asked=
forward() {
    asked=$1
    [[ -n $child ]] && kill -s "$1" "$child" 2>/dev/null
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward HUP' HUP # left ignored where nohup has it so

for ((attempt = 0; ; attempt++)); do
    # In a job of its own, where an interrupt from the terminal comes by way of this script alone.
    set -m
    "${PYTHON:-python3}" -m rechub_dist train "${arguments[@]}" --show-torchrun &
    child=$!
    set +m
    [[ -n $asked ]] && forward "$asked"
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if ((code == 0 || code == 2)) || [[ -n $asked ]] || ((attempt >= outer)); then
        exit "$code"
    fi
    echo "launch: the agent ended with $code; starting it again ($((attempt + 1)) of $outer) in $pause s" >&2
    sleep "$pause" &
    wait $!
    [[ -n $asked ]] && exit "$code"
done
