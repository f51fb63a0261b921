"""The commands that our pages show, and where each is run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "charts/tempflow/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)

# Pages that are typed from top to bottom by `test_commands.py`.
TYPED_HERE = ("README.md", "docs/run.md", "docs/explain.md", "docs/rewards.md")

_CLUSTER = "tests/cluster/test_journey.py"
_OPERATOR = "tests/cluster/test_operator.py"
_SCENARIO = "tests/cluster/scenario.py"
_TYPED = "tests/cluster/test_page_commands.py"
_IMAGES = "tests/cluster/project_images.py"
_CI = ".ci/run"
# What is run elsewhere: the beginning of the command, and the file that runs it or its like.
ELSEWHERE = {
    "make demo": _CI,
    "make test": _CI,
    "make check": _CI,
    "make setup": _CI,
    "make images": _IMAGES,
    "apt-get install": "tests/cluster/build.py",
    "tools/base_image.sh": _IMAGES,
    "helm test": _SCENARIO,
    "kubectl rollout status": _SCENARIO,
    "kubectl logs -l": _OPERATOR,
    # Word for word, as the page has them.
    "export": _TYPED,
    "helm": _TYPED,
    "kubectl": _TYPED,
    "tempflow submit digits.yaml": _CLUSTER,
    "tempflow pull job/digits": _CLUSTER,
    "tempflow init --preset digits": _CLUSTER,
    "pip install ./my-rewards": "tests/unit/trainer/test_reward_plugins.py",
    "tempflow explain --preset sd35m-pickscore --set": "tests/unit/trainer/test_explain.py",
    "pip wheel": "tests/unit/trainer/test_reward_plugins.py",
    "sha256sum dist/": "tests/unit/trainer/test_reward_plugins.py",
    "tempflow rewards score photo.png": "tests/unit/trainer/test_reward_plugins.py",
}
# The only commands that nobody runs, and what they want that no test has.
NOT_RUN = {
    "pip install '.[trainer]'": "an environment of its own, and 3 GB to fetch",
    "make push-images": "a registry",
    "tools/images.sh build": "two images of 6 GB; what they install runs in make test-rewards",
    'echo "s3.bucket.create': "an image of SeaweedFS in a cluster",
    "python -m tempflow_trainer.rewards.serve pickscore --device": "published weights and a GPU",
}


def commands(page: Path) -> list[str]:
    """The commands of a page, in order, without remarks; continued lines are joined."""
    found = []
    blocks = re.findall(r"^```(sh|bash|console)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    for kind, block in blocks:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            text = line.removeprefix("$ ") if line.startswith("$ ") or kind != "console" else ""
            text = re.sub(r"\s+# .*$", "", text).strip()
            if text and not text.startswith("#"):
                found.append(text)
    return found


def elsewhere(command: str) -> str | None:
    """The file that runs the command, or its like; None if no line above names it."""
    return next((file for start, file in ELSEWHERE.items() if command.startswith(start)), None)
