#!/usr/bin/env bash
# One host's part of a run: the same command on every host, until the run is complete.
#   scripts/launch.sh NAME --workdir DIR [--scale ...] [--set ...] [--coordinator HOST:PORT --processes N --process-id I]
# Checks first that all hosts are there and alike. A run that was preempted, killed or lost a host is started again; what only a
# person can mend (exit codes 1 and 2) ends the script with that code.
set -u
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
stop=""
run() {  # a signal to this script goes to the run, which saves before it ends
  "$PYTHON" run.py "$@" & child=$!
  trap 'stop=1; kill -TERM "$child"' TERM INT
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
}
run preflight "$@" --seconds "${PREFLIGHT_SECONDS:-30}"
[ "$code" = 0 ] || exit "$code"
while :; do
  run "$@"
  case "$code" in
    75|134|137|139|143) [ -z "$stop" ] || exit "$code"; echo "ended with $code: starting again" >&2; sleep "${RESTART_SECONDS:-10}" ;;
    *) exit "$code" ;;
  esac
done
