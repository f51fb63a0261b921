"""Container images without a registry: made here, written as archives, imported into both nodes.

Pods name them `localhost/...` and use `imagePullPolicy: Never`.
"""

import hashlib
import io
import json
import os
import platform
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from tests.cluster import mounts
from tests.cluster.errors import ClusterError
from tests.cluster.layout import cache_folder

# The image of the tests' small pods, and of the sandbox that holds every pod's network.
BUSYBOX_IMAGE = "localhost/tempflow-test/busybox:1"
_BUSYBOX = Path("/bin/busybox")
_CERTIFICATES = Path("/etc/ssl/certs")
_CERTIFICATE_BUNDLE = _CERTIFICATES / "ca-certificates.crt"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_busybox_archive(archive: Path) -> None:
    """A docker archive with nothing but Debian's static busybox; its command sleeps for ever."""
    layer = _busybox_layer()
    config = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sleep", "2147483647"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [BUSYBOX_IMAGE], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        _add_file(tar, "layer.tar", layer)
        _add_file(tar, "config.json", json.dumps(config).encode())
        _add_file(tar, "manifest.json", json.dumps(manifest).encode())


def build_image(
    context: Path,
    tag: str,
    archive: Path,
    *,
    dockerfile: Path | None = None,
    target: str | None = None,
    build_arguments: Mapping[str, str] | None = None,
) -> None:
    """Build a Dockerfile with buildah and write the image to a docker archive.

    RUN steps use the machine's network. The machine's certificates are mounted for them, and the
    build argument SSL_CERT_FILE names the bundle: a Dockerfile that downloads declares it with ARG.
    """
    command = [
        *_buildah("build", "--isolation", "chroot", "--network", "host", "--layers"),
        *("--file", str(dockerfile or context / "Dockerfile"), "--tag", tag),
        *(["--target", target] if target else []),
    ]
    if _CERTIFICATE_BUNDLE.exists():
        command += ["--volume", f"{_CERTIFICATES}:{_CERTIFICATES}:ro"]
        command += ["--build-arg", f"SSL_CERT_FILE={_CERTIFICATE_BUNDLE}"]
    for name, value in (build_arguments or {}).items():
        command += ["--build-arg", f"{name}={value}"]
    _run([*command, str(context)])
    _write_archive(tag, archive)


def build_debian_base(tag: str, packages: tuple[str, ...], suite: str = "bookworm") -> None:
    """Make a base image for Dockerfiles from Debian's packages: there is no registry."""
    if _has_image(tag):
        return
    root = cache_folder() / f"debootstrap-{suite}-{os.getpid()}"
    root.mkdir(parents=True)
    try:
        include = ",".join(packages)
        _run(["debootstrap", "--variant=minbase", f"--include={include}", suite, str(root)])
        container = _run(_buildah("from", "scratch")).strip()
        _run(_buildah("add", "--quiet", container, str(root), "/"))
        _run(_buildah("config", "--cmd", "/bin/sh", container))
        _run(_buildah("commit", "--quiet", "--rm", container, tag))
    finally:
        _run(["rm", "-rf", "--one-file-system", str(root)])
        unmount_storage()


def remove_image(tag: str) -> None:
    """Remove an image from buildah's storage: a trainer image is gigabytes."""
    if _has_image(tag):
        _run(_buildah("rmi", "--force", tag))
    unmount_storage()


def unmount_storage() -> None:
    """buildah leaves its overlay folder mounted on itself."""
    mounts.unmount_below(_storage())


def _write_archive(tag: str, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.unlink(missing_ok=True)  # buildah refuses to change an archive
    # Uncompressed: the nodes would only have to unpack it again, on the same disk.
    _run(_buildah("push", "--disable-compression", tag, f"docker-archive:{archive}:{tag}"))
    unmount_storage()


def _has_image(tag: str) -> bool:
    command = _buildah("inspect", "--type", "image", tag)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _buildah(*arguments: str) -> list[str]:
    # Storage of our own: a developer's own images are neither used nor cleaned up.
    storage = _storage()
    places = ["--root", str(storage / "root"), "--runroot", str(storage / "run")]
    return ["buildah", *places, "--storage-driver", "overlay", *arguments]


def _storage() -> Path:
    return cache_folder() / "buildah"


def _busybox_layer() -> bytes:
    applets = _run([str(_BUSYBOX), "--list"]).split()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for folder, mode in (("bin", 0o755), ("etc", 0o755), ("root", 0o755), ("tmp", 0o1777)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        _add_file(tar, "bin/busybox", _BUSYBOX.read_bytes(), mode=0o755)
        _add_file(tar, "etc/passwd", b"root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
        _add_file(tar, "etc/group", b"root:x:0:\nuser:x:1000:\n")
        for applet in applets:
            if applet != "busybox":
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
    return content.getvalue()


def _add_file(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip())[-300:]
        raise ClusterError(f"{' '.join(command)[:200]} failed: {last}")
    return done.stdout
