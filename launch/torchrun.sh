#!/usr/bin/env bash
# Train on this host as one of a run's hosts; run the same command on each.
#
#   launch/torchrun.sh RUN.yaml [--nnodes 1:3] [--nproc N] [--rdzv HOST:PORT] [--set SECTION.KEY=VALUE]... \
#       [--outer-restarts N]
#
# Prints the equivalent torchrun command, and takes every option of `rechub-dist train`. torchrun restarts workers, but
# ends on all hosts if the rendezvous host dies: --outer-restarts restarts this host's agent, and the run resumes from
# its checkpoint once the rendezvous host is back. There is no restart after a mistake (exit code 2), a finished run or
# a request to stop. PYTHON sets the interpreter.
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
trap 'forward HUP' HUP # stays ignored under nohup

for ((attempt = 0; ; attempt++)); do
    # In a job of its own, so that a terminal's interrupt reaches it only through this script.
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
    echo "launch: the agent ended with exit code $code; restarting it ($((attempt + 1)) of $outer) in $pause s" >&2
    sleep "$pause" &
    wait $!
    [[ -n $asked ]] && exit "$code"
done
