#!/bin/sh
# Makes a base image out of Debian packages, for machines that reach a Debian mirror but no
# container registry. Its Python is Debian bookworm's 3.11, as in the default base image.
#
#   tools/base_image.sh [NAME]        default name: localhost/tempflow-base:bookworm
#   make images BASE_IMAGE=NAME
#
# Needs root, debootstrap, and docker, podman or buildah. DEBIAN_MIRROR names another mirror.
set -eu

name=${1:-localhost/tempflow-base:bookworm}
here=$(dirname "$0")
. "$here/container_tool.sh"

fail() {
    echo "base_image: $1" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "debootstrap needs root"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"
tool=$(container_tool)

work=$(mktemp -d "${TMPDIR:-/var/tmp}/tempflow-base.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root

# python3-venv is what the build installs uv with; it brings pip as a wheel of 2 MB.
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
    bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/log" 2>&1 ||
    { tail -n 20 "$work/log" >&2; fail "debootstrap failed"; }

# What only package management and people at a terminal would read.
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/* \
    "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/* \
    "$root"/usr/share/info/*

case $tool in
buildah)
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" / >/dev/null
    buildah config --cmd python3 --env PATH=/usr/local/bin:/usr/bin:/bin "$container"
    buildah commit --quiet --rm "$container" "$name" >/dev/null
    ;;
*)
    tar -C "$root" -c . | "$tool" import --change "CMD [\"python3\"]" - "$name" >/dev/null
    ;;
esac
echo "$name: $(du -sm "$root" | cut -f1) MB"
