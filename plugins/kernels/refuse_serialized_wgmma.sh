#!/bin/sh
# Runs a compiler and fails if ptxas says that it serialized wgmma (C7508, C7510, C7514): it is only a
# remark to ptxas, and costs most of the speed.
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$@" > "$log" 2>&1
status=$?
cat "$log" >&2
if grep -E 'C75(08|10|14)' "$log" > /dev/null; then
    echo "error: wgmma instructions were serialized, see above" >&2
    exit 1
fi
exit $status
