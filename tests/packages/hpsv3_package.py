"""Runs where the package hpsv3 is installed: a tiny model in a cache as the hub's, and what the
package itself says of pictures.

    python hpsv3_package.py HUB ASKED.json ANSWERS.safetensors

The base model and the weights of the reward have the package's own names and file formats, so its
loader runs unchanged; weights are random. ASKED is a list of [picture's file, prompt].
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BASE, WEIGHTS = "Qwen/Qwen2-VL-7B-Instruct", "MizzenAI/HPSv3"
# The special tokens of Qwen2-VL, in its order.
NAMES = (
    *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start"),
    *("box_end", "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad"),
    *("image_pad", "video_pad"),
)
SPECIAL = [f"<|{name}|>" for name in NAMES]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def snapshot(hub: Path, repository: str) -> Path:
    """The folder of a repository in the hub's cache."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def letters() -> dict[int, str]:
    """The sign for each byte, as the tokenizers of GPT-2 and Qwen2 write them: printable ones stand
    for themselves and come first."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + number) for number, byte in enumerate(hidden)
    }


def save_processor(folder: Path) -> Any:
    """Letters as tokens, and the special tokens; the tokenizer."""
    from transformers import (
        Qwen2Tokenizer,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    numbers = {sign: number for number, sign in enumerate(letters().values())}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    slow = Qwen2Tokenizer(folder / "vocab.json", folder / "merges.txt")
    slow.add_special_tokens({"additional_special_tokens": SPECIAL})
    slow.save_pretrained(folder)
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=TEMPLATE).save_pretrained(
        folder
    )
    return tokenizer


def save_base(folder: Path, tokenizer: Any) -> None:
    """A Qwen2-VL of two layers, with room for more words than there are, as the published one."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    number = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32},
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        vision_token_id=number("<|vision_pad|>"),
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
    )
    Qwen2VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


def save_weights(folder: Path) -> None:
    """What the package's own constructor makes, with all weights drawn anew."""
    from hpsv3 import inference

    configs, _ = inference.parse_args_with_yaml(
        (
            inference.DataConfig,
            inference.TrainingConfig,
            inference.ModelConfig,
            inference.PEFTLoraConfig,
        ),
        str(inference._MODEL_CONFIG_PATH / "HPSv3_7B.yaml"),
        is_train=False,
    )
    _, training, model, lora = configs
    made, _, _ = inference.create_model_and_processor(model, lora, training)
    for name, value in made.named_parameters():
        spread = 0.6 if name.startswith("rm_head") else 0.15
        value.data.normal_(1.0 if "norm" in name and "weight" in name else 0.0, spread)
    state = {name: value.contiguous().clone() for name, value in made.state_dict().items()}
    save_file(state, folder / "HPSv3.safetensors")


def answers(asked: list[list[str]]) -> dict[str, torch.Tensor]:
    """The package's inference on files, as its own README calls it, and its input tensors."""
    from hpsv3 import HPSv3RewardInferencer

    inferencer = HPSv3RewardInferencer(device="cpu")
    files, prompts = [file for file, _ in asked], [prompt for _, prompt in asked]
    found = {
        f"input.{name}": value.contiguous()
        for name, value in inferencer.prepare_batch(files, prompts).items()
    }
    with torch.no_grad():
        try:
            inferencer.reward(files, prompts)
        except RuntimeError as error:
            print("on a CPU:", error)
        inferencer.model.float()
        found["logits"] = inferencer.reward(files, prompts).float()
    return found


def main() -> None:
    hub, asked, to = (Path(word) for word in sys.argv[1:])
    torch.manual_seed(0)
    base = snapshot(hub, BASE)
    save_base(base, save_processor(base))
    save_weights(snapshot(hub, WEIGHTS))
    save_file(answers(json.loads(asked.read_text())), to)


if __name__ == "__main__":
    main()
