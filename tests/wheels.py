"""Wheels of a user's own package, made by hand: a wheel is an archive that describes itself."""

import hashlib
import io
import zipfile

REWARD = '''class Warmth:
    """How much more red than blue a picture is."""

    batch_size = 64

    def score(self, images, prompts, metadata):
        red, _, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - blue
'''


def wheel(*requires: str, name: str = "my-rewards", pure: bool = True) -> bytes:
    """``my_rewards.Warmth``, which is the entry point ``warmth``."""
    module = name.replace("-", "_")
    told = f"{module}-1.0.dist-info"
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
    contents = {
        f"{module}.py": REWARD,
        f"{told}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
        f"{told}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: {str(pure).lower()}\nTag: any\n",
        f"{told}/entry_points.txt": f"[tempflow.rewards]\nwarmth = {module}:Warmth\n",
    }
    record = f"{told}/RECORD"
    contents[record] = "".join(f"{path},,\n" for path in [*contents, record])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, content in contents.items():
            archive.writestr(zipfile.ZipInfo(path), content)
    return packed.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
