#!/bin/sh
# Trains on a day, from the weights of the day before: retrain.sh EVENTS DAY [DAY_BEFORE]
#
# EVENTS holds a file a day, up to this one. Earlier days are only read for histories. What the day before has learned of
# its columns stays: ids, means, bins. New values get the ids after the known ones, so its tables go on, with more rows.
# The last hour but one is valid, the last hour is test: what is trained is measured on the newest hour. `data import`
# says beside the day before's figures how labels and unknown values drift.
set -eu
here=$(dirname "$0")
events=$1 day=$2 before=${3:-}

set -- --plan "$here/plan.yaml" --out "data/$day" \
    --set "split.rows_from=$day" --set "split.valid_from=$day 22:00:00" --set "split.test_from=$day 23:00:00"
[ -z "$before" ] || set -- "$@" --grow "data/$before"
rechub-dist data import "$events" "$@"

set -- --set "data.root=data/$day" --set "output_dir=runs/$day"
[ -z "$before" ] || set -- "$@" --set "warm_start.from=runs/$before"
rechub-dist train "$here/run.yaml" "$@"
