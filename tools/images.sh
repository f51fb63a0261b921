#!/bin/sh
# Builds or pushes the images with docker, podman or buildah, whichever works here.
#
#   tools/images.sh build [IMAGE ...]     operator and trainer when none is named; prints their sizes
#   tools/images.sh push  [IMAGE ...]
#
# IMAGE is operator, trainer, hpsv3 or image-reward.
#
# Environment:
#   IMAGE_REPOSITORY  where the images belong, for instance REGISTRY/PROJECT; default: localhost
#   IMAGE_TAG         default: the version in pyproject.toml
#   BASE_IMAGE        another base than the Dockerfile's default (see tools/base_image.sh)
#   CA_BUNDLE         file with the CA certificates of a proxy between here and the package index
#   CONTAINER_TOOL    docker, podman or buildah
#   BUILD_FLAGS       further flags of the build; as root inside a container buildah may need
#                     "--isolation chroot --network host"
set -eu

here=$(dirname "$0")
root=$(cd "$here/.." && pwd)
. "$here/container_tool.sh"

usage() {
    sed -n '4,7s/^# *//p' "$0" >&2
    exit 2
}

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
tag=${IMAGE_TAG:-$version}
repository=${IMAGE_REPOSITORY:-localhost}

image() {
    echo "$repository/tempflow-$1:$tag"
}

build() {
    revision=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
    case $1 in
    operator | trainer) stage=$1 reward= ;;
    *) stage=reward reward=$1 ;;
    esac
    set -- --target "$stage" --tag "$(image "$1")" --file "$root/Dockerfile" \
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
        ${reward:+--build-arg "REWARD=$reward"} \
        ${BASE_IMAGE:+--build-arg "BASE_IMAGE=$BASE_IMAGE"} \
        ${CA_BUNDLE:+--secret "id=ca_bundle,src=$CA_BUNDLE"}
    # BUILD_FLAGS is a list of words.
    # shellcheck disable=SC2086
    case $tool in
    docker) DOCKER_BUILDKIT=1 docker build "$@" ${BUILD_FLAGS:-} "$root" ;;
    *) "$tool" build --layers "$@" ${BUILD_FLAGS:-} "$root" ;;
    esac
}

size() {
    case $tool in
    buildah) buildah images --format '{{.Size}}' "$1" ;;
    *) "$tool" image inspect --format '{{.Size}}' "$1" | awk '{printf "%.0f MB\n", $1 / 1e6}' ;;
    esac
}

[ $# -ge 1 ] || usage
action=$1
shift
[ $# -ge 1 ] || set -- operator trainer
tool=$(container_tool)

for target in "$@"; do
    case $target in operator | trainer | hpsv3 | image-reward) ;; *) usage ;; esac
    case $action in
    build)
        build "$target"
        echo "$(image "$target"): $(size "$(image "$target")")"
        ;;
    push) "$tool" push "$(image "$target")" ;;
    *) usage ;;
    esac
done
