# Sourced by the image scripts: which program builds images on this machine.

# Prints docker, podman or buildah: the first that works here, or CONTAINER_TOOL when it is set.
# A docker command without its daemon is passed over.
container_tool() {
    if [ -n "${CONTAINER_TOOL:-}" ]; then
        echo "$CONTAINER_TOOL"
    elif command -v docker >/dev/null && docker info >/dev/null 2>&1; then
        echo docker
    elif command -v podman >/dev/null; then
        echo podman
    elif command -v buildah >/dev/null; then
        echo buildah
    else
        echo "no docker (with its daemon), podman or buildah found;" \
            "on Debian: apt-get install buildah" >&2
        return 1
    fi
}
