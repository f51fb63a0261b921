"""A valid manifest, and ways to spoil it."""

from pathlib import Path

VALID = """\
apiVersion: tempflow.dev/v1alpha1
kind: TempFlowGRPOJob
metadata:
  name: demo
spec:
  model:
    family: digits
    source: builtin:digits
    tuning: lora
    lora: {rank: 8, alpha: 16}
  data:
    prompts:
      - a three
      - a four
  sampling:
    steps: 10
    width: 14
    height: 14
    guidanceScale: 1
  algorithm:
    epochs: 4
    promptsPerEpoch: 4
    seedsPerPrompt: 2
    branchesPerSeed: 6
    updatesPerEpoch: 1
    advantage:
      scope: seed
  rewards:
    - name: digit-log-probability
      weight: 1
    - name: digit-ink
      weight: 4
      parameters: {target: "0.45"}
  compute:
    device: cpu
"""


def edited(*edits: tuple[str, str]) -> str:
    """The valid manifest with each ``old`` replaced by ``new``; every ``old`` occurs once."""
    text = VALID
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    return text


def write(folder: Path, *edits: tuple[str, str]) -> Path:
    """The edited manifest as ``job.yaml`` in ``folder``."""
    path = folder / "job.yaml"
    path.write_text(edited(*edits))
    return path
