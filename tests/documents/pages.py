"""The commands that our pages show, and where each is run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "charts/tempflow/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)

SHELLS = ("sh", "bash", "console")
# With which a line begins that somebody is to type.
PROGRAMS = ("tempflow ", "make ", "kubectl ", "helm ", "pip ", "python ", "curl ", "export ")

# Pages that are typed from top to bottom by `test_commands.py`.
TYPED_HERE = (
    "README.md",
    "docs/run.md",
    "docs/explain.md",
    "docs/rewards.md",
    "docs/rewards-service.md",
    "docs/recipes.md",
)

_INSTALLING = "tests/documents/test_installing.py"
_FIRST_JOB = "tests/cluster/test_first_job.py"
_PUSHING = "tests/cluster/test_push_images.py"
_READER = "tests/cluster/test_reader.py"
_SCENARIO = "tests/cluster/scenario.py"
_STORE = "tests/cluster/test_example_store.py"
_TYPED = "tests/cluster/test_page_commands.py"
_IMAGES = "tests/cluster/project_images.py"
CI = ".ci/run"
# What is run elsewhere: the beginning of the command, and the file that runs it or its like.
ELSEWHERE = {
    "helm test": _SCENARIO,
    "kubectl logs -l": "tests/cluster/test_operator.py",
    # Word for word, as the page has them.
    "make demo": CI,
    "make test": CI,
    "make check": CI,
    "make setup": CI,
    "make images BASE_IMAGE=": _IMAGES,
    "make images": _PUSHING,
    "make push-images": _PUSHING,
    "apt-get install": _PUSHING,
    "tools/base_image.sh": _IMAGES,
    "export": _TYPED,
    "helm": _TYPED,
    "kubectl rollout status deployment/tempflow": _SCENARIO,
    "kubectl rollout status deployment/s3": _STORE,
    'echo "s3.bucket.create': _STORE,
    "kubectl": _TYPED,
    "pip": _INSTALLING,
    "sha256sum dist/": _INSTALLING,
    "tempflow rewards score photo.png": _INSTALLING,
    "tempflow init --preset digits": _FIRST_JOB,
    "tempflow submit digits.yaml": _FIRST_JOB,
    "tempflow pull job/digits --namespace": _FIRST_JOB,
    "tempflow pull job/digits --via-cluster": _READER,
    "tempflow checkpoints verify job/digits --via-cluster": _READER,
    **{
        f"tempflow checkpoints {verb} s3://bucket/": "tests/unit/sdk/test_keeping.py"
        for verb in ("list", "show", "verify", "pin", "prune")
    },
}
# These type what such commands a page has, whatever they are, so they name the pages.
WHOLE_PAGES = (_TYPED, _INSTALLING)
# The only commands that no test runs, whole, and what they want that no test can afford. They are
# of recipes for published models, and stand on that page alone.
RECIPES = "docs/recipes.md"
NEEDS_HARDWARE = {
    "python -m tempflow_trainer.rewards.serve pickscore --device cuda --host 0.0.0.0 --port 8090": (
        "a GPU, and published weights"
    ),
    "tools/images.sh build hpsv3 image-reward": (
        "14 GB of disk and 15 minutes; what the images install is run by make test-rewards"
    ),
}


def commands(page: Path) -> list[str]:
    """The commands of a page, in order, without remarks; continued lines are joined."""
    found = []
    for kind, block in _blocks(page):
        if kind not in SHELLS:
            continue
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            text = line.removeprefix("$ ") if line.startswith("$ ") or kind != "console" else ""
            text = re.sub(r"\s+# .*$", "", text).strip()
            if text and not text.startswith("#"):
                found.append(text)
    return found


def other_lines(page: Path) -> list[str]:
    """The lines of all other blocks."""
    blocks = [block for kind, block in _blocks(page) if kind not in SHELLS]
    return [line for block in blocks for line in block.splitlines()]


def mentioned(page: Path) -> list[str]:
    """Commands in the prose, which may leave out what they are applied to."""
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    found = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return [code for code in found if code.startswith(PROGRAMS)]


def _blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def elsewhere(command: str) -> str | None:
    """The file that runs the command, or its like; None if no line above names it."""
    return next((file for start, file in ELSEWHERE.items() if command.startswith(start)), None)
