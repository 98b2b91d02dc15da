#!/bin/sh
# Uses an image of the embedded host as a site does: read-only, without privileges, with one volume. Sends
# simulated scans over its port, compares the maps with the truth, and stops it in the middle of a scan.
# usage: smoke.sh [IMAGE]     environment: ENGINE (docker, podman), RUN_OPTIONS (further options of run), PORT
set -eu
image=${1:-quantitron}
engine=${ENGINE:-$(command -v docker || command -v podman)}
port=${PORT:-19002}
here=$(CDPATH='' cd -- "$(dirname "$0")" && pwd)
name=quantitron-smoke-$$
folder=$(mktemp -d)
chmod 777 "$folder" # the user of the image is not ours
options="--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges ${RUN_OPTIONS-}"

finish() {
    code=$?
    test "$code" = 0 || "$engine" logs "$name" 2>&1 | tail -n 20 >&2
    "$engine" rm --force "$name" >/dev/null 2>&1 || true
    "$engine" volume rm "$name" >/dev/null 2>&1 || true
    rm -rf "$folder"
    exit "$code"
}
trap finish EXIT
trap 'exit 1' INT TERM

fail() {
    echo "smoke: $1" >&2
    exit 1
}

# the image's own programs on $folder, with the network of this machine
client() {
    program=$1
    shift
    # shellcheck disable=SC2086
    "$engine" run --rm --interactive --network host $options --volume "$folder:/data" --entrypoint "$program" \
        "$image" "$@"
}

echo "smoke: simulating two scans"
client quantitron --quiet simulate vfa_gre -o /data/scan.h5 --matrix 48,48,8 --coils 4 -R 3 --snr 60
client quantitron --quiet simulate vfa_gre -o /data/long.h5 --matrix 96,96,16 --coils 8 -R 3 --snr 60

echo "smoke: starting $image"
# shellcheck disable=SC2086
"$engine" run --detach --name "$name" --publish "127.0.0.1:$port:9002" $options --volume "$name:/data" "$image" \
    serve --host 0.0.0.0 --default-pipeline subspace >/dev/null
waited=0
until "$engine" exec "$name" python3 /opt/quantitron/health.py quantitron; do
    waited=$((waited + 1))
    test "$waited" -lt 90 || fail "the server does not answer"
    sleep 2
done
test "$("$engine" exec "$name" id -u)" = 10001 || fail "the server does not run as user 10001"
if "$engine" exec "$name" sh -c ': >/opt/quantitron/written' 2>/dev/null; then
    fail "the root file system can be written to"
fi

echo "smoke: a scan by Gadgetron's protocol"
client quantitron replay /data/scan.h5 -p subspace -o /data/maps.h5 --gadgetron "127.0.0.1:$port"
client quantitron --quiet compare /data/maps.h5 /data/scan.h5 --json /data/errors.json
echo "smoke: the same scan as FIRE sends it"
client python3 - /data "127.0.0.1" "$port" <"$here/smoke_client.py"

echo "smoke: stopping it with a scan in progress"
status=0
client quantitron replay /data/long.h5 -p lorein -o /data/stopped.h5 --gadgetron "127.0.0.1:$port" \
    >"$folder/client.log" 2>&1 &
replay=$!
scans=$("$engine" logs "$name" 2>&1 | grep -c 'is served by' || true)
waited=0
until test "$("$engine" logs "$name" 2>&1 | grep -c 'is served by' || true)" -gt "$scans"; do
    waited=$((waited + 1))
    test "$waited" -lt 120 || fail "the scan to be stopped did not begin"
    sleep 1
done
sleep 3
began=$(date +%s)
"$engine" stop -t 30 "$name" >/dev/null
took=$(($(date +%s) - began))
wait "$replay" || status=$?
code=$("$engine" inspect --format '{{.State.ExitCode}}' "$name")
test "$code" = 0 || fail "the server ended with status $code, not 0, at SIGTERM"
test "$took" -lt 20 || fail "the server took $took s to stop"
if test "$status" != 0; then
    grep -q 'was stopped before the scan was done' "$folder/client.log" \
        || fail "the client was not told why its scan ended: $(cat "$folder/client.log")"
    echo "smoke: the client reads: $(tail -n 1 "$folder/client.log")"
fi
echo "smoke: stopped within $took s, all is well"
