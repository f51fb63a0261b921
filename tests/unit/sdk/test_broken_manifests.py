"""What people get wrong, and the complete message that they get."""

from dataclasses import dataclass

import pytest
from pydantic.alias_generators import to_camel

from tempflow.manifest import parse_text
from tempflow_api.errors import ExitCode, ManifestInvalid
from tempflow_api.v1alpha1 import JobSpec
from tests.unit.sdk.manifests import VALID, edited

SPEC_FIELDS = ", ".join(to_camel(name) for name in JobSpec.model_fields)


@dataclass(frozen=True)
class Case:
    """A manifest and everything that is said about it."""

    name: str
    text: str
    expected: tuple[str, ...]


def case(name: str, old: str, new: str, *expected: str) -> Case:
    """One edit of the valid manifest."""
    return Case(name, edited((old, new)), expected)


def whole(name: str, text: str, *expected: str) -> Case:
    """A manifest of its own."""
    return Case(name, text, expected)


CASES = [
    # Unknown fields.
    case(
        "misspelled field",
        "    steps: 10",
        "    step: 10",
        "job.yaml:16: spec.sampling.step: unknown field; did you mean 'steps'?",
    ),
    case(
        "snake case",
        "guidanceScale: 1",
        "guidance_scale: 1",
        "job.yaml:19: spec.sampling.guidance_scale: unknown field; did you mean 'guidanceScale'?",
    ),
    case(
        "lower case",
        "promptsPerEpoch: 4",
        "promptsperepoch: 4",
        "job.yaml:22: spec.algorithm.promptsperepoch: unknown field; did you mean "
        "'promptsPerEpoch'?",
    ),
    case(
        "field of another block",
        "    epochs: 4",
        "    epochs: 4\n    learningRate: 3e-4",
        "job.yaml:22: spec.algorithm.learningRate: unknown field; 'learningRate' belongs to "
        "spec.optimizer",
    ),
    case(
        "field of several other blocks",
        "  sampling:",
        "  everyEpochs: 10\n  sampling:",
        "job.yaml:15: spec.everyEpochs: unknown field; 'everyEpochs' belongs to "
        "spec.algorithm.branchSet or spec.evaluation or spec.checkpoint",
    ),
    case(
        "field of nowhere",
        "  sampling:",
        "  zzz: 1\n  sampling:",
        f"job.yaml:15: spec.zzz: unknown field; valid here: {SPEC_FIELDS}",
    ),
    case(
        "field of an entry",
        "    - name: digit-ink",
        "    - name: digit-ink\n      wieght: 2",
        "job.yaml:32: spec.rewards[1].wieght: unknown field; did you mean 'weight'?",
    ),
    case(
        "unknown top-level key",
        "spec:",
        "sepc: {}\nspec:",
        "job.yaml:5: sepc: unknown field; did you mean 'spec'?",
    ),
    case(
        "unknown metadata",
        "  name: demo",
        "  name: demo\n  lables: {}",
        "job.yaml:5: metadata.lables: unknown field; did you mean 'labels'?",
    ),
    # Missing fields.
    case(
        "missing field",
        "    device: cpu",
        "    nodes: 1",
        "job.yaml:34: spec.compute.device: is missing: expects 'cuda' or 'cpu'",
    ),
    case(
        "missing block",
        "  compute:\n    device: cpu\n",
        "",
        "job.yaml:5: spec.compute: is missing: expects a block with device",
    ),
    case(
        "missing name",
        "    - name: digit-ink\n      weight: 4",
        "    - weight: 4",
        "job.yaml:31: spec.rewards[1].name: is missing: expects text",
    ),
    case(
        "missing kind",
        "kind: TempFlowGRPOJob\n",
        "",
        "job.yaml:1: kind: is missing: expects 'TempFlowGRPOJob'",
    ),
    # Choices.
    case(
        "misspelled choice",
        "device: cpu",
        "device: cdua",
        "job.yaml:35: spec.compute.device: got 'cdua': expects 'cuda' or 'cpu'; did you mean "
        "'cuda'?",
    ),
    case(
        "choice in capitals",
        "device: cpu",
        "device: CPU",
        "job.yaml:35: spec.compute.device: got 'CPU': expects 'cuda' or 'cpu'; did you mean 'cpu'?",
    ),
    case(
        "no such choice",
        "device: cpu",
        "device: tpu9000",
        "job.yaml:35: spec.compute.device: got 'tpu9000': expects 'cuda' or 'cpu'",
    ),
    case(
        "choice with underscore",
        "    epochs: 4",
        "    method: flow_grpo",
        "job.yaml:21: spec.algorithm.method: got 'flow_grpo': expects 'tempflow' or 'flow-grpo'; "
        "did you mean 'flow-grpo'?",
    ),
    case(
        "another version",
        "tempflow.dev/v1alpha1",
        "tempflow.dev/v1",
        "job.yaml:1: apiVersion: got 'tempflow.dev/v1': expects 'tempflow.dev/v1alpha1'",
    ),
    case(
        "another kind",
        "kind: TempFlowGRPOJob",
        "kind: Job",
        "job.yaml:2: kind: got 'Job': expects 'TempFlowGRPOJob'",
    ),
    # Types.
    case(
        "quoted number",
        "steps: 10",
        'steps: "10"',
        "job.yaml:16: spec.sampling.steps: got '10' (text): remove the quotes",
    ),
    case(
        "quoted fraction",
        "guidanceScale: 1",
        "guidanceScale: '4.5'",
        "job.yaml:19: spec.sampling.guidanceScale: got '4.5' (text): remove the quotes",
    ),
    case(
        "text for a number",
        "steps: 10",
        "steps: ten",
        "job.yaml:16: spec.sampling.steps: got 'ten' (text): expects a whole number",
    ),
    case(
        "fraction for a whole number",
        "steps: 10",
        "steps: 10.5",
        "job.yaml:16: spec.sampling.steps: got 10.5: expects a whole number",
    ),
    case(
        "whole number as fraction",
        "steps: 10",
        "steps: 1e1",
        "job.yaml:16: spec.sampling.steps: got 1e1: expects a whole number; write 10",
    ),
    case(
        "leading zero",
        "steps: 10",
        "steps: 010",
        "job.yaml:16: spec.sampling.steps: got 010: write 10; with leading zeros it is octal to "
        "some readers",
    ),
    case(
        "underscore in a number",
        "epochs: 4",
        "epochs: 1_000",
        "job.yaml:21: spec.algorithm.epochs: got 1_000 (text): write it without '_'",
    ),
    case(
        "boolean for a number",
        "epochs: 4",
        "epochs: true",
        "job.yaml:21: spec.algorithm.epochs: got true: expects a whole number",
    ),
    case(
        "number for text",
        "      - a four",
        "      - 4",
        'job.yaml:14: spec.data.prompts[1]: got 4 (a number): expects text, put it in quotes: "4"',
    ),
    case(
        "number in parameters",
        'target: "0.45"',
        "target: 4.5e-1",
        "job.yaml:33: spec.rewards[1].parameters.target: got 4.5e-1 (a number): expects text, put "
        'it in quotes: "4.5e-1"',
    ),
    case(
        "boolean in parameters",
        'target: "0.45"',
        "strict: true",
        "job.yaml:33: spec.rewards[1].parameters.strict: got true (a boolean): expects text, put "
        'it in quotes: "true"',
    ),
    case(
        "yes is text",
        "  compute:",
        "  runPolicy:\n    suspend: yes\n  compute:",
        "job.yaml:35: spec.runPolicy.suspend: got 'yes' (text): expects true or false",
    ),
    case(
        "text for a list",
        "    prompts:\n      - a three\n      - a four",
        "    prompts: a three",
        "job.yaml:12: spec.data.prompts: got 'a three' (text): expects a list; begin each entry "
        "with '- '",
    ),
    case(
        "text for a block",
        "lora: {rank: 8, alpha: 16}",
        "lora: 8",
        "job.yaml:10: spec.model.lora: got 8: expects a block of fields",
    ),
    case(
        "list for a mapping",
        'parameters: {target: "0.45"}',
        "parameters: [target]",
        "job.yaml:33: spec.rewards[1].parameters: got a list: expects a mapping",
    ),
    case(
        "mapping for text",
        "      - a four",
        "      - a: four",
        "job.yaml:14: spec.data.prompts[1]: got a mapping: expects text",
    ),
    case(
        "empty block",
        "  compute:",
        "  evaluation:\n  compute:",
        "job.yaml:34: spec.evaluation: got nothing: expects a block of fields; remove the key to "
        "take the default",
    ),
    case(
        "empty required field",
        "device: cpu",
        "device:",
        "job.yaml:35: spec.compute.device: got nothing: expects 'cuda' or 'cpu'",
    ),
    # Bounds and forms.
    case(
        "too small",
        "steps: 10",
        "steps: 1",
        "job.yaml:16: spec.sampling.steps: got 1: expects at least 2",
    ),
    case(
        "too large",
        "    epochs: 4",
        "    epochs: 2000000",
        "job.yaml:21: spec.algorithm.epochs: got 2000000: expects at most 1000000",
    ),
    case(
        "not above zero",
        "    epochs: 4",
        "    clipRange: 0.0",
        "job.yaml:21: spec.algorithm.clipRange: got 0.0: expects more than 0",
    ),
    case(
        "not below one",
        "    epochs: 4",
        "    clipRange: 1.",
        "job.yaml:21: spec.algorithm.clipRange: got 1.: expects less than 1",
    ),
    case(
        "infinite",
        "    epochs: 4",
        "    clipRange: .inf",
        "job.yaml:21: spec.algorithm.clipRange: got .inf: expects a finite number",
    ),
    case(
        "name in capitals",
        "name: demo",
        "name: My Demo",
        "job.yaml:4: metadata.name: got 'My Demo': expects lower-case letters, digits and '-', "
        "beginning and ending with a letter or digit; did you mean 'my-demo'?",
    ),
    case(
        "name too long",
        "name: demo",
        f"name: {'d' * 46}",
        "job.yaml:4: metadata.name: has 46 characters: expects at most 45",
    ),
    case(
        "empty list",
        "    prompts:\n      - a three\n      - a four",
        "    prompts: []",
        "job.yaml:12: spec.data.prompts: has 0 entries: expects at least 1",
    ),
    case(
        "empty text",
        "      - a four",
        "      - ''",
        "job.yaml:14: spec.data.prompts[1]: has 0 characters: expects at least 1",
    ),
    case(
        "store of another kind",
        "  compute:",
        "  checkpoint: {uri: 'gs://bucket'}\n  compute:",
        "job.yaml:34: spec.checkpoint.uri: got 'gs://bucket': expects s3://bucket/prefix, "
        "file:///folder or a path",
    ),
    case(
        "address without scheme",
        "  compute:",
        "  checkpoint: {endpointUrl: 'localhost:9000'}\n  compute:",
        "job.yaml:34: spec.checkpoint.endpointUrl: got 'localhost:9000': expects an address that "
        "begins with http:// or https://",
    ),
    case(
        "quantity",
        "device: cpu",
        "device: cpu\n    memory: 16 GB",
        "job.yaml:36: spec.compute.memory: got '16 GB': expects a quantity such as 500m, 4 or 16Gi",
    ),
    # Rules across fields.
    case(
        "picture of another size",
        "width: 14",
        "width: 28",
        "job.yaml:17: spec.sampling.width: is 14 for the digits family, which draws 14 x 14 "
        "pixels; got width 28, model.family 'digits'",
    ),
    case(
        "picture that is too high",
        "height: 14",
        "height: 28",
        "job.yaml:18: spec.sampling.height: is 14 for the digits family, which draws 14 x 14 "
        "pixels; got height 28, model.family 'digits'",
    ),
    case(
        "evaluation of another size",
        "  compute:",
        "  evaluation: {height: 28}\n  compute:",
        "job.yaml:34: spec.evaluation.height: is what the family can draw: 14 for digits, a "
        "multiple of 16 for the others; got height 28, model.family 'digits'",
    ),
    case(
        "entries that a rule looks at",
        "  compute:",
        "  compute:\n    podTemplate:\n      volumes: [{name: data, mountPath: /tmp, secret: s}]",
        "job.yaml:36: spec.compute.podTemplate.volumes: are not mounted at /etc/tempflow, "
        "/var/tempflow, /var/cache/tempflow, /home/tempflow, /tmp, /dev/shm: the trainer has "
        "volumes of its own there; got volumes[0].mountPath '/tmp'",
    ),
    case(
        "entry that lacks what a rule looks at",
        "  compute:",
        "  compute:\n    podTemplate:\n      volumes: [{name: data, mountPath: /data}]",
        "job.yaml:36: spec.compute.podTemplate.volumes: each has exactly one of "
        "persistentVolumeClaim, configMap, secret and emptyDir; got no "
        "volumes[0].persistentVolumeClaim, no volumes[0].configMap, no volumes[0].secret, no "
        "volumes[0].emptyDir",
    ),
    case(
        "more values than a line takes",
        "  algorithm:",
        "  algorithm:\n    branchSteps: [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]",
        "job.yaml:21: spec.algorithm.branchSteps: no step is listed twice; got branchSteps [0, 1, "
        "2, 3, 4, 5, 6, 7, ...]",
    ),
    case(
        "rule about an absent field",
        "    lora: {rank: 8, alpha: 16}\n",
        "",
        "job.yaml:6: spec.model.lora: belongs to tuning: lora, and is required there (write "
        "'lora: {}' for the defaults); got no lora, tuning 'lora'",
    ),
    case(
        "rule beside an error elsewhere",
        "    steps: 10\n    width: 14\n    height: 14\n    guidanceScale: 1\n  algorithm:",
        "    wdith: 14\n  algorithm:\n    branchesPerSeed: 1\n    branchSteps: [1, 1]",
        "job.yaml:16: spec.sampling.wdith: unknown field; did you mean 'width'?",
        "job.yaml:18: spec.algorithm.branchesPerSeed: a group needs two draws to compare: "
        "branchesPerSeed (times seedsPerPrompt with scope prompt) is at least 2; got "
        "branchesPerSeed 1, advantage.scope 'seed', method 'tempflow', branchSet.choose 'all', "
        "seedsPerPrompt 2",
        "job.yaml:19: spec.algorithm.branchSteps: no step is listed twice; got branchSteps [1, 1]",
        "job.yaml:23: spec.algorithm.branchesPerSeed: is given twice, first in line 18: keep one",
    ),
    # YAML itself.
    case(
        "tab",
        "    steps: 10",
        "\tsteps: 10",
        "job.yaml:16: manifest: a tab indents this line: YAML takes spaces only",
    ),
    case(
        "duplicate key",
        "    height: 14",
        "    height: 14\n    steps: 20",
        "job.yaml:19: spec.sampling.steps: is given twice, first in line 16: keep one",
    ),
    case(
        "wrong indentation",
        "    width: 14",
        "   width: 14",
        "job.yaml:17: manifest: is not valid YAML: expected <block end>, but found "
        "'<block mapping start>' (while parsing a block mapping)",
    ),
    case(
        "unclosed bracket",
        "lora: {rank: 8, alpha: 16}",
        "lora: {rank: 8, alpha: 16",
        "job.yaml:11: manifest: is not valid YAML: expected ',' or '}', but got ':' (while "
        "parsing a flow mapping)",
    ),
    case(
        "unknown alias",
        "device: cpu",
        "device: *where",
        "job.yaml:35: manifest: is not valid YAML: found undefined alias 'where'",
    ),
    case(
        "tag",
        "device: cpu",
        "device: !env DEVICE",
        "job.yaml:35: spec.compute.device: has the tag !env: tags are not supported, remove it",
    ),
    case(
        "key that is no text",
        'parameters: {target: "0.45"}',
        "parameters: {1: a}",
        "job.yaml:33: spec.rewards[1].parameters: has the key 1: expects text, in quotes",
    ),
    case(
        "circular alias",
        "      - a four",
        "      - &loop [*loop]",
        "job.yaml:14: spec.data.prompts[1][0]: contains itself: the alias in line 14 is circular",
        "job.yaml:14: spec.data.prompts[1]: got a list: expects text",
    ),
    whole(
        "two documents",
        f"{VALID}---\n{VALID}",
        "job.yaml:37: manifest: a second document starts here: one file describes one job; put "
        "each into a file of its own",
    ),
    whole(
        "empty",
        "# nothing yet\n",
        "job.yaml: manifest: is empty: expects a job; 'tempflow init --preset digits' writes one "
        "to start from",
    ),
    whole(
        "a list",
        "- a\n- b\n",
        "job.yaml:1: manifest: expects a mapping with apiVersion, kind, metadata and spec",
    ),
    whole(
        "a control character",
        "name: \x07\n",
        "job.yaml:1: manifest: has a character that YAML does not allow: '\\x07'",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_message(case: Case) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        parse_text(case.text, "job.yaml")
    assert caught.value.lines() == list(case.expected)
    assert caught.value.exit_code == ExitCode.INVALID


def test_the_table_is_as_long_as_promised() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
